"""One layer as HQQ stores it.

Owns: `refuse`, `specs`, `write`, `read_layer` and `granularity_of`. A weight (m outputs, n inputs) is flattened and folded to (m·n/g, g), with a
scale for each row (axis 1), or to (g, m·n/g) with one for each column (axis 0):

    P.W_q     uint8, int32 of 3 bits   rows of that matrix in as many parts as a word has codes, the first part in the highest bits
    P.scale   float (m·n/g, 1) or (1, m·n/g)
    P.zero    the same shape   a zero point that is any number: x = (code − zero) · scale

and what `facts` owns. Read as scale · code + offset, with the float32 offset −zero · scale, which is exact while both have 16 bits; zero points
that the package rounded (`round_zero`) and that are codes are read as such. Codes of 1.58 bits and of one are read as uint2. Groups that are no part of a row, no rows and no column
have a scale for every number here, and are not written again: that is axis 0 but for groups of whole columns.

Source: hqq 0.2.8, `core/quantize.py` and `core/bitpack.py`; Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.checks import checked
from arrondi.checkpoint.layouts.hqq.facts import Facts, usual
from arrondi.checkpoint.layouts.layout import LayerValues, Placed, Reader
from arrondi.errors import FileFormatError
from arrondi.formats import FORMATS, Granularity, PerChannel, PerGroup, PerRun, scale_shape
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import STORED

_APART: Final = PerGroup(1)
"""A scale for every number."""
_FORMATS: Final = tuple(FORMATS[f"uint{b}"] for b in (2, 3, 4, 5, 6, 8))


def refuse(placed: Placed) -> str | None:
    """Why a layer cannot be stored, as the end of a sentence; None if it can."""
    scheme, weights = placed.scheme, placed.scheme.weights
    if placed.kind != "Linear" or len(placed.shape) != 2 or placed.transposed or not placed.name.endswith(".weight"):
        return f"hqq stores the weights of linear layers, and this is of kind {placed.kind} and shape {placed.shape}"
    if (scheme.inputs, scheme.outputs, scheme.kv) != (None, None, None) or placed.indexed or weights.apart is not None:
        return "hqq rounds weights alone, without scattered groups, and keeps nothing apart"
    if weights.format not in _FORMATS or weights.zero_point == "none":
        return f"hqq stores unsigned integers of 2, 3, 4, 5, 6 or 8 bits with zero points or offsets, not {weights}"
    if weights.scale not in STORED or weights.scale == "e8m0" or weights.offset != "float32":
        return f"hqq has scales of 16 or 32 bits, and offsets that follow from zero points, not {weights}"
    if weights.granularity == _APART and placed.storage:
        return "groups of hqq that are no part of a row are read, and not written"
    if not isinstance(weights.granularity, PerGroup) and weights.granularity != PerChannel():
        return f"hqq has groups of inputs or of outputs here, not {weights}"
    rows, columns = placed.matrix_shape
    size = _group(placed)
    if columns % size:
        return f"hqq has no shorter last group: {size} does not divide {columns}"
    facts = facts_of(placed)
    if facts.nbits != 3 and rows * columns // size % facts.packing[1]:
        return f"hqq packs {facts.packing[1]} groups into one, and {rows * columns // size} of {size} numbers are no multiple"
    return None


def _group(placed: Placed) -> int:
    granularity = placed.scheme.weights.granularity
    return granularity.size if isinstance(granularity, PerGroup) else placed.matrix_shape[1]


def facts_of(placed: Placed) -> Facts:
    """The metadata of a layer, read or to be written."""
    if placed.storage:
        return Facts.of_text(placed.storage.partition("|")[2])
    weights = placed.scheme.weights
    return usual(weights.format.bits, _group(placed), str(weights.scale), weights.zero_point == "integer")


def granularity_of(facts: Facts, shape: tuple[int, int], channel: bool) -> Granularity:
    """Which numbers share a scale; `channel`: groups of a whole row are called so."""
    (rows, columns), size = shape, facts.group_size
    if facts.axis == 0:
        return PerChannel(1) if size == rows else _APART
    if columns % size == 0:
        return PerChannel() if size == columns and channel else PerGroup(size)
    return PerRun(size) if size % columns == 0 else _APART


def _folded(facts: Facts, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape of the matrix whose rows or columns are groups."""
    other = shape[0] * shape[1] // facts.group_size
    return (other, facts.group_size) if facts.axis == 1 else (facts.group_size, other)


