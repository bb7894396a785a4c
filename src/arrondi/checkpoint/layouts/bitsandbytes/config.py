"""The `quantization_config` of bitsandbytes, as transformers writes and reads it.

Owns: `config` (what is written), `read_config` (what is read, `Said`) and `together`.

Source: transformers 5.24, `BitsAndBytesConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from arrondi.checkpoint.layouts.bitsandbytes.rows import has
from arrondi.checkpoint.layouts.bitsandbytes.state import KINDS
from arrondi.checkpoint.layouts.claims import Claims
from arrondi.checkpoint.layouts.layout import ModelFacts, Placed
from arrondi.errors import FileFormatError
from arrondi.formats import Scheme

THRESHOLD = 6.0
"""Size of an input from which a feature is not rounded, where a config does not say it."""


@dataclass(frozen=True)
class Said:
    """What a config says.

    Attributes:
        eight: weights have 8 bits, not 4.
        kind: "nf4" or "fp4", of 4 bits.
        threshold: of inputs of 8 bits; 0: none is left alone.
    """

    eight: bool
    kind: str
    threshold: float


def read_config(config: object) -> Said:
    """Check a `quantization_config` of bitsandbytes and give what it says.

    Raises:
        FileFormatError: a key that is not known, or a value that cannot be.
    """
    claims = Claims(config, "quantization_config")
    claims.only("quant_method", "bitsandbytes")
    four = claims.flag("load_in_4bit", claims.flag("_load_in_4bit", False))
    eight = claims.flag("load_in_8bit", claims.flag("_load_in_8bit", False))
    if four == eight:
        raise FileFormatError("quantization_config should say load_in_4bit or load_in_8bit, and not both.")
    kind = claims.word("bnb_4bit_quant_type", "fp4", KINDS)
    threshold = claims.real("llm_int8_threshold", THRESHOLD)
    if threshold < 0:
        raise FileFormatError(f"quantization_config.llm_int8_threshold is {threshold}, but sizes are not negative.")
    claims.only("llm_int8_has_fp16_weight", False)
    claims.words("llm_int8_skip_modules")  # the stored tensors say it, and the notes beside them the rest
    claims.remarks((
        "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_use_double_quant", "llm_int8_enable_fp32_cpu_offload",
    ))  # fmt: skip
    claims.done()
    return Said(eight, kind, threshold)


def together(placed: list[Placed]) -> str | None:
    """Why one config cannot describe these layers, as a sentence; None if it can."""
    eight = {has(p) for p in placed}
    formats = {p.scheme.weights.format for p in placed}
    inputs = {p.scheme.inputs for p in placed}
    if len(eight) > 1 or len(formats) > 1 or len(inputs) > 1:
        return "A bitsandbytes file has one format for all layers, and these would have several. Use one scheme."
    return None


def config(placed: list[Placed], kept: list[str], facts: ModelFacts = ModelFacts()) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    scheme = placed[0].scheme
    eight = has(placed[0])
    kind = "fp4" if eight else next(word for word, name in KINDS.items() if name == scheme.weights.format.name)
    threshold = scheme.inputs.outliers if scheme.inputs is not None else THRESHOLD
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": not eight,
        "load_in_8bit": eight,
        "llm_int8_threshold": threshold or 0.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_skip_modules": sorted(set(kept)),
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": any(isinstance(p.scheme.weights.scale, Scheme) for p in placed),
        "bnb_4bit_compute_dtype": facts.dtype if facts.dtype in ("float32", "float16", "bfloat16") else "float32",
        "bnb_4bit_quant_storage": "uint8",
    }
