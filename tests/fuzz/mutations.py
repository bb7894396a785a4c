"""Mutations of JSON documents and of safetensors files: what a damaged download, an editor or another tool may do.

Owns: `mutate_json`, `mutate_text`, `mutate_header` and `mutate_small`. All take a `random.Random`, so a seed gives the same mutants again.
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

WORDS = [
    "int", "float", "group", "channel", "tensor", "token", "block", "tensor_group", "attn_head", "pack-quantized", "int-quantized",
    "float-quantized", "naive-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense",
    "marlin-24", "compressed", "frozen", "initialized", "Linear", "Embedding", "re:.*", "re:(", "local", "static", "weight", "torch.uint8",
    "torch.float8_e4m3fn", "torch.float32", "torch.bfloat16", "torch.float16", "torch.int8", "minmax", "no", "true", "0", "4", "", "gptq", "arrondi", "compressed-tensors",
    "gptq_v2", "gemm", "gemv", "nf4", "fp4", "awq", "bitsandbytes", "w=int4/g32", "w=ternary/channel", "NF4", "W8A8", "lm_head", "model.layers.0.a", "0.9.0", "1.0",
]  # fmt: skip
KEYS = [
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype", "zp_dtype", "observer",
    "observer_kwargs", "targets", "weights", "input_activations", "output_activations", "format", "ignore", "kv_cache_scheme", "version",
    "sparsity_config", "transform_config", "quantization_status", "dequantize", "run_compressed", "arrondi", "module_names", "transposed",
    "shape", "scheme", "kind", "indexed", "module", "global_compression_ratio", "moe_sparsity_config", "unknown",
    "bits", "sym", "desc_act", "checkpoint_format", "dynamic", "lm_head", "zero_point", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type",
]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 63, 64, 128, 32.5, 2**31, 2**62, 2**80, -(2**63), 1e308, 1e-5]
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "U32",
    "X9",
]

SMALL = 128
"""Bytes of a small tensor."""


def any_value(rng: random.Random) -> Any:
    """A JSON value of any kind."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(WORDS)
    if kind < 5:
        return rng.choice(NUMBERS)
    return rng.choice(
        [None, True, False, [], {}, [rng.choice(WORDS)], [rng.choice(NUMBERS)], {rng.choice(KEYS): rng.choice(WORDS)}]
    )


def typo(text: str, rng: random.Random) -> str:
    """A character dropped, doubled, replaced, two exchanged, or the case changed."""
    if not text:
        return rng.choice(WORDS)
    i = rng.randrange(len(text))
    kind = rng.randrange(6)
    if kind == 0:
        return text[:i] + text[i + 1 :]
    if kind == 1:
        return text[:i] + text[i] + text[i:]
    if kind == 2:
        return text[:i] + rng.choice("abcxyz0123456789._-:/ é") + text[i + 1 :]
    if kind == 3 and i + 1 < len(text):
        return text[:i] + text[i + 1] + text[i] + text[i + 2 :]
    return text.swapcase() if kind == 4 else text + rng.choice(["x", ".0", " "])