def specs(placed: Placed) -> list[TensorSpec]:
    """The tensors that a layer becomes."""
    path, facts = placed.name.removesuffix(".weight"), facts_of(placed)
    rows, columns = _folded(facts, placed.matrix_shape)
    words, width, kind = -(-rows // facts.packing[1]), columns, facts.word
    if facts.view_as_float:
        kind = getattr(torch, str(facts.compute_dtype).removeprefix("torch."))
        width = columns * facts.word.itemsize // kind.itemsize
    grid = (rows, 1) if facts.axis == 1 else (1, columns)
    scale = STORED[str(placed.scheme.weights.scale)]
    zero = STORED[placed.storage.partition("|")[0]] if placed.storage else scale
    beside = facts.tensors(placed.matrix_shape).items()
    return [
        (f"{path}.W_q", kind, (words, width)),
        (f"{path}.scale", scale, grid),
        (f"{path}.zero", zero, grid),
        *((f"{path}.{name}", part.dtype, tuple(part.shape)) for name, part in beside),
    ]


def write(placed: Placed, values: LayerValues) -> dict[str, torch.Tensor]:
    """Those tensors with their numbers. An offset becomes the nearest zero point of the type that is stored."""
    path, facts, q = placed.name.removesuffix(".weight"), facts_of(placed), values.weight
    kinds = {name: (kind, shape) for name, kind, shape in specs(placed)}
    scale, zero = _scale_and_zero(q)
    grid = {f"{path}.scale": scale, f"{path}.zero": zero}
    (kind, shape), folded = kinds[f"{path}.W_q"], q.codes.reshape(_folded(facts, placed.matrix_shape))
    packed = _packed(folded, facts).contiguous().view(kind).reshape(shape)
    parts = {name: part.to(kinds[name][0]).reshape(kinds[name][1]) for name, part in grid.items()}
    beside = facts.tensors(placed.matrix_shape).items()
    return {f"{path}.W_q": packed, **parts, **{f"{path}.{name}": part for name, part in beside}}


def read_layer(placed: Placed, read: Reader) -> LayerValues:
    """The numbers of a layer, checked."""
    path, facts, scheme = placed.name.removesuffix(".weight"), facts_of(placed), placed.scheme.weights
    shape, folded = placed.matrix_shape, _folded(facts, placed.matrix_shape)
    words = read(f"{path}.W_q").contiguous().view(facts.word)
    codes = _unpacked(f"{path}.W_q", words, facts, folded[0]).reshape(shape)
    scale, zero = (read(f"{path}.{part}").float() for part in ("scale", "zero"))
    if not bool(torch.isfinite(zero).all()):
        raise FileFormatError(f"{path}.zero is NaN or infinite. The file is damaged.")
    if scheme.granularity == _APART:
        scale, zero = (part.expand(folded).reshape(shape) for part in (scale, zero))
    wanted = scale_shape(scheme.granularity, shape)
    scale, zero = scale.reshape(wanted).contiguous(), zero.reshape(wanted)
    if scheme.zero_point == "integer":
        return LayerValues(checked(placed.name, QTensor(codes, scale, zero.int(), None, scheme)))
    return LayerValues(checked(placed.name, QTensor(codes, scale, None, -zero * scale, scheme)))


def _scale_and_zero(q: QTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is stored of a grid; where a scale is 0, the zero point is too."""
    scale = q.real_scale
    if q.offset is None:
        assert q.zero_point is not None
        return scale, q.zero_point
    offset = q.real_offset
    assert offset is not None
    return scale, -offset.double() / torch.where(scale == 0, 1, scale).double()


def _packed(codes: torch.Tensor, facts: Facts) -> torch.Tensor:
    """(rows, columns) codes → words, by parts of the rows; of three bits with rows of zeros at the end."""
    _, count, bits = facts.packing
    short = -len(codes) % count
    parts = torch.nn.functional.pad(codes.to(facts.word), (0, 0, 0, short)).unflatten(0, (count, -1))
    words = torch.zeros_like(parts[0])
    for i, part in enumerate(parts):
        words |= part << (count - 1 - i) * bits
    return words


def _unpacked(name: str, words: torch.Tensor, facts: Facts, rows: int) -> torch.Tensor:
    """The inverse: (rows, columns) uint8."""
    _, count, bits = facts.packing
    codes = torch.empty((count, *words.shape), dtype=torch.uint8)
    for i in range(count):
        codes[i] = words >> (count - 1 - i) * bits & (1 << bits) - 1
    codes = codes.flatten(0, 1)
    beyond = facts.word == torch.int32 and bool((words >> count * bits).any())
    if beyond or bool(codes[rows:].any()):
        raise FileFormatError(f"{name}: there are bits beyond its {rows} rows. The file is damaged.")
    return codes[:rows]


def as_read(facts: Facts, zero: str) -> str:
    """`Placed.storage` of a layer whose zero points have this type."""
    return f"{zero}|{facts.text()}"


def as_written(placed: Placed) -> Placed:
    """The same layer, without a word of `storage` where it is what would be written anyway."""
    plain = replace(placed, storage="")
    if refuse(plain) is not None:
        return placed
    same = facts_of(plain) == facts_of(placed) and placed.storage.partition("|")[0] == placed.scheme.weights.scale
    return plain if same else placed
