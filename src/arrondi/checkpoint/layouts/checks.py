"""Whether stored numbers can be what their scheme says.

Owns: `checked` (codes, scales, zero points and offsets of a QTensor), `checked_grid` and `check_padding` (bits after the last
code of a row). A file that breaks one of them was not written by a quantizer; its numbers would be read in silence as
something else.
"""

from __future__ import annotations

import math

import torch

from arrondi.errors import FileFormatError
from arrondi.formats import Format
from arrondi.tensor.apart import wrong_numbers
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import Grid
from arrondi.tensor.tables import wrong_table
from arrondi.tensor.turned import wrong_sides


def checked(name: str, q: QTensor) -> QTensor:
    """The same tensor, if every number in it can be.

    Raises:
        FileFormatError: a code outside its format, a scale that is not finite or has a sign it cannot have, a zero point that
            is no code, a table that does not ascend, a place of what is kept apart that the tensor does not have.
    """
    _check_codes(name, q.codes, q.scheme.format)
    if isinstance(q.scale, QTensor):
        checked(f"{name}: scale", q.scale)
    _check_scale(f"{name}: scale", q.real_scale, q.scheme.signed_scales)
    if q.zero_point is not None:
        low, high = q.scheme.format.qmin, q.scheme.format.qmax
        if bool(((q.zero_point < low) | (q.zero_point > high)).any()):
            raise FileFormatError(f"{name}: a zero point lies outside {low} … {high}. The file is damaged.")
    if isinstance(q.offset, QTensor):
        checked(f"{name}: offset", q.offset)
    elif q.offset is not None and not bool(torch.isfinite(q.offset).all()):
        raise FileFormatError(f"{name}: an offset is NaN or infinite. The file is damaged.")
    if q.group_index is not None:
        _check_index(name, q)
    if (reason := wrong_table(q.table) or wrong_numbers(q.apart, q.shape) or wrong_sides(q.sides)) is not None:
        raise FileFormatError(f"{name}: {reason}. The file is damaged.")
    return q


def checked_grid(name: str, grid: Grid, format: Format) -> Grid:
    """A static grid of activations, if its scale is positive and its zero point a code.

    Raises:
        FileFormatError: it is not.
    """
    if not bool((torch.isfinite(grid.scale) & (grid.scale > 0)).all()):
        raise FileFormatError(f"{name}: a static scale is not a positive number. The file is damaged.")
    zero = grid.zero_point
    if zero is not None and bool(((zero < format.qmin) | (zero > format.qmax)).any()):
        raise FileFormatError(f"{name}: a zero point lies outside {format.qmin} … {format.qmax}. The file is damaged.")
    return grid


def check_padding(name: str, packed: torch.Tensor, bits: int, columns: int) -> None:
    """Refuse packed rows (uint8) with anything but zero bits after the last code.

    Raises:
        FileFormatError: there are bits set; the config's shape is too narrow for what is stored.
    """
    used, rest = divmod(columns * bits, 8)
    tail = packed[..., used:]
    if rest and tail.numel():
        tail = torch.cat([tail[..., :1] >> rest, tail[..., 1:]], dim=-1)
    if tail.numel() and bool(tail.any()):
        raise FileFormatError(
            f"{name}: its rows hold more than {columns} codes of {bits} bits. The config does not describe this file."
        )


def _check_codes(name: str, codes: torch.Tensor, format: Format) -> None:
    if not codes.numel():
        return
    if format.qmin < 0 or format.levels < 2 ** (8 * codes.element_size()):
        low, high = (int(n) for n in torch.aminmax(codes))
        if low < format.qmin or high > format.qmax:
            wrong = low if low < format.qmin else high
            raise FileFormatError(f"{name}: {format} has no code {wrong}. The file is damaged, or of another format.")
    for code, value in enumerate(format.values or ()):
        if not math.isfinite(value) and bool((codes == code).any()):
            raise FileFormatError(f"{name}: code {code} of {format} is no number. The file is damaged.")


def _check_scale(name: str, scale: torch.Tensor, signed: bool) -> None:
    if not bool(torch.isfinite(scale).all()):
        raise FileFormatError(f"{name} is NaN or infinite. The file is damaged.")
    if not signed and bool((scale < 0).any()):
        raise FileFormatError(f"{name} is negative, which its scheme does not allow. The file is damaged.")


def _check_index(name: str, q: QTensor) -> None:
    assert q.group_index is not None
    groups = q.real_scale.shape[-1]
    counts = torch.bincount(q.group_index.clamp(0, groups).long(), minlength=groups)
    size = -(-q.shape[-1] // groups)
    if bool((q.group_index < 0).any()) or len(counts) != groups or bool((counts > size).any()):
        raise FileFormatError(f"{name}: its group index does not share the columns out among {groups} groups.")
