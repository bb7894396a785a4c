"""How far a consumer may be from what the files mean, and why: `Expected`.

What a consumer rounds moves a model's outputs by an amount that depends on the model, so that amount is computed for this model and this prompt, and the
bound is a multiple of it. Two independent roundings of one kind lie √2 times as far from each other as one lies from the exact numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from arrondi.checkpoint import ModelFacts, Placed
from arrondi.checkpoint.readers import needs_bfloat16, rounds_weights_again
from arrondi.verification.predict import Rounds, Stored
from arrondi.verification.roundings import Rounding, bfloat, blocks_of_32, blocks_of_256, half, last_bits

FLOAT_SUMS: Final = 1e-4
"""Relative difference that float32 sums in another order, and other exponentials, leave in a few dozen layers."""


@dataclass(frozen=True)
class Expected:
    """What is expected of a consumer.

    Attributes:
        rounds: how a product with a stored weight rounds what it reads and gives.
        times: how many times what that costs the consumer may be off the nearer of two predictions, with it and without.
        least: what is always allowed, relative.
        reason: why, as a sentence.
        dtype: in which the model is loaded there.
    """

    rounds: Rounds
    times: float
    least: float
    reason: str
    dtype: str = "float32"


_WIDE: Final = frozenset(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ1_0", "TQ2_0", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M"))  # fmt: skip
"""Types whose products round inputs in blocks of 256."""
_OWN: Final[Mapping[str, Rounding]] = MappingProxyType({"F32": Rounding(), "F16": Rounding(half), "BF16": Rounding(bfloat)})  # fmt: skip
_NONE: Final = Rounding()


def _as_ggml_does(stored: Stored) -> Rounding:
    found = _OWN.get(stored.dtype)
    return found or Rounding(blocks_of_256 if stored.dtype in _WIDE else blocks_of_32)


LLAMA_CPP: Final = Expected(
    _as_ggml_does,
    1.5,
    1e-3,
    "llama.cpp rounds the inputs of products with quantized weights to 8 bits, in blocks of 32 or 256, and nothing turns that off; a file "
    "without quantized weights is computed in floats. Keys and values were float32 here, its default of float16 adds about as much again",
)


def _packed(how: Rounding) -> Rounds:
    return lambda stored: _NONE if stored.placed is None else how


_EXACT: Final = Expected(
    lambda stored: _NONE, 0.0, FLOAT_SUMS, "Transformers computes in float32 with the weights that the files mean"
)
_SIXTEEN: Final = Expected(
    _packed(Rounding(half, half)), 4.0, FLOAT_SUMS, "Its kernels for packed weights multiply in float16"
)
_BITSANDBYTES: Final = Expected(
    _packed(Rounding(bfloat, bfloat)), 3.0, FLOAT_SUMS, "Bitsandbytes multiplies in bfloat16, or float16, whatever the model's type"
)  # fmt: skip
_BITSANDBYTES_INT8: Final = Expected(
    _packed(Rounding(half, half)), 2.0, FLOAT_SUMS, "Bitsandbytes rounds inputs to float16 before it rounds them to 8 bits, which moves some to their next code"
)  # fmt: skip
_BFLOAT16: Final = Expected(
    lambda stored: Rounding(bfloat, bfloat), 3.0, FLOAT_SUMS, "Transformers runs these layers in bfloat16 only", "bfloat16"
)  # fmt: skip
_AGAIN: Final = Expected(
    _packed(Rounding(bfloat)), 3.0, FLOAT_SUMS, "Transformers turns these weights back in 16 bits, which rounds them once more"
)  # fmt: skip
_NEXT_CODE: Final = Expected(
    _packed(Rounding(last_bits)), 2.0, FLOAT_SUMS, "Inputs are rounded by the same rule, but the last bit of a sum can move one to its next code"
)  # fmt: skip
_TORCHAO: Final = replace(
    _NEXT_CODE,
    reason="Torchao takes 1/127.5 of the largest input for the step of int8, where others take 1/127, so that inputs get other codes",
)


def of_transformers(layout: str | None, placed: list[Placed], facts: ModelFacts) -> Expected:
    """What transformers computes from a layout."""
    if layout in ("gptq", "awq", "auto-round"):
        return _SIXTEEN
    if layout == "bitsandbytes":
        return _BITSANDBYTES_INT8 if any(p.scheme.inputs for p in placed) else _BITSANDBYTES
    if layout == "torchao" and any(p.scheme.inputs for p in placed):
        return _TORCHAO
    if layout != "compressed-tensors":
        return _EXACT
    if needs_bfloat16(placed, facts):
        return _BFLOAT16
    if rounds_weights_again(placed, facts):
        return _AGAIN
    return _NEXT_CODE if any(p.scheme.inputs for p in placed) else _EXACT


_TIES: Final = "Values are rounded by the same rule, but a sum's last bits can move one to its next code"
OF_NETWORKS: Final[Mapping[str, Expected]] = MappingProxyType({
    "onnxruntime": Expected(
        lambda stored: _NONE, 1.5, FLOAT_SUMS,
        f"{_TIES}. Products with weights of 4 bits were told to leave their inputs alone (session.qdq_matmulnbits_accuracy_level=1); by default they round "
        "them to 8 bits, which costs about half a percent",
    ),
    "openvino": Expected(
        lambda stored: _NONE, 2.0, FLOAT_SUMS,
        f"{_TIES}, and OpenVINO joins operators and rounds between them in ways of its own. It was told to compute in float32 and to leave inputs alone "
        "(INFERENCE_PRECISION_HINT=f32, DYNAMIC_QUANTIZATION_GROUP_SIZE=0)",
    ),
})  # fmt: skip
"""Consumer of ONNX files → what is expected of it."""
