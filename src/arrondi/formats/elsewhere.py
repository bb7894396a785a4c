"""What other tools call their schemes, and what is nearest to them here.

Owns: `elsewhere`, whose sentence goes into the error for an unknown scheme.
"""

from __future__ import annotations

import re
from typing import Final

_GGUF: Final = re.compile(r"I?Q(\d)_?[A-Z0-9_]*|TQ\d_0")
_BITS: Final = re.compile(r"(?:INT|UINT|W|I|U)?(\d+)(?:_?BITS?)?")
_PLAIN: Final = {"BF16", "BFLOAT16", "FP16", "FLOAT16", "F16", "HALF", "FP32", "FLOAT32", "F32", "FLOAT", "NONE"}
_METHODS: Final = {"RTN", "HQQ", "GPTQ"}
_OFFSETS: Final = {"Q4_1": "w=int4/g32/offset", "Q5_1": "w=int5/g32/offset"}


def elsewhere(name: str) -> str:
    """A sentence on a scheme's name that another tool uses, or nothing.

    >>> elsewhere("Q8_0")
    'Q8_0 is a type of GGUF files, which are not written here; the nearest scheme is w=int8/g32.'
    """
    word = name.strip().upper().replace("-", "_")
    if word in _METHODS:
        return f"{word.lower()} is a method, not a scheme: --method {word.lower()} --scheme W4A16."
    if word in _PLAIN:
        return f"{name} is not quantized. Leave such weights alone, or restore them with `arrondi dequantize`."
    if found := _GGUF.fullmatch(word):
        bits = found[1] or ("1" if word.startswith("TQ1") else "2")
        near = _OFFSETS.get(word, f"w=int{bits}/g32" if word.endswith("_0") else f"W{bits}A16")
        near = "TERNARY" if word.startswith("TQ") or bits == "1" else near
        return f"{name} is a type of GGUF files, which are not written here; the nearest scheme is {near}."
    if (found := _BITS.fullmatch(word)) and 1 <= int(found[1]) <= 8:
        bits = int(found[1])
        near = "BINARY (one bit) or TERNARY" if bits == 1 else f"W{bits}A16 (weights in groups of 128)"
        more = ", or W8A8 with the inputs rounded, too" if bits == 8 else ""
        return f"Use {near}{more}."
    return ""
