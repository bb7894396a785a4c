"""Who reads what is written, and who is known to compute something else: consumer × layout × scheme.

Owns: `readers_of`, which `plan`, `quantize` and the report print. What is said of transformers 5.23 (with compressed-tensors 0.20) is
tested in `tests/checkpoint/test_readers.py` and `tests/contract` on small models; what is said of vLLM and SGLang is read in their sources and not run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from arrondi.checkpoint.layouts.compressed_tensors.config import is_expert, must_dequantize, one_scheme_each
from arrondi.checkpoint.layouts.compressed_tensors.layer import storage_name
from arrondi.checkpoint.layouts.compressed_tensors.transposed import stored_form
from arrondi.checkpoint.layouts.layout import Layout, ModelFacts, Placed
from arrondi.checkpoint.other_readers import others_of
from arrondi.checkpoint.verdict import TRANSFORMERS, Verdict
from arrondi.formats import FORMATS, ActivationScheme, PerBlock, PerChannel, PerGroup, PerTensor, PerToken

_SIXTEEN: Final = ("bfloat16", "float16")
_FP4_FORMATS: Final = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized")


def readers_of(placed: list[Placed], layout: Layout, facts: ModelFacts = ModelFacts()) -> list[Verdict]:
    """What every known reader does with these layers in this layout."""
    if layout.name != "compressed-tensors":
        return [_arrondi(placed), *others_of(layout.name, placed, facts)]
    return [_arrondi(placed), _transformers(placed, facts), *(_runtime(name, placed) for name in _KERNELS)]


def _arrondi(placed: list[Placed]) -> Verdict:
    if any(p.scheme.outputs is not None or p.scheme.kv is not None for p in placed):
        return Verdict(
            "arrondi",
            False,
            "arrondi stores how outputs and the key/value cache are rounded, but does not round them when it runs.",
        )
    return Verdict("arrondi", True, "arrondi reads it.")


# ── transformers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _transformers(placed: list[Placed], facts: ModelFacts) -> Verdict:
    refusals = [s for rule in _REFUSALS if (s := rule(placed, facts))]
    if refusals:
        return Verdict(TRANSFORMERS, False, " ".join(refusals))
    remarks = [s for rule in _REMARKS if (s := rule(placed, facts))]
    return Verdict(TRANSFORMERS, True, " ".join([f"{TRANSFORMERS} loads it.", *remarks]))


def dequantized_by_transformers(placed: list[Placed], facts: ModelFacts) -> bool:
    """Whether the config asks transformers to turn all weights back while it loads them."""
    return (facts.whole or any(map(must_dequantize, placed))) and one_scheme_each(placed)


def needs_bfloat16(placed: list[Placed], facts: ModelFacts) -> bool:
    """Whether transformers runs these layers in bfloat16 only."""
    return bool(_nvfp4_inputs(placed, facts) or _small_floats_with_inputs(placed, facts))


def rounds_weights_again(placed: list[Placed], facts: ModelFacts) -> bool:
    """Whether transformers rounds some of these weights to 16 bits once more, in a float32 model, too."""
    return bool(_rounded_again(placed, facts) or _experts_in_bfloat16(placed, facts))


def _unread_experts(placed: list[Placed], facts: ModelFacts) -> str | None:
    wrong = sorted({str(p.scheme.weights) for p in placed if is_expert(p.path) and not _reads_expert(p)})
    if not wrong:
        return None
    return f"{TRANSFORMERS} cannot read experts stored as {', '.join(wrong)} (it fails, or computes with wrong numbers); arrondi can."


def _reads_expert(placed: Placed) -> bool:
    """Whether transformers decodes fused experts of this kind to the right numbers."""
    weights, format = placed.scheme.weights, storage_name(stored_form(placed))
    if format == "float-quantized":
        return isinstance(weights.granularity, PerChannel | PerTensor)
    return format == "mxfp4-pack-quantized" or (format == "pack-quantized" and weights.symmetric)


def _mixed_experts(placed: list[Placed], facts: ModelFacts) -> str | None:
    if len({p.scheme for p in placed if is_expert(p.path)}) <= 1:
        return None
    return f"{TRANSFORMERS} reads all experts by one scheme, and these have several; arrondi reads each by its own."


def _mixed_dequantized(placed: list[Placed], facts: ModelFacts) -> str | None:
    if one_scheme_each(placed) or not (facts.whole or any(map(must_dequantize, placed))):
        return None
    return f"{TRANSFORMERS} cannot read this mix of schemes; arrondi can."


def _split_plain(placed: list[Placed], facts: ModelFacts) -> str | None:
    if not facts.split_plain or dequantized_by_transformers(placed, facts):
        return None
    return f"{TRANSFORMERS} cannot load this model while tensors that it splits stay as they are: it looks for their scales; arrondi can."


def _split_dequantized(placed: list[Placed], facts: ModelFacts) -> str | None:
    if not facts.splits or not dequantized_by_transformers(placed, facts):
        return None
    return f"{TRANSFORMERS} cannot load this model quantized: it splits stored tensors and would have to turn them back as well; arrondi can."


def _joined_plain(placed: list[Placed], facts: ModelFacts) -> str | None:
    if facts.parted:
        return f"{TRANSFORMERS} cannot join weights (experts of a layer) of which some are quantized and some are not; arrondi can."
    if not facts.plain or all(storage_name(stored_form(p)) == "float-quantized" for p in placed):
        return None
    return f"{TRANSFORMERS} takes all weights that it joins (experts, convolutions) for quantized, and some are not; arrondi tells them apart."


def _joined_packed(placed: list[Placed], facts: ModelFacts) -> str | None:
    joined = [p for p in placed if p.path in facts.joined and not _can_be_joined(p)]
    if not joined:
        return None
    return f"{TRANSFORMERS} makes one weight of several stored ones ({joined[0].path} among them), and cannot do so with {joined[0].scheme}; arrondi can."


def _can_be_joined(placed: Placed) -> bool:
    """Whether the tensors of two such layers, one after another, are those of the joined layer."""
    plain = storage_name(stored_form(placed)) in ("float-quantized", "int-quantized")
    return plain and isinstance(placed.scheme.weights.granularity, PerChannel) and not _static(placed)


def _static(placed: Placed) -> bool:
    return placed.scheme.inputs is not None and placed.scheme.inputs.dynamic is not True


def _inputs_left(placed: list[Placed], facts: ModelFacts) -> str | None:
    if not dequantized_by_transformers(placed, facts) or not any(p.scheme.inputs for p in placed):
        return None
    which = "Conv1D layers" if any(p.kind == "Conv1D" for p in placed) else "this model's layers"
    return f"{TRANSFORMERS} leaves the inputs of {which} unrounded; arrondi rounds them."


def _one_scale_for_several_rows(placed: list[Placed], facts: ModelFacts) -> str | None:
    if dequantized_by_transformers(placed, facts):
        return None
    found = sorted(p.path for p in placed if p.path in facts.reshaped and _by_token(p.scheme.inputs))
    if not found:
        return None
    return (
        f"{TRANSFORMERS} gives several rows of the inputs of some layers ({len(found)}, {found[0]} among them) one scale, because this "
        "model does not pass them as (windows, tokens, columns); arrondi gives every row its own."
    )


def _by_token(inputs: ActivationScheme | None) -> bool:
    return inputs is not None and inputs.dynamic is True and isinstance(inputs.scheme.granularity, PerToken)


def _mx_inputs(placed: list[Placed], facts: ModelFacts) -> str | None:
    if not any(p.scheme.inputs is not None and p.scheme.inputs.scheme.scale == "e8m0" for p in placed):
        return None
    return (
        f"{TRANSFORMERS} finds the power-of-two scales of MX inputs by another rule (to the nearest, where the standard takes the one "
        "below), so its outputs differ from those of arrondi, and it runs them in bfloat16 only: load with dtype=bfloat16."
    )


def _nvfp4_inputs(placed: list[Placed], facts: ModelFacts) -> str | None:
    if not any(p.scheme.inputs is not None and p.scheme.inputs.dynamic == "local" for p in placed):
        return None
    return "It runs NVFP4 with rounded inputs in bfloat16 only: load with dtype=bfloat16."


def _small_floats_with_inputs(placed: list[Placed], facts: ModelFacts) -> str | None:
    odd = [p for p in placed if p.scheme.inputs is not None and storage_name(stored_form(p)) in _FP4_FORMATS]
    if not odd or _nvfp4_inputs(placed, facts):
        return None
    return "It runs these weights with rounded inputs in bfloat16 only: load with dtype=bfloat16."


def _rounded_again(placed: list[Placed], facts: ModelFacts) -> str | None:
    dense = [p for p in placed if not is_expert(p.path)]
    again = any(
        p.scheme.weights.scale in _SIXTEEN or storage_name(stored_form(p)) == "nvfp4-pack-quantized" for p in dense
    )
    if not again or not dequantized_by_transformers(placed, facts):
        return None
    return "It turns the weights back in 16 bits, which rounds each of them once more, by up to 0.2 %, also in a float32 model."


def _experts_in_bfloat16(placed: list[Placed], facts: ModelFacts) -> str | None:
    experts = [p for p in placed if is_expert(p.path)]
    if not any(
        p.scheme.weights.scale in _SIXTEEN or storage_name(stored_form(p)) == "mxfp4-pack-quantized" for p in experts
    ):
        return None
    if all(storage_name(stored_form(p)) == "float-quantized" for p in experts):
        return None
    return "It keeps fused experts in 16 bits, whatever the type of the model."


def _next_code(placed: list[Placed], facts: ModelFacts) -> str | None:
    if all(p.scheme.inputs is None for p in placed):
        return None
    return (
        "It rounds inputs by the same rule, but the last bit of a sum can move an input to its next code: "
        "logits may differ by as much as the rounding of inputs itself costs."
    )


def _default_type(placed: list[Placed], facts: ModelFacts) -> str | None:
    if facts.dtype == "float32":
        return None
    return f"By default it computes in {facts.dtype}, arrondi.load in float32."


_Rule = Callable[[list[Placed], ModelFacts], str | None]
_REFUSALS: Final[tuple[_Rule, ...]] = (
    _unread_experts, _mixed_experts, _mixed_dequantized, _split_plain, _split_dequantized, _joined_plain, _joined_packed, _inputs_left,
    _one_scale_for_several_rows, _mx_inputs,
)  # fmt: skip
_REMARKS: Final[tuple[_Rule, ...]] = (
    _nvfp4_inputs, _small_floats_with_inputs, _rounded_again, _experts_in_bfloat16,
    _next_code, _default_type,
)  # fmt: skip


# ── vLLM and SGLang, by their sources ─────────────────────────────────────────────────────────────────────────────────


def _runtime(name: str, placed: list[Placed]) -> Verdict:
    takes = _KERNELS[name]
    without = sorted({str(p.scheme) for p in placed if p.kind == "Conv1D" or not any(kernel(p) for kernel in takes)})
    if without:
        return Verdict(name, False, f"{name} has no kernel for {', '.join(without)}, by its source.")
    return Verdict(name, True, f"{name} has kernels for it, by its source; not run here.")


def _inputs_are(placed: Placed, format: str, *granularities: type, dynamic: tuple[object, ...] = (True,)) -> bool:
    inputs: ActivationScheme | None = placed.scheme.inputs
    if inputs is None or inputs.scheme.format != FORMATS[format]:
        return False
    return isinstance(inputs.scheme.granularity, granularities) and inputs.dynamic in dynamic


def _packed_weights(p: Placed) -> bool:
    w = p.scheme.weights
    sized = isinstance(w.granularity, PerGroup | PerChannel)
    return (
        p.scheme.inputs is None
        and storage_name(stored_form(p)) == "pack-quantized"
        and w.format.bits in (4, 8)
        and sized
    )


def _symmetric_packed(p: Placed) -> bool:
    return _packed_weights(p) and p.scheme.weights.symmetric


def _int8(p: Placed) -> bool:
    w = p.scheme.weights
    rows = w.format.bits == 8 and w.symmetric and isinstance(w.granularity, PerChannel | PerTensor)
    static = _inputs_are(p, "int8", PerTensor, dynamic=(False,))
    return rows and storage_name(stored_form(p)) == "int-quantized" and (static or _inputs_are(p, "int8", PerToken))


def _fp8(p: Placed) -> bool:
    w = p.scheme.weights
    if storage_name(stored_form(p)) != "float-quantized" or not isinstance(w.granularity, PerChannel | PerTensor):
        return False
    return p.scheme.inputs is None or _inputs_are(p, "fp8_e4m3", PerTensor, PerToken, dynamic=(True, False))


def _fp8_blocks(p: Placed) -> bool:
    blocks = p.scheme.weights.granularity == PerBlock(128, 128) and storage_name(stored_form(p)) == "float-quantized"
    return blocks and _inputs_are(p, "fp8_e4m3", PerGroup)


def _nvfp4(p: Placed) -> bool:
    return storage_name(stored_form(p)) == "nvfp4-pack-quantized" and (
        p.scheme.inputs is None or p.scheme.inputs.dynamic == "local"
    )


def _w4afp8(p: Placed) -> bool:
    w = p.scheme.weights
    packed = storage_name(stored_form(p)) == "pack-quantized" and w.format.bits == 4 and w.symmetric
    return packed and w.granularity == PerGroup(128) and _inputs_are(p, "fp8_e4m3", PerToken)


_KERNELS: Final[dict[str, tuple[Callable[[Placed], bool], ...]]] = {
    "vLLM": (_packed_weights, _int8, _fp8, _fp8_blocks, _nvfp4, _w4afp8),
    "SGLang": (_symmetric_packed, _int8, _fp8, _fp8_blocks, _nvfp4),
}
