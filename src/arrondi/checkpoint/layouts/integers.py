"""What the layouts of plain integers share: GPTQ's, AWQ's, and AutoRound's use of both.

Owns: `refuse_all_but` (integers of some widths, groups of inputs, float16 scales), `scheme_of` (three words of a config),
`symmetric_or_not` and `AUTOROUND`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import torch

from arrondi.checkpoint.layouts.layout import Placed
from arrondi.errors import FileFormatError
from arrondi.formats import FORMATS, PerChannel, PerGroup, Scheme
from arrondi.tensor.qtensor import QTensor

WIDTHS: Final = (2, 3, 4, 8)
"""Bits of a code that the field packs."""
_WORD: Final = 32
AUTOROUND: Final = (
    "autoround_version", "provider", "to_quant_block_names", "iters", "model_free", "amp", "batch_size", "dataset", "enable_minmax_tuning",
    "enable_norm_bias_tuning", "enable_quanted_input", "gradient_accumulate_steps", "low_gpu_mem_usage", "nsamples", "scale_dtype", "seqlen", "lr",
    "minmax_lr", "train_bs", "enable_alg_ext", "low_cpu_mem_usage", "not_use_best_mse", "dynamic_max_gap", "enable_deterministic_algorithms",
    "lr_scheduler", "disable_opt_rtn", "momentum", "sampler", "seed",
)  # fmt: skip
"""What AutoRound notes of how it found codes, in its own files and in those of GPTQ and AWQ that it writes."""


def refuse_all_but(
    placed: Placed, name: str, bits: Collection[int], kinds: Collection[str] = ("Linear",)
) -> str | None:
    """Why a layout that holds nothing but integers under float16 scales cannot hold a layer, as the end of a sentence.

    Args:
        placed: the layer.
        name: of the layout, for the sentence.
        bits: widths of codes that it packs.
        kinds: classes of layers that it holds.
    """
    scheme, weights = placed.scheme, placed.scheme.weights
    if placed.kind not in kinds or len(placed.shape) != 2 or not placed.name.endswith(".weight"):
        return f"{name} stores the weights of linear layers, and this is of kind {placed.kind} and shape {placed.shape}"
    if (scheme.inputs, scheme.outputs, scheme.kv) != (None, None, None):
        return f"{name} rounds weights alone, no inputs, outputs or caches"
    some = [FORMATS[f"int{b}"] for b in bits]
    if weights.format not in some or weights.zero_point == "float" or weights.apart is not None:
        return f"{name} stores {', '.join(map(str, some))} with or without zero points, not {weights}"
    if not isinstance(weights.granularity, PerGroup) and weights.granularity != PerChannel():
        return f"{name} has scales of groups of inputs or of outputs, not {weights}"
    if weights.scale != "float16":
        return f"{name} stores float16 scales, not {weights}"
    rows, columns = placed.matrix_shape
    if isinstance(weights.granularity, PerGroup) and columns % weights.granularity.size:
        return f"{name} has no shorter last group: {weights.granularity.size} does not divide {columns}"
    for what, count in (("inputs", columns), ("outputs", rows)):
        if count * weights.format.bits % _WORD:
            return f"{name} fills words of {_WORD} bits, and {count} {what} of {weights.format.bits} bits do not"
    return None


def scheme_of(bits: int, size: int, symmetric: bool) -> Scheme:
    """The scheme of integers in groups of `size` columns (-1: one group a row); the files say the type of its scales."""
    granularity = PerChannel() if size == -1 else PerGroup(size)
    return Scheme(FORMATS[f"int{bits}"], granularity, "none" if symmetric else "integer")


def said(scheme: Scheme) -> tuple[int, int, bool]:
    """The inverse: bits, size of groups, and whether there are no zero points."""
    size = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else -1
    return scheme.format.bits, size, scheme.symmetric


def symmetric_or_not(
    path: str,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    scheme: Scheme,
    index: torch.Tensor | None = None,
) -> QTensor:
    """A tensor with the stored zero points (m, G), or without if its scheme has none.

    Raises:
        FileFormatError: a symmetric scheme with zero points that are not the middle.
    """
    if scheme.zero_point == "integer":
        return QTensor(codes, scale, zero.contiguous(), None, scheme, index)
    if bool((zero != 0).any()):
        middle = -scheme.format.qmin
        found = int(zero[zero != 0][0]) + middle
        raise FileFormatError(
            f"{path}.qzeros: the config says that weights are symmetric, but a zero point is {found}, not {middle}. "
            "It does not describe this file, or not its convention of zero points."
        )
    return QTensor(codes, scale, None, None, scheme, index)
