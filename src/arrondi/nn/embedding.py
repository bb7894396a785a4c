"""Look-up in a table whose rows stay in few bits.

Owns: `QEmbedding`, which schemes it takes (`refuse_table`), and what a class computes besides the look-up (`factor_of`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from arrondi.errors import DataError, SchemeError, ShapeError
from arrondi.formats import PerChannel, PerGroup, PerTensor, Scheme, tile_shape
from arrondi.kernels import Meta, decoded, pack_weight, rows_at, unpack_weight
from arrondi.kernels.native_linear import TRELLIS, ring_rows
from arrondi.kernels.native_linear.coding import SLAB
from arrondi.nn.packed import PackedWeight, keep_types
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.rows import rowwise

_TRIED: Final = ((2, 0, 3),)
"""Ids that tell a look-up from whatever counts positions."""


def refuse_table(scheme: Scheme) -> str | None:
    """Why rows cannot be looked up in a table of this scheme, as the end of a sentence; None if they can."""
    if scheme.format.trellis is not None and scheme.format.trellis.ring == "tile":
        return f"rows of an embedding are looked up one by one, and tiles of {scheme.format} hold sixteen in an order of their own"
    plain = scheme.apart is None and scheme.table is None and (rowwise(scheme) or not isinstance(scheme.scale, Scheme))
    if plain and isinstance(scheme.granularity, PerChannel | PerGroup | PerTensor):
        return None
    return f"rows of an embedding are looked up one by one and take scales of their own (a row, or groups of its width), not {scheme}"


@torch.no_grad()
def factor_of(module: nn.Module, dtype: torch.dtype = torch.float32) -> float | None:
    """By what an embedding multiplies the rows that it looks up: 1.0, or √width in some models.

    Found by a look-up in a small table of random numbers, bit for bit.

    Args:
        module: an nn.Embedding or a subclass; its weight is not read.
        dtype: of the weight when the model runs.

    Returns:
        the factor, None where the module does something else (counts positions, renormalises its rows).
    """
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return None
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    trial = copy.copy(module)
    ids = torch.tensor(_TRIED)
    numbers = torch.randn(4, module.embedding_dim, generator=torch.Generator().manual_seed(0))
    trial.padding_idx = None
    try:
        said = []
        for table in (torch.ones_like(numbers, dtype=dtype), torch.ones_like(numbers), numbers.to(dtype)):
            trial._parameters = {"weight": nn.Parameter(table, requires_grad=False)}
            said.append(type(module).forward(trial, ids))
        own, exact, found = said
        factors = (float(own[0, 0, 0]), float(exact[0, 0, 0]))
        wanted = numbers.to(dtype)[ids]
        return next((f for f in factors if found.shape == wanted.shape and torch.equal(found, wanted * f)), None)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, NotImplementedError):
        return None  # it wants other arguments than ids


class QEmbedding(nn.Module):
    """`weight[ids] · factor` with the weight packed; only the rows asked for become numbers.

    Args:
        weight: (rows, width); each row has scales of its own (groups, channels), or all share one.
        dtype: of the answer.
        factor: by which rows are multiplied, see `factor_of`.

    Raises:
        ShapeError: the weight is no matrix, or several rows share a scale that others do not.
    """

    def __init__(self, weight: QTensor, *, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> None:
        super().__init__()
        if len(weight.shape) != 2:
            raise ShapeError(f"QEmbedding takes a matrix (rows, width), got shape {weight.shape}.")
        height = tile_shape(weight.scheme.granularity, weight.shape)[0]
        shared = isinstance(weight.scale, QTensor) and not rowwise(weight.scheme)
        if height not in (1, weight.shape[0]) or shared or weight.group_index is not None:
            raise ShapeError(
                f"QEmbedding takes rows with scales of their own, got {weight.scheme}. Use groups along the width."
            )
        self.num_embeddings, self.embedding_dim = weight.shape
        self.scheme, self.dtype, self.shared, self.factor = weight.scheme, dtype, height > 1, factor
        meta = Meta(weight.scheme, (weight.shape[0], weight.shape[1]), torch.float32)
        self.meta = meta if _compiled(weight) else None
        for name, tensor in (pack_weight(weight) if self.meta is None else TRELLIS.prepack(weight, dtype)).items():
            self.register_buffer(f"packed_{name}", tensor, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (...), int64 or int32 → (..., width).

        Raises:
            DataError: an id beyond the table, or ids that are no integers.
        """
        if ids.dtype not in (torch.int64, torch.int32):
            raise DataError(f"Ids are integers, got {ids.dtype} of shape {tuple(ids.shape)}.")
        flat = ids.reshape(-1).long()
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < self.num_embeddings:
            raise DataError(
                f"Ids must lie in 0 … {self.num_embeddings - 1}, got {int(flat.min())} … {int(flat.max())} in shape {tuple(ids.shape)}."
            )
        values = self._rows(flat).reshape(*ids.shape, self.embedding_dim)
        return values if self.factor == 1.0 else values * self.factor

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        tensors, shape = self._tensors(), (self.num_embeddings, self.embedding_dim)
        if self.meta is not None:
            return ring_rows(tensors, self.meta, ids).to(self.dtype)
        if self.scheme.format.trellis is not None:
            return rows_at(tensors, self.scheme, shape, ids).to(self.dtype)
        rows = {n: t if self.shared and n != "codes" else t[ids] for n, t in tensors.items()}
        return decoded(rows, self.scheme, (ids.numel(), shape[1]), self.dtype)

    def unpack(self) -> QTensor:
        """The table again: the same codes, scales, zero points, offsets and scheme."""
        if self.meta is not None:
            return TRELLIS.unpack(self._tensors(), self.meta)
        return unpack_weight(self._tensors(), self.scheme, (self.num_embeddings, self.embedding_dim))

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {n.removeprefix("packed_"): b for n, b in self._buffers.items() if b is not None}

    @property
    def weight(self) -> PackedWeight:
        """Shape, dtype and device of the table. Its numbers: `unpack().dequantize()`."""
        shape, device = torch.Size((self.num_embeddings, self.embedding_dim)), self.get_buffer("packed_codes").device
        what = f"{self.scheme} of shape {tuple(shape)}"
        return PackedWeight(shape, self.dtype, device, lambda: self.unpack().dequantize(self.dtype), what)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, weight={self.scheme}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        keep_types(self, lambda: super(QEmbedding, self)._apply(fn, recurse))
        where = self.get_buffer("packed_codes").device
        if self.meta is not None and where.type not in ("cpu", "meta"):
            raise SchemeError(
                f"{TRELLIS.name} packed this table for another device: it runs on the CPU, got {where}. Load the model on {where} anew."
            )
        return self


def _compiled(weight: QTensor) -> bool:
    """Whether the compiled kernels look rows up: those of a trellis are turned with up to 127 others."""
    turned = weight.scheme.turned
    where = weight.codes.device
    return TRELLIS.refuse(weight.scheme, weight.shape, torch.float32, where) is None and (
        turned is None or turned.block <= SLAB
    )
