"""What people type who come from another tool, and the scheme here that is nearest in meaning.

Owns: `unknown_scheme`, the error for a text that names no scheme. Spelling is the last resort: `IQ3_M` is like no name here, but
has about as many bits as `Q3_K`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from arrondi.errors import ArrondiError, SchemeError, unknown
from arrondi.formats.format import FORMATS
from arrondi.formats.ggml import GGML
from arrondi.formats.presets import ALIASES, PRESETS

_NEAR: Final = {"IQ1": "TQ1_0", "IQ2": "Q2_K", "IQ3": "Q3_K", "IQ4": "IQ4_XS", "TQ1": "TQ1_0", "TQ2": "TQ2_0"}
"""Types of GGUF files that are no scheme, by the beginning of their names, and one of about as many bits that is."""


def _gguf(match: re.Match[str]) -> str:
    word = match["block"]
    whole = next((name for name in GGML if word.startswith(name)), None)
    near = whole or next((name for start, name in _NEAR.items() if word.startswith(start)), "Q4_K")
    return f"That is a type of GGUF files, or a mix of several; nearest in meaning is {near}"


def _bits(match: re.Match[str]) -> str:
    bits = int(match["bits"])
    if bits == 1:
        return "One bit a weight is BINARY, TERNARY takes two"
    if not 2 <= bits <= 8:
        return f"Weights of {bits} bits are not quantized here: 2 to 8"
    rounded = {4: "W4A8", 8: "W8A8"}.get(bits, f"w=int{bits}/g128,a=int8/token")
    return f"Weights of {bits} bits are W{bits}A16 (groups of 128), with rounded inputs {rounded}"


def _grammar(match: re.Match[str]) -> str:
    """`int4/g64` lacks its `w=`; a preset takes no parts behind it."""
    head, rest = match["head"], match["rest"].lower()
    preset = PRESETS.get(ALIASES.get(head, head))
    if head.lower() in FORMATS:
        return f"Write it with what is rounded: w={head.lower()}{rest}"
    if preset is None:
        return "A scheme is a name alone, or the grammar: w=int4/g64,a=int8/token"
    size = re.fullmatch(r"/g(\d+)", rest)
    given = f" --group-size {size[1]} beside --scheme {head}, or" if size else ""
    return f"A name takes no parts. Write{given} all of it in the grammar: {head} is {preset}"


def _sized(match: re.Match[str]) -> str:
    return f"Another group size is written w=int{match['bits']}/g{match['size']}, or W{match['bits']}A16 with --group-size {match['size']}"


def _say(text: str) -> Callable[[re.Match[str]], str]:
    return lambda match: text


def _with_method(match: re.Match[str]) -> str:
    method = match[2].lower()
    scheme = match["scheme"] if match["scheme"] in PRESETS else "W4A16"
    if method == "awq":
        return f"AWQ is a method and not known here; the scheme is {scheme}"
    return f"The method is said apart: --method {method} --scheme {scheme}"


_PLAIN: Final = "That is a plain type, not a quantization; `arrondi dequantize --dtype` writes it"

_MEANINGS: Final[tuple[tuple[str, Callable[[re.Match[str]], str]], ...]] = (
    (r"(?P<head>\w+)(?P<rest>[/,].*)", _grammar),
    (r"Q(?P<bits>\d)F(16|32)(_\d)?", _bits),
    (r"(UD_)?(?P<block>(IQ|TQ|Q)\d(_\w+)?)", _gguf),
    (r"(GGUF|GGML|LLAMA\.?CPP).*", _say("GGUF is a kind of file; choose a scheme such as W4A16")),
    (r"(?:W|INT)(?P<bits>[2-8])(?:A16)?_?G(?P<size>\d+)", _sized),
    (r"W(?P<bits>[2-8])A16_SYM", lambda match: f"W{match['bits']}A16 is symmetric"),
    (r"W?(16|32)_?A(16|32)", _say(_PLAIN)),
    (r"W?8_?D?A8W?(_INT8)?|8DA8W", _say("W8A8 is that: int8 weights, int8 inputs with a scale for each token")),
    (r"8DA4W|W4A8_INT8|INT8_?DYNAMIC_?ACTIVATION_?INT4_?WEIGHT", _say("Weights of 4 bits and inputs of 8 are W4A8")),
    (r"W8A8_(FP8|FLOAT8)|FP8_(W8A8|PER_TENSOR|STATIC)", _say("FP8 has stored scales for inputs, FP8_DYNAMIC a scale for each token, FP8_BLOCK blocks of 128")),
    (r"(?:Q?U?INT|I|W)?(?P<bits>\d{1,2})_?(?:BITS?|B|WO|WEIGHT_ONLY|A16)?(?:_SYM|_MLX)?", _bits),
    (r"(?P<method>RTN|GPTQ|HQQ)(_.*)?", lambda match: f"That is a method: --method {match['method'].lower()} --scheme W4A16"),
    (r"(AWQ|AUTO_?ROUND|SPINQUANT|QUAROT|OMNIQUANT|QUIP#?|AQLM|MARLIN)(_.*)?", _say("That is a method and not known here; the usual scheme for it is W4A16")),
    (r"SMOOTHQUANT(_.*)?", _say("That is a method and not known here; the usual scheme for it is W8A8")),
    (r"(?P<scheme>\w+)_(AWQ|GPTQ|RTN|HQQ)", _with_method),
    (r"EXL\d?(_.*)?|EXLLAMA.*", _say("That is a kind of file of ExLlama; the usual scheme is W4A16")),
    (r"BNB|BITSANDBYTES", _say("The 4 bits of bitsandbytes are NF4 (or FP4), its 8 bits W8A16")),
    (r"(OPTIMUM_?)?QUANTO|TORCH_?AO|MLX|ONNX|COMPRESSED_TENSORS", _say("That is a library; choose a scheme such as W4A16 or W8A8")),
    (r"(FP6|FLOAT6|E3M2|E2M3|FP6_?E\dM\d).*", _say("FP6 in blocks of 32 is MXFP6, with a scale for each row w=fp6_e3m2/channel")),
    (r"MX_?FP(?P<bits>[468])_.*", lambda match: f"FP{match['bits']} in blocks of 32 is MXFP{match['bits']}"),
    (r"MX_?INT(?P<bits>\d)", lambda match: f"Integers under power-of-two scales are w=int{match['bits']}/g32/e8m0"),
    (r"(BNB|BITSANDBYTES)?_?(4BIT|NF4).*|QLORA", _say("The 4 bits of bitsandbytes are NF4 (or FP4)")),
    (r"(BNB|BITSANDBYTES|LLM)_?\.?(INT)?8.*", _say("Weights of 8 bits are W8A16, with rounded inputs W8A8")),
    (r"(E4M3|FP8_?E4M3|FLOAT8|F8|E5M2|FP8_?E5M2).*", _say("FP8 rounds weights and inputs by stored scales, FP8_DYNAMIC inputs by their own, FP8A16 weights alone")),
    (r"(FLOAT4|F4|E2M1|FP4_?E2M1).*", _say("FP4 in blocks is NVFP4 or MXFP4; NVFP4A16 and MXFP4A16 round weights alone")),
    (r"W4A4.+", _say("Weights and inputs of 4 bits are NVFP4, MXFP4 or w=int4/g128,a=int4/token")),
    (r"(BF16|BFLOAT16|FP16|FLOAT16|HALF|FP32|FLOAT32|F16|F32|NONE)", _say(_PLAIN)),
    (r"(BITNET|B?1\.58).*", _say("Ternary weights are T158 (one scale) or TERNARY (one a row)")),
)  # fmt: skip
"""What is recognised (the whole text in capitals, dashes and blanks as underscores), and what is said; the first match counts."""


def unknown_scheme(text: str) -> ArrondiError:
    """The error for a text that is neither a preset nor the grammar; it says which scheme is nearest.

    >>> str(unknown_scheme("IQ3_M")).partition(" Known:")[0]
    "Unknown scheme 'IQ3_M'. That is a type of GGUF files, or a mix of several; nearest in meaning is Q3_K."
    """
    word = re.sub(r"[-\s]+", "_", re.sub(r"\s*([/,=])\s*", r"\1", text.strip().upper()))
    if not word:
        return SchemeError("The scheme is empty. Leave it out for W4A16, or name one: W4A16, W8A8, NF4, w=int3/g64.")
    for pattern, say in _MEANINGS:
        match = re.fullmatch(pattern, word)
        if match:
            return unknown("scheme", text, [*PRESETS, *ALIASES], hint=f"{say(match)}.")
    return unknown("scheme", text, [*PRESETS, *ALIASES])
