"""One layer as GPTQ stores it.

Owns: `refuse`, `specs`, `write` and `read_layer`. Of a weight P.weight (m outputs, n inputs, G groups, b bits):

    P.qweight   int32 (n·b/32, m)   codes + 2^(b-1), a bit stream down each column, the first input in the lowest bits
    P.qzeros    int32 (G, m·b/32)   zero points + 2^(b-1), a bit stream along each row; of checkpoint_format gptq (version 1) less one
    P.scales    float16 (G, m)
    P.g_idx     int32 (n,)          the group of each input

`Placed.storage` says which convention of zero points a file has; "" is version 1 for symmetric schemes and version 2 for others, because
version 1 has no safe word for the zero point 0. Version 1 is read as GPTQModel reads it: one is added to every code of a word at once, so
that what its own writer took from a neighbour comes back.

Source: gptqmodel 7.7, `nn_modules/qlinear/__init__.py` and `utils/model.py`.
"""

from __future__ import annotations

from typing import Final

import torch

from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.checks import checked
from arrondi.checkpoint.layouts.integers import WIDTHS, refuse_all_but, symmetric_or_not
from arrondi.checkpoint.layouts.layout import LayerValues, Placed, Reader
from arrondi.checkpoint.layouts.words import BYTES, pack_across, pack_down, unpack_across, unpack_down, words
from arrondi.errors import FileFormatError
from arrondi.formats import PerGroup, Scheme, scale_shape
from arrondi.tensor.ranges.grid import STORED
from arrondi.tensor.storage import load_scale

_WORD_BITS: Final = 8 * BYTES
_V1: Final = "gptq"
_V2: Final = "gptq_v2"


def is_v1(placed: Placed) -> bool:
    """Whether zero points are stored less one."""
    return (placed.storage or (_V1 if placed.scheme.weights.symmetric else _V2)) == _V1


def usual(scheme: Scheme, checkpoint_format: str) -> str:
    """The word of `Placed.storage` for layers of this scheme in a file of this format."""
    return "" if checkpoint_format == (_V1 if scheme.symmetric else _V2) else checkpoint_format


def refuse(placed: Placed) -> str | None:
    """Why a layer cannot be stored, as the end of a sentence; None if it can."""
    return refuse_all_but(placed, "gptq", WIDTHS, ("Linear", "Conv1D"))


def specs(placed: Placed, indexed: bool = True) -> list[TensorSpec]:
    """The tensors that a layer becomes; `indexed`: with the group of each input."""
    path, scheme, (rows, columns) = placed.name.removesuffix(".weight"), placed.scheme.weights, placed.matrix_shape
    groups, bits = scale_shape(scheme.granularity, (rows, columns))[1], scheme.format.bits
    found: list[TensorSpec] = [
        (f"{path}.qweight", torch.int32, (words(columns, bits), rows)),
        (f"{path}.qzeros", torch.int32, (groups, words(rows, bits))),
        (f"{path}.scales", STORED[str(scheme.scale)], (groups, rows)),
        (f"{path}.g_idx", torch.int32, (columns,)),
    ]
    return found if indexed else found[:-1]


def write(placed: Placed, values: LayerValues, indexed: bool = True) -> dict[str, torch.Tensor]:
    """Those tensors with their numbers."""
    path, q = placed.name.removesuffix(".weight"), values.weight
    bits, low = q.scheme.format.bits, q.scheme.format.qmin
    zero = torch.zeros_like(q.real_scale, dtype=torch.int32) if q.zero_point is None else q.zero_point
    tensors = {
        f"{path}.qweight": pack_down(q.codes, bits, low),
        f"{path}.qzeros": _store_zeros(zero - low, bits, is_v1(placed)),
        f"{path}.scales": q.real_scale.to(STORED[str(q.scheme.scale)]).T.contiguous(),
    }
    if indexed:
        index = plain_index(placed) if q.group_index is None else q.group_index.to(torch.int32)
        tensors[f"{path}.g_idx"] = index
    return tensors


def read_layer(placed: Placed, read: Reader, indexed: bool = True) -> LayerValues:
    """The numbers of a layer, checked."""
    path, scheme, (rows, columns) = placed.name.removesuffix(".weight"), placed.scheme.weights, placed.matrix_shape
    bits, low = scheme.format.bits, scheme.format.qmin
    codes = unpack_down(f"{path}.qweight", read(f"{path}.qweight"), bits, columns, low)
    zero = _zeros(f"{path}.qzeros", read(f"{path}.qzeros"), bits, rows, is_v1(placed)) + low
    index = read(f"{path}.g_idx") if indexed else plain_index(placed)
    if not placed.indexed and not torch.equal(index, plain_index(placed)):
        raise FileFormatError(f"{path}.g_idx: groups are scattered, which this file was not said to have.")
    scale = load_scale(read(f"{path}.scales").T.contiguous())
    return LayerValues(
        checked(placed.name, symmetric_or_not(path, codes, scale, zero, scheme, index if placed.indexed else None))
    )


def plain_index(placed: Placed) -> torch.Tensor:
    """The group of each column where groups follow each other."""
    columns, granularity = placed.matrix_shape[1], placed.scheme.weights.granularity
    size = granularity.size if isinstance(granularity, PerGroup) else columns
    return torch.arange(columns, dtype=torch.int32) // size


def _by_words(bits: int, rows: int) -> bool:
    """Whether version 1 is made of version 2, and back, by sums of whole words."""
    return bits in (2, 4, 8) and rows * bits % _WORD_BITS == 0


def _shifted(packed: torch.Tensor, bits: int, step: int) -> torch.Tensor:
    """Words with `step` added to each of their codes at once, carries and all."""
    ones = sum(1 << (bits * i) for i in range(_WORD_BITS // bits))
    return ((packed.long() + step * ones) % 2**_WORD_BITS).to(torch.uint32).view(torch.int32)


def _store_zeros(zero: torch.Tensor, bits: int, v1: bool) -> torch.Tensor:
    """Unsigned zero points (m, G) in their words (G, words)."""
    if not v1:
        return pack_across(zero.to(torch.uint8).T, bits)
    if _by_words(bits, len(zero)):
        return _shifted(pack_across(zero.to(torch.uint8).T, bits), bits, -1)
    return pack_across(((zero - 1) % 2**bits).to(torch.uint8).T, bits)


def _zeros(name: str, packed: torch.Tensor, bits: int, rows: int, v1: bool) -> torch.Tensor:
    """The inverse: zero points as unsigned codes, int32 (m, G)."""
    if not v1:
        return unpack_across(name, packed, bits, rows).T.int()
    if _by_words(bits, rows):
        return unpack_across(name, _shifted(packed, bits, 1), bits, rows).T.int()
    return (unpack_across(name, packed, bits, rows).T.int() + 1) % 2**bits
