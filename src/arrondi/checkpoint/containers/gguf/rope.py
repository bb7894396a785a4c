"""Rotary positions as a GGUF file describes them, in transformers' words.

Owns: `rope_of`, and `factors_of` for the way back. The header says how positions are scaled; the frequencies of Llama 3 are a tensor instead, which
is compared with what the config that its makers gave would compute, and those of Phi 3 two, for short texts and long ones.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch

from arrondi.checkpoint.containers.gguf.header import Header
from arrondi.errors import FileFormatError

_FACTORS: Final = "rope_freqs.weight"
_LONG: Final = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
_LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Llama 3.1 and all that follow it have; only the factor differs."""
_SAME: Final = 1e-4
_BASE: Final = 10_000.0


def rope_of(header: Header, config: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of a config, or nothing where positions are plain.

    Raises:
        FileFormatError: a scaling that transformers has no word for.
    """
    name = header.architecture
    base = float(config.get("rope_theta") or header.value(f"{name}.rope.freq_base") or _BASE)
    kind = header.value(f"{name}.rope.scaling.type", "none")
    factor = header.value(f"{name}.rope.scaling.factor")
    original = header.value(f"{name}.rope.scaling.original_context_length")
    if _LONG["long_factor"] in header.tensors and _LONG["short_factor"] in header.tensors and original:
        lists = {word: header.read(tensor).flatten().tolist() for word, tensor in _LONG.items()}
        more = {"original_max_position_embeddings": int(original)}
        attention = header.value(f"{name}.rope.scaling.attn_factor")
        said = {**lists, **more, **({"attention_factor": float(attention)} if attention else {})}
        return {
            "rope_parameters": {"rope_theta": base, "rope_type": "longrope", **_share(header, config), **said},
            **more,
        }
    if _FACTORS in header.tensors:
        return {"rope_parameters": {"rope_theta": base, **_llama3(header, config, base)}}
    part = _share(header, config)
    if kind == "none" or not factor or (kind == "linear" and factor == 1):
        return {"rope_parameters": {"rope_theta": base, "rope_type": "default", **part}} if part else {}
    if kind == "linear":
        return {"rope_parameters": {"rope_theta": base, "rope_type": "linear", "factor": float(factor)}}
    if kind == "yarn":
        more = {"original_max_position_embeddings": int(original)} if original else {}
        return {"rope_parameters": {"rope_theta": base, "rope_type": "yarn", "factor": float(factor), **more}}
    raise FileFormatError(
        f"{header.path}: scales its positions by {kind!r}, which is not read here. Give the original model."
    )


def _share(header: Header, config: dict[str, Any]) -> dict[str, float]:
    """Of each head what is turned, where that is not all."""
    name = header.architecture
    turned, heads = header.value(f"{name}.rope.dimension_count"), config.get("num_attention_heads")
    whole = header.value(f"{name}.attention.key_length") or (config["hidden_size"] // heads if heads else None)
    return {"partial_rotary_factor": turned / whole} if turned and whole and turned < whole else {}


def _llama3(header: Header, config: dict[str, Any], base: float) -> dict[str, Any]:
    """The scaling of Llama 3 whose divisors of frequencies are those of the file."""
    given = header.read(_FACTORS).flatten()
    found = {"rope_type": "llama3", "factor": float(given.max()), **_LLAMA3}
    if not torch.allclose(given.double(), _divisors(len(given), base, found), rtol=_SAME):
        raise FileFormatError(
            f"{header.path}: divides its rotary frequencies by numbers that Llama 3's rule does not give. Give the original model."
        )
    return found


def _divisors(count: int, base: float, rule: dict[str, Any]) -> torch.Tensor:
    """What the rule of Llama 3 divides each frequency by: 1 for short waves, the factor for long ones, smoothly between."""
    waves = 2 * math.pi * base ** (torch.arange(count, dtype=torch.float64) / count)
    original, low, high = (rule[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    smooth = ((original / waves - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rule["factor"] + smooth)


def factors_of(config: Any) -> dict[str, torch.Tensor]:
    """The tensors by which a file says how positions are scaled, float32 (turned numbers of a head / 2,): of Llama 3's way and of Phi 3's."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return {tensor: torch.tensor(rope[word], dtype=torch.float32) for word, tensor in _LONG.items()}
    if rope.get("rope_type") != "llama3":
        return {}
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {_FACTORS: _divisors(size // 2, float(rope["rope_theta"]), rope).float()}


def attention_factor(config: Any) -> float | None:
    """By what queries and keys of long texts are multiplied where positions are scaled as Phi 3's are; None: they are not.

    Source: Ding et al., 2024, arXiv:2402.13753, as transformers computes it.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    given, original = rope.get("attention_factor"), int(rope["original_max_position_embeddings"])
    factor = rope.get("factor") or config.max_position_embeddings / original
    return float(given) if given else math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
