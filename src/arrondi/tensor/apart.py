"""Numbers that stay out of the codes of a matrix: input features with outliers, or single weights.

Owns: `Kept`, and how it is cut and joined with the rows of its matrix. What is kept takes the place of what the codes mean there.

Sources: Dettmers et al. 2022, arXiv:2208.07339 (columns); Zadeh et al. 2020, arXiv:2005.03842 (elements).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from arrondi.errors import ShapeError
from arrondi.formats import Apart

_BITS: Final = {"float32": 32, "bfloat16": 16, "float16": 16}
_INDEX_BITS: Final = 32


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept apart of a matrix (m, n), or of several of one shape below each other.

    Attributes:
        index: int32. Columns: (matrices, k), ascending in every matrix. Elements: (k,), row · n + column, ascending.
        values: float32, exactly as stored. Columns: (m, k). Elements: (k,).
    """

    index: torch.Tensor
    values: torch.Tensor

    @property
    def columns(self) -> bool:
        """Whether whole columns are kept; else single elements."""
        return self.index.ndim == 2

    def bits(self, apart: Apart) -> int:
        """All bits that a file needs for it."""
        return self.index.numel() * _INDEX_BITS + self.values.numel() * _BITS[apart.stored]

    def put(self, matrix: torch.Tensor) -> torch.Tensor:
        """Writes what is kept to its places in a matrix (m, n), which is changed and returned."""
        values = self.values.to(matrix.dtype)
        if not self.columns:
            matrix.view(-1)[self.index.long()] = values
            return matrix
        matrices = len(self.index)
        whole = matrix.view(matrices, -1, matrix.shape[-1])
        at = self.index.long()[:, None, :].expand(-1, whole.shape[1], -1)
        whole.scatter_(2, at, values.view(matrices, whole.shape[1], -1))
        return matrix

    def taken(self, matrix: torch.Tensor) -> torch.Tensor:
        """The numbers of a matrix (m, n) at its places, shaped like `values`."""
        if not self.columns:
            return matrix.reshape(-1)[self.index.long()]
        whole = matrix.reshape(len(self.index), -1, matrix.shape[-1])
        at = self.index.long()[:, None, :].expand(-1, whole.shape[1], -1)
        return whole.gather(2, at).reshape(matrix.shape[0], -1)

    def rows(self, start: int, count: int, shape: tuple[int, ...]) -> Kept:
        """Its part in some rows of its matrix, which has this shape."""
        m, n = shape[0], shape[-1]
        if self.columns:
            height = m // len(self.index)
            first, last = start // height, -(-(start + count) // height)
            return Kept(self.index[first:last], self.values[start : start + count])
        inside = (self.index >= start * n) & (self.index < (start + count) * n)
        return Kept(self.index[inside] - start * n, self.values[inside])


def kept_of(matrix: torch.Tensor, index: torch.Tensor, apart: Apart) -> Kept:
    """What is kept of a matrix at some places, rounded to its stored type.

    Args:
        matrix: (m, n), or several of one shape below each other.
        index: as `Kept` has it.
    """
    empty = Kept(index.to(torch.int32), torch.empty(0))
    values = empty.taken(matrix.float())
    return Kept(empty.index, values.to(getattr(torch, apart.stored)).float())


def stack_kept(parts: Sequence[Kept | None], shapes: Sequence[tuple[int, ...]]) -> Kept | None:
    """What is kept of matrices that lie below each other, of these shapes."""
    present = [p for p in parts if p is not None]
    if not present:
        return None
    if present[0].columns:
        if len({s[0] for s in shapes}) > 1:
            raise ShapeError(f"Matrices with columns of their own have one shape, got {sorted(set(shapes))}.")
        return Kept(torch.cat([p.index for p in present]), torch.cat([p.values for p in present]))
    index, start = [], 0
    for part, shape in zip(present, shapes, strict=True):
        index.append(part.index + start)
        start += shape[0] * shape[-1]
    return Kept(torch.cat(index), torch.cat([p.values for p in present]))


def complaint_of(kept: Kept | None, apart: Apart | None, shape: tuple[int, ...]) -> str | None:
    """Why a matrix of this shape cannot have it; None if it can."""
    if (kept is None) is not (apart is None):
        return "what is kept apart goes with a scheme that says so"
    if kept is None or apart is None:
        return None
    if len(shape) != 2:
        return f"what is kept apart belongs to a matrix, got shape {shape}"
    if kept.index.dtype != torch.int32 or kept.values.dtype != torch.float32:
        return (
            f"what is kept apart has an int32 index and float32 values, got {kept.index.dtype} and {kept.values.dtype}"
        )
    if kept.columns is not (apart.what == "columns") or kept.index.shape[-1] != apart.count:
        return f"{apart} is kept apart, and the index has the shape {tuple(kept.index.shape)}"
    wanted = (shape[0], apart.count) if kept.columns else (apart.count,)
    if tuple(kept.values.shape) != wanted or (kept.columns and (not len(kept.index) or shape[0] % len(kept.index))):
        return f"values of what is kept apart have the shape {wanted}, got {tuple(kept.values.shape)}"
    return None


def wrong_numbers(kept: Kept | None, shape: tuple[int, ...]) -> str | None:
    """What is wrong with its numbers, None if nothing is."""
    if kept is None:
        return None
    limit = shape[-1] if kept.columns else shape[0] * shape[-1]
    index = kept.index
    if bool(((index < 0) | (index >= limit)).any()):
        return f"a place of what is kept apart is outside 0 … {limit - 1}"
    if bool((index[..., 1:] <= index[..., :-1]).any()):
        return "the places of what is kept apart do not ascend"
    return None if bool(torch.isfinite(kept.values).all()) else "a number that is kept apart is NaN or infinite"
