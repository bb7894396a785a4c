"""Quantized copies of small models, made tensor by tensor with nothing but `quantize_tensor` and a layout.

The reference for what a reader should compute is built here too: the dense model of the same numbers, with the inputs of its layers
rounded by hooks. No pipeline and no runtime of this package is involved.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from arrondi.checkpoint import LAYOUTS, LayerValues, ModelFacts, Placed
from arrondi.formats import LayerScheme, PerTensor, Scheme
from arrondi.tensor.nearest import fake_quantize, quantize_tensor
from arrondi.tensor.ranges.grid import Grid

Pick = Callable[[str, tuple[int, ...]], LayerScheme | None]


def linears(scheme: LayerScheme, *without: str) -> Pick:
    """Every matrix named `.weight` but embeddings, heads, routers and what holds one of the words."""
    left = ("embed", "wte", "wpe", "lm_head", "gate.weight", *without)

    def pick(name: str, shape: tuple[int, ...]) -> LayerScheme | None:
        return scheme if len(shape) == 2 and name.endswith(".weight") and not any(w in name for w in left) else None

    return pick


def static_grid(scheme: LayerScheme, largest: float) -> Grid | None:
    """The grid of inputs up to `largest`, if the scheme asks for a static one."""
    inputs = scheme.inputs
    if inputs is None or inputs.dynamic is True:
        return None
    if inputs.dynamic == "local":
        return Grid(1 / (1 / torch.full((1, 1), largest / (6 * 448))), None, None)
    edge = torch.tensor([[-largest, largest]])
    q = quantize_tensor(edge, replace(inputs.scheme, granularity=PerTensor()))
    assert isinstance(q.scale, torch.Tensor)
    return Grid(q.scale, q.zero_point, None)


def quantized_copy(
    source: Path,
    out: Path,
    pick: Pick,
    *,
    layout: str = "compressed-tensors",
    largest: float = 3.0,
    kind: str = "Linear",
    facts: ModelFacts = ModelFacts(),
    module_of: Callable[[str], str] = lambda name: "",
) -> dict[str, tuple[Placed, LayerValues]]:
    """Write `source` with the picked tensors quantized; what was quantized, by name."""
    tensors = {n: t for f in sorted(source.glob("*.safetensors")) for n, t in load_file(f).items()}
    made: dict[str, tuple[Placed, LayerValues]] = {}
    stored: dict[str, torch.Tensor] = {}
    kept = []
    for name, tensor in tensors.items():
        scheme = pick(name, tuple(tensor.shape))
        if scheme is None:
            stored[name] = tensor
            kept += [name.removesuffix(".weight")] if tensor.ndim == 2 and name.endswith(".weight") else []
            continue
        scheme = stored_as(scheme, tensor.dtype)
        turned = kind == "Conv1D"
        placed = Placed(name, tuple(tensor.shape), scheme, module_of(name), kind, turned)
        matrix = (tensor.T if turned else tensor).float()
        values = LayerValues(quantize_tensor(matrix, scheme.weights), static_grid(scheme, largest))
        made[name] = placed, values
        stored |= LAYOUTS[layout].write(placed, values)
    out.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in stored.items()}, out / "model.safetensors", metadata={"format": "pt"})
    for path in source.glob("*.json"):
        if "index" not in path.name:
            shutil.copyfile(path, out / path.name)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = LAYOUTS[layout].config([p for p, _ in made.values()], kept, facts)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    return made


def stored_as(scheme: LayerScheme, dtype: torch.dtype) -> LayerScheme:
    """The scheme with all plain scales in the type of the model."""
    name: Any = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}[dtype]
    scheme = scheme.with_scale(name)
    inputs = scheme.inputs
    if inputs is not None and inputs.dynamic is False and not isinstance(inputs.scheme.scale, Scheme):
        scheme = replace(scheme, inputs=replace(inputs, scheme=replace(inputs.scheme, scale=name)))
    return scheme


def reference(source: Path, folder: Path, made: Mapping[str, tuple[Placed, LayerValues]], rounded: bool = True) -> Any:
    """The float32 model of the quantized numbers, inputs rounded by hooks; `folder` is for its dense copy."""
    tensors = {n: t.float() for f in sorted(source.glob("*.safetensors")) for n, t in load_file(f).items()}
    for name, (placed, values) in made.items():
        tensors[name] = placed.restored(values.weight.dequantize())
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(source / "config.json", folder / "config.json")
    model = loaded(folder, torch.float32)
    modules = dict(model.named_modules())
    for placed, values in made.values():
        inputs, module = placed.scheme.inputs, modules.get(placed.path)
        if inputs is not None and module is not None and rounded:
            module.register_forward_pre_hook(_rounding(inputs, values.inputs))
    return model


def _rounding(inputs: Any, grid: Grid | None) -> Callable[[Any, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    def round_inputs(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (x, *rest) = args
        if inputs.dynamic == "local":
            return (local_rounding(x, inputs.scheme, grid), *rest)
        return (fake_quantize(x, inputs.scheme, grid), *rest)

    return round_inputs


def local_rounding(x: torch.Tensor, scheme: Scheme, grid: Grid | None) -> torch.Tensor:
    """NVFP4 inputs, written out: fp8 scales of groups of 16 under a given float32 scale."""
    assert grid is not None and isinstance(grid.scale, torch.Tensor)
    outer = grid.scale.reshape(())
    groups = x.float().unflatten(-1, (-1, 16))
    inner = (groups.abs().amax(-1, keepdim=True) / 6 / outer).clamp(max=448).to(torch.float8_e4m3fn).float()
    scale = torch.where(inner == 0, torch.tensor(0.125), inner) * outer
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    edges = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    units = (groups / scale).abs()
    index = torch.bucketize(units, edges)  # a tie goes down, and at every odd edge up, to the even code
    tie = (units.unsqueeze(-1) == edges).any(-1) & (index % 2 == 1)
    return (levels[index + tie] * groups.sign() * scale).flatten(-2).to(x.dtype)


def loaded(folder: Path, dtype: Any = "auto") -> Any:
    """The model as plain transformers loads it."""
    config = json.loads((folder / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package warns of group sizes that it does not like
        return cls.from_pretrained(folder, dtype=dtype).eval()


IDS = torch.randint(0, 2048, (2, 20), generator=torch.Generator().manual_seed(3))


def logits(model: Any) -> torch.Tensor:
    """The logits of a fixed batch, float32."""
    with torch.no_grad():
        output = model(input_ids=IDS)
    found = output.logits if hasattr(output, "logits") else output[0]
    return found.float()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to the second, in the Euclidean norm."""
    return float((a.float() - b.float()).norm() / b.float().norm())