def changed(value: Any, rng: random.Random) -> Any:
    """A value near the old one, or any other."""
    if rng.random() < 0.35:
        return any_value(rng)
    if isinstance(value, bool):
        return rng.choice([not value, str(value), int(value), None])
    if isinstance(value, int):
        return rng.choice(
            [value + 1, value - 1, -value, value * 2, value // 2, value + 0.5, float(value), str(value), [value]]
        )
    if isinstance(value, str):
        return typo(value, rng)
    if isinstance(value, list) and value:
        return rng.choice(
            [value[1:], value + value[:1], value[::-1], [*value, any_value(rng)], [changed(v, rng) for v in value]]
        )
    return any_value(rng)


def mutate_json(document: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A copy with one place changed, removed, renamed, added or taken from elsewhere."""
    document = copy.deepcopy(document)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(child, dict | list):
                walk(child)

    walk(document)
    if not places:
        return {rng.choice(KEYS): any_value(rng)}
    node, key = rng.choice(places)
    kind = rng.randrange(10)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice([typo(key, rng), rng.choice(KEYS)])] = node.pop(key)
    elif kind == 2 and isinstance(node, dict):
        node[rng.choice(KEYS)] = any_value(rng)
    elif kind == 3:
        other, name = rng.choice(places)
        node[key] = copy.deepcopy(other[name])
    else:
        node[key] = changed(node[key], rng)
    return document


def mutate_text(text: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut off or doubled."""
    kind = rng.randrange(5)
    i = rng.randrange(max(len(text), 1))
    if kind == 0:
        return text[:i]
    if kind == 1:
        return text[:i] + text[i : i + rng.randrange(1, 40)] + text[i:]
    if kind == 2:
        return text[:i] + bytes([rng.randrange(256)]) + text[i + 1 :]
    if kind == 3:
        return text[:i] + text[i + rng.randrange(1, 20) :]
    return text[:i] + rng.choice([b"[" * 3000, b"{", b"null", b"1" * 5000, b'"']) + text[i:]


def mutate_header(file: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, another length, or cut off; the numbers stay."""
    length = int.from_bytes(file[:8], "little")
    header, data = file[8 : 8 + length], file[8 + length :]
    kind = rng.randrange(10)
    if kind == 0:
        return mutate_length(file, rng)
    if kind == 1:
        changed_text = mutate_text(header, rng)
        return len(changed_text).to_bytes(8, "little") + changed_text + data
    table: dict[str, Any] = json.loads(header)
    names = [n for n in table if n != "__metadata__"]
    name = rng.choice(names)
    if len(table.get("__metadata__") or {}) > 1 and rng.random() < 0.5:
        kind = -1
    if kind < 0:
        _mutate_note(table["__metadata__"], rng)
    elif kind <= 4:
        table[rng.choice([typo(name, rng), name.rpartition(".")[0] + "." + rng.choice(["weight", "weight_scale", "weight_g_idx", "weight_zero_point", "input_scale", "codes", "scale", "bias", "k_scale", "qweight", "qzeros", "g_idx", "SCB", "absmax"])])] = table.pop(name)  # fmt: skip
    elif kind == 5:
        table[name]["dtype"] = rng.choice(DTYPES)
    elif kind == 6:
        table[name]["shape"] = changed(table[name]["shape"], rng)
    elif kind == 7:
        table = mutate_json(table, rng)
    elif kind == 8:
        _reinterpret(table[name], rng)
    else:
        stop = max(table[n]["data_offsets"][1] for n in names)
        extra = rng.choice(
            ["weight_g_idx", "input_scale", "weight_zero_point", "scale", "codes", "input_global_scale", "k_scale"]
        )
        table[f"{name.rpartition('.')[0]}.{extra}"] = {"dtype": "U8", "shape": [4], "data_offsets": [stop, stop + 4]}
        data += bytes(4)
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


def _mutate_note(words: dict[str, str], rng: random.Random) -> None:
    """Change one of the JSON texts that a file keeps beside its tensors, drop it or take another one's."""
    key, kind = rng.choice(list(words)), rng.randrange(6)
    if kind == 0:
        del words[key]
    elif kind == 1:
        words[key] = rng.choice(list(words.values()))
    elif kind == 2:
        words[key] = mutate_text(words[key].encode(), rng).decode("latin-1")
    else:
        words[key] = json.dumps(mutate_json({"": json.loads(words[key])}, rng).get(""))


def mutate_small(file: bytes, rng: random.Random) -> bytes:
    """A safetensors file with one byte of a small tensor changed: where layouts keep notes of what large ones mean."""
    length = int.from_bytes(file[:8], "little")
    spans = [t["data_offsets"] for n, t in json.loads(file[8 : 8 + length]).items() if n != "__metadata__"]
    start, stop = rng.choice([s for s in spans if 0 < s[1] - s[0] <= SMALL])
    at = 8 + length + rng.randrange(start, stop)
    return (
        file[:at]
        + bytes([rng.choice([file[at] ^ 1, file[at] ^ 128, (file[at] + 1) % 256, rng.randrange(256)])])
        + file[at + 1 :]
    )


def mutate_length(file: bytes, rng: random.Random) -> bytes:
    """Another header length, or a file that is too short or too long."""
    kind = rng.randrange(4)
    if kind == 0:
        length = int.from_bytes(file[:8], "little") + rng.choice([-1, 1, 8, 1 << 20, 1 << 60])
        return (length % 2**64).to_bytes(8, "little") + file[8:]
    if kind == 1:
        return file[: rng.randrange(len(file))]
    return file + bytes(rng.randrange(1, 9)) if kind == 2 else bytes(rng.randrange(9)) + file


def _reinterpret(facts: dict[str, Any], rng: random.Random) -> None:
    """Another element type or another shape of the same bytes."""
    sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}  # fmt: skip
    if rng.random() < 0.5:
        same = [d for d, size in sizes.items() if size == sizes.get(facts["dtype"]) and d != facts["dtype"]]
        facts["dtype"] = rng.choice(same or DTYPES)
    else:
        facts["shape"] = rng.choice([facts["shape"][::-1], [1, *facts["shape"]], [*facts["shape"], 1]])
