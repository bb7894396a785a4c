"""What runtimes do with the layouts of other tools: a table of rules for each layout.

Owns: `others_of`. What is said of transformers (5.24, with optimum 2.3, gptqmodel 7.7, bitsandbytes 0.50 and accelerate) is tested in
`tests/checkpoint/layouts/test_other_tools.py`; what is said of vLLM and SGLang is read in their sources and not run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from arrondi.checkpoint.layouts.compressed_tensors.config import is_expert
from arrondi.checkpoint.layouts.gptq.config import block_of
from arrondi.checkpoint.layouts.layout import ModelFacts, Placed
from arrondi.checkpoint.verdict import TRANSFORMERS, Verdict
from arrondi.formats import PerBlock

Rule = Callable[[list[Placed], ModelFacts], str | None]


@dataclass(frozen=True)
class Readers:
    """Who reads a layout.

    Attributes:
        packages: what transformers needs besides; none where it does not read the layout.
        refusals: why transformers cannot load some layers, as sentences.
        remarks: what to know where it can.
        gpus: vLLM and SGLang read the layout, if it is one scheme for all layers.
    """

    packages: tuple[str, ...]
    refusals: tuple[Rule, ...] = ()
    remarks: tuple[Rule, ...] = ()
    gpus: bool = True


def others_of(layout: str, placed: list[Placed], facts: ModelFacts) -> list[Verdict]:
    """What transformers, vLLM and SGLang do with these layers in the layout of another tool."""
    if layout == "gguf":
        return [
            Verdict("llama.cpp", True, "llama.cpp runs it; it rounds inputs to 8 bits as it multiplies, so its logits differ by some tenths of a percent."),
            Verdict(TRANSFORMERS, True, f"{TRANSFORMERS} loads the file with gguf_file=, dequantized; not every architecture as its config was."),
        ]  # fmt: skip
    if layout == "exl3":
        return [
            Verdict("ExLlamaV3", True, "ExLlamaV3 runs it on GPUs, by its source; not run here. GPTQModel's decoder gives the same weights."),
            Verdict(TRANSFORMERS, False, f"{TRANSFORMERS} does not read this layout."),
        ]  # fmt: skip
    if layout in _OF_GRAPHS:
        return [Verdict(*row) for row in _OF_GRAPHS[layout]]
    if layout == "modelopt":
        return [
            Verdict(TRANSFORMERS, False, f"{TRANSFORMERS} does not read this layout."),
            *(Verdict(name, True, f"{name} has a reader of this layout for GPUs, by its source; not run here.") for name in ("TensorRT-LLM", "vLLM", "SGLang")),
        ]  # fmt: skip
    if layout == "mlx":
        return [
            Verdict("mlx-lm", True, "mlx-lm reads it, where it knows the architecture; a Llama was run on a CPU."),
            Verdict(TRANSFORMERS, False, f"{TRANSFORMERS} does not read this layout."),
        ]  # fmt: skip
    known = _READERS.get(layout)
    if known is None:
        return [
            Verdict(TRANSFORMERS, False, "transformers, vLLM and SGLang do not read this layout; transformers only warns, and loads random weights."),
        ]  # fmt: skip
    return [_transformers(known, placed, facts), *(_of_gpus(name, known, placed) for name in ("vLLM", "SGLang"))]


def packages_for(layout: str) -> tuple[str, ...] | None:
    """The packages that transformers needs for a layout; None where it does not read it."""
    own = {"compressed-tensors": ("compressed-tensors",), "gguf": ("gguf", "accelerate")}
    known = _READERS.get(layout)
    return own.get(layout) if known is None else known.packages or None


def _transformers(known: Readers, placed: list[Placed], facts: ModelFacts) -> Verdict:
    refusals = [s for rule in known.refusals if (s := rule(placed, facts))]
    if not known.packages:
        refusals = [f"{TRANSFORMERS} does not read this layout."]
    if refusals:
        return Verdict(TRANSFORMERS, False, " ".join(refusals))
    remarks = [s for rule in known.remarks if (s := rule(placed, facts))]
    return Verdict(
        TRANSFORMERS, True, " ".join([f"{TRANSFORMERS} loads it with {' and '.join(known.packages)}.", *remarks])
    )


def _of_gpus(name: str, known: Readers, placed: list[Placed]) -> Verdict:
    if not known.gpus or len({p.scheme for p in placed}) > 1 or any(p.kind != "Linear" for p in placed):
        return Verdict(name, False, f"{name} is not known to read these layers in this layout.")
    return Verdict(name, True, f"{name} has a reader of this layout for GPUs, by its source; not run here.")


def _experts(placed: list[Placed], facts: ModelFacts) -> str | None:
    if not any(is_expert(p.path) for p in placed) and not facts.fused_experts:
        return None
    return f"{TRANSFORMERS} keeps the experts of a mixture in one parameter, and does not find them in this layout; arrondi does."


def _conv1d(placed: list[Placed], facts: ModelFacts) -> str | None:
    if all(p.kind != "Conv1D" for p in placed):
        return None
    return f"{TRANSFORMERS} cannot build this model's Conv1D layers in this layout; arrondi can."


def _several(placed: list[Placed], facts: ModelFacts) -> str | None:
    if len({p.scheme for p in placed}) <= 1:
        return None
    return f"{TRANSFORMERS} reads one scheme in this layout, and these layers have several; arrondi and gptqmodel read each by its own."


def _outside(placed: list[Placed], facts: ModelFacts) -> str | None:
    block = block_of(placed)
    outside = [p for p in placed if not block or not p.path.startswith(f"{block}.")]
    if not outside:
        return None
    return f"{TRANSFORMERS} reads packed layers of one list of blocks only, and {outside[0].path} lies outside; arrondi reads it."


def _sixteen(placed: list[Placed], facts: ModelFacts) -> str | None:
    return "It multiplies in 16 bits."


def _four_on_cpu(placed: list[Placed], facts: ModelFacts) -> str | None:
    if any(p.scheme.weights.format.kind == "integer" for p in placed):
        return "It rounds inputs to float16 first, and the last bit of a sum can move an input to its next code."
    return "On CPUs with products in bfloat16 it multiplies in that type, in whatever type the model is loaded."


def _fp8_inputs(placed: list[Placed], facts: ModelFacts) -> str | None:
    return (
        f"{TRANSFORMERS} turns the weights back, exactly, where there is no GPU for FP8, and leaves inputs unrounded; with one it rounds them "
        "(not run here). arrondi rounds them."
    )


def _fp8_ragged(placed: list[Placed], facts: ModelFacts) -> str | None:
    for p in placed:
        blocks = p.scheme.weights.granularity
        sizes = (blocks.rows, blocks.columns) if isinstance(blocks, PerBlock) else (1, 1)
        if any(n > size and n % size for n, size in zip(p.matrix_shape, sizes, strict=True)):
            return f"{TRANSFORMERS} takes the blocks of {p.path} for smaller ones, because {sizes[0]} × {sizes[1]} does not divide {p.matrix_shape}."
    return None


def _turned_back(placed: list[Placed], facts: ModelFacts) -> str | None:
    return "Without its kernels for GPUs it turns the weights back, exactly."


def _fp8_by_gpus(placed: list[Placed], facts: ModelFacts) -> str | None:
    if all(p.scheme.inputs is None or p.scheme.weights.format.kind == "integer" for p in placed):
        return None
    return (
        f"{TRANSFORMERS} multiplies FP8 inputs of torchao on a GPU only (not run here); arrondi rounds them anywhere."
    )


def _rounds_by_torchao(placed: list[Placed], facts: ModelFacts) -> str | None:
    if all(p.scheme.inputs is None for p in placed):
        return None
    return "It takes 1/127.5 of the largest input for the step of symmetric int8 (arrondi 1/127), so its logits differ by as much as rounding inputs costs."


def _whole(placed: list[Placed], facts: ModelFacts) -> str | None:
    if not facts.whole:
        return None
    return (
        f"{TRANSFORMERS} can build this model's class only around whole weights, not around packed ones; arrondi can."
    )


_OF_GRAPHS: Final[Mapping[str, tuple[tuple[str, bool, str], ...]]] = MappingProxyType({
    "onnx": (("ONNX Runtime", True, "ONNX Runtime runs it, and multiplies by these numbers with floats; with accuracy_level 4 it rounds inputs to 8 bits."),),
    "onnx-qdq": (("ONNX Runtime", True, "ONNX Runtime and whatever else runs ONNX's own operators runs it; ONNX Runtime rounds inputs to 8 bits unless session.qdq_matmulnbits_accuracy_level is 1."),),
})  # fmt: skip
"""Layout of graphs → reader, whether it reads, and what to know."""

_READERS: Final[Mapping[str, Readers]] = MappingProxyType({
    "gptq": Readers(("optimum", "gptqmodel"), (_experts, _conv1d, _several, _outside, _whole), (_sixteen,)),
    "awq": Readers(("gptqmodel",), (_experts, _whole), (_sixteen,)),
    "auto-round": Readers(("auto-round",), (_experts, _conv1d, _whole), (_sixteen,)),
    "fp8": Readers(("accelerate",), (_fp8_ragged, _fp8_inputs)),
    "mxfp4": Readers(("accelerate",), (), (_turned_back,)),
    "bitsandbytes": Readers(("bitsandbytes",), (_experts, _whole), (_four_on_cpu,)),
    "hqq": Readers((), gpus=False),
    "torchao": Readers(("torchao",), (_experts, _whole, _fp8_by_gpus), (_rounds_by_torchao,), gpus=False),
})  # fmt: skip
