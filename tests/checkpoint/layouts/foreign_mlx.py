"""Small checkpoints in MLX's layout, with the numbers that MLX gives. A script for an environment with mlx and NumPy; knows nothing of arrondi.

    python foreign_mlx.py DIR

Each case is a folder DIR/CASE with config.json, model.safetensors and expected.safetensors, float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx

SHAPES = {"model.layers.0.a": (64, 128), "model.layers.0.b": (32, 256)}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1}
CASES = [
    *(("affine", bits, 32, mx.bfloat16) for bits in (1, 2, 3, 4, 5, 6, 8)), ("affine", 4, 64, mx.float16), ("affine", 3, 128, mx.float32),
    ("mxfp4", 4, 32, mx.bfloat16), ("mxfp8", 8, 32, mx.bfloat16), ("nvfp4", 4, 16, mx.bfloat16),
]  # fmt: skip


def main(out: Path) -> None:
    for mode, bits, size, dtype in CASES:
        folder = out / f"mlx-{mode}-{bits}-{size}"
        folder.mkdir(parents=True)
        mx.random.seed(0)
        tensors, expected = {"model.norm.weight": mx.ones(64), "model.layers.0.a.bias": mx.ones(64)}, {}
        for name, shape in SHAPES.items():
            weight = mx.random.normal(shape).astype(dtype)
            weight[1] = 0
            parts = mx.quantize(weight, group_size=size, bits=bits, mode=mode)
            tensors |= {
                f"{name}.{leaf}": part for leaf, part in zip(("weight", "scales", "biases"), parts, strict=False)
            }
            grid = [part if part.dtype == mx.uint8 else part.astype(mx.float32) for part in parts[1:]]
            restored = mx.dequantize(parts[0], *grid, group_size=size, bits=bits, mode=mode, dtype=mx.float32)
            expected[f"{name}.weight"] = restored
        mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
        mx.save_safetensors(str(folder / "expected.safetensors"), expected)
        said = {"group_size": size, "bits": bits, "mode": mode}
        text = json.dumps(CONFIG | {"quantization": said, "quantization_config": said})
        (folder / "config.json").write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
