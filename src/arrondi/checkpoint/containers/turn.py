"""How a model's tensor differs from the one in a file whose makers put it into another form.

Owns: `Turn`. Rows come in another order (rotary halves), matrices lie transposed, axes of length one are left out, and to norms a
number was added; each of these can be undone and done again without a loss. Blocks that are on no grid are decoded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from arrondi.checkpoint.containers.gguf.ik import IK_TYPES, decode_ik
from arrondi.errors import FileFormatError


@dataclass(frozen=True)
class Turn:
    """From what is stored to what the model has.

    Attributes:
        dtype, shape: of what is stored: the name of an element type or of a type of blocks, and its shape, bytes where it is blocks.
        rows: the model's row i is the stored row `rows[i]`; None: they are in order.
        transposed: the model has the transpose.
        plus: what is added to the stored numbers.
        decoded: the stored bytes are blocks whose values are wanted.
    """

    dtype: str
    shape: tuple[int, ...]
    rows: torch.Tensor | None = field(default=None, compare=False)
    transposed: bool = False
    plus: float = 0.0
    decoded: bool = False

    def apply(self, stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The model's tensor, of this shape."""
        made = _decoded(stored, self.dtype) if self.decoded else stored
        if self.rows is not None:
            made = made[self.rows]
        if self.transposed:
            made = made.t()
        return (made + self.plus if self.plus else made).reshape(shape).contiguous()

    def undo(self, tensor: torch.Tensor) -> torch.Tensor:
        """What is stored of the model's tensor: the inverse of `apply`, but for blocks that were decoded."""
        if self.plus:
            tensor = tensor - self.plus
        tensor = tensor.reshape(self.shape[::-1]).t() if self.transposed else tensor.reshape(self.shape)
        return (tensor if self.rows is None else tensor[self.rows.argsort()]).contiguous()


def _decoded(stored: torch.Tensor, kind: str) -> torch.Tensor:
    """float32 of blocks, by gguf's own tables where it has them."""
    from gguf import GGMLQuantizationType, dequantize

    with np.errstate(all="ignore"):
        values = (
            decode_ik(stored, kind)
            if kind in IK_TYPES
            else torch.from_numpy(dequantize(stored.numpy(), GGMLQuantizationType[kind]))
        )
    if not bool(torch.isfinite(values).all()):
        raise FileFormatError(
            f"A scale of its {kind} blocks is NaN or infinite. The file is damaged; download it again."
        )
    return values
