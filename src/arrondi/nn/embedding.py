"""Look-up in a table whose rows stay in few bits.

Owns: `QEmbedding`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from arrondi.errors import DataError, ShapeError
from arrondi.formats import tile_shape
from arrondi.kernels import decoded, pack_weight, unpack_weight
from arrondi.nn.packed import PackedWeight, keep_types
from arrondi.tensor.qtensor import QTensor


class QEmbedding(nn.Module):
    """`weight[ids]` with the weight packed; only the rows asked for become numbers.

    Args:
        weight: (rows, width); each row has scales of its own (groups, channels), or all share one.
        dtype: of the answer.

    Raises:
        ShapeError: the weight is no matrix, or several rows share a scale that others do not.
    """

    def __init__(self, weight: QTensor, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if len(weight.shape) != 2:
            raise ShapeError(f"QEmbedding takes a matrix (rows, width), got shape {weight.shape}.")
        height = tile_shape(weight.scheme.granularity, weight.shape)[0]
        if height not in (1, weight.shape[0]) or isinstance(weight.scale, QTensor) or weight.group_index is not None:
            raise ShapeError(
                f"QEmbedding takes rows with plain scales of their own, got {weight.scheme}. Use groups along the width."
            )
        self.num_embeddings, self.embedding_dim = weight.shape
        self.scheme, self.dtype, self.shared = weight.scheme, dtype, height > 1
        for name, tensor in pack_weight(weight).items():
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
        rows = {}
        for name, buffer in self._buffers.items():
            assert buffer is not None
            keep = self.shared and name != "packed_codes"
            rows[name.removeprefix("packed_")] = buffer if keep else buffer[flat]
        values = decoded(rows, self.scheme, (flat.numel(), self.embedding_dim), self.dtype)
        return values.reshape(*ids.shape, self.embedding_dim)

    def unpack(self) -> QTensor:
        """The table again: the same codes, scales, zero points, offsets and scheme."""
        tensors = {n.removeprefix("packed_"): b for n, b in self._buffers.items() if b is not None}
        return unpack_weight(tensors, self.scheme, (self.num_embeddings, self.embedding_dim))

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
        return self
