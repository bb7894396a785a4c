"""Write a Llama checkpoint of Hugging Face as GGUF files, quantized by llama.cpp itself.

Owns: the names and the order of rows that llama.cpp wants, and the calls that quantize.  The tensors are read from the
safetensors files one by one; norms are stored as float32, all else as float16. The F16 file is written by the `gguf`
package, the others from it by `llama_model_quantize`, which also chooses the types of single tensors (Q4_K_M has some
in Q6_K). The files hold no tokenizer: they are for token ids.

    VENV/bin/pip install llama-cpp-python==0.3.36 "gguf==0.19.*" numpy
    VENV/bin/python make_gguf.py MODEL OUT [--types F16,Q4_0,Q4_K_M,Q8_0] [--threads 2]

writes OUT/F16.gguf, OUT/Q4_0.gguf ...
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import gguf
import llama_cpp
import numpy as np

TYPES: Final = {
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}
OUTER: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INNER: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and float32 values of every tensor of a safetensors file."""
    data = np.memmap(file, np.uint8, "r")
    start = 8 + int(data[:8].view(np.uint64)[0])
    for name, entry in json.loads(data[8:start].tobytes()).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            yield name, decode(data[start + first : start + last], entry["dtype"]).reshape(entry["shape"])


def decode(data: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes of a tensor as float32."""
    if dtype == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)


def renamed(name: str) -> str:
    """What llama.cpp calls this tensor.

    >>> renamed("model.layers.3.mlp.up_proj.weight")
    'blk.3.ffn_up.weight'
    """
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    return f"blk.{match[1]}.{INNER[match[2]]}.weight" if match else OUTER[name]


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in the order of llama.cpp: it rotates neighbours, Hugging Face the two halves of a head."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_f16(model: Path, file: Path) -> None:
    """Write the checkpoint as a GGUF file of float16 weights."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name(model.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")
    for shard in sorted(model.glob("*.safetensors")):
        for name, values in tensors(shard):
            if name.endswith("q_proj.weight"):
                values = interleaved(values, heads)
            elif name.endswith("k_proj.weight"):
                values = interleaved(values, kv_heads)
            writer.add_tensor(renamed(name), values.astype(np.float16) if values.ndim > 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, file: Path, kind: int, threads: int) -> None:
    """Quantize a GGUF file with llama.cpp."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype = threads, kind
    if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp could not quantize {source} to {file}")


def quiet() -> Callable[..., None]:
    """Drop all that llama.cpp logs but errors; the result must be kept while llama.cpp is used."""

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, data: int) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            print(text.decode(errors="replace"), end="")

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    return log


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a Llama checkpoint as GGUF files.")
    parser.add_argument("model", type=Path, help="directory with config.json and safetensors files")
    parser.add_argument("out", type=Path, help="directory for the GGUF files")
    parser.add_argument("--types", default=",".join(TYPES), help=f"of {', '.join(TYPES)} (all)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    kinds = {name: TYPES[name] for name in options.types.split(",")}
    options.out.mkdir(parents=True, exist_ok=True)
    keep = quiet()
    whole = options.out / "F16.gguf"
    write_f16(options.model, whole)
    for name, kind in kinds.items():
        file = options.out / f"{name}.gguf"
        if file != whole:
            quantize(whole, file, kind, options.threads)
        print(f"{file}: {file.stat().st_size:,} bytes", flush=True)
    if "F16" not in kinds:
        whole.unlink()
    del keep


if __name__ == "__main__":
    main()
