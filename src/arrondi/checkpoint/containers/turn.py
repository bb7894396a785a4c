"""How a model's tensor differs from the one in a file whose makers put it into another form.

Owns: `Turn`. Rows come in another order (rotary halves), matrices lie transposed, axes of length one are left out, and to norms a
number was added; each of these can be undone and done again without a loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Turn:
    """From what is stored to what the model has.

    Attributes:
        rows: the model's row i is the stored row `rows[i]`; None: they are in order.
        transposed: the model has the transpose.
        shape: of the model's tensor, where it has another than that; None: the same.
        plus: what is added to the stored numbers.
    """

    rows: torch.Tensor | None = field(default=None, compare=False)
    transposed: bool = False
    shape: tuple[int, ...] | None = None
    plus: float = 0.0

    def apply(self, stored: torch.Tensor, *, blocks: bool = False) -> torch.Tensor:
        """The model's tensor. Of `blocks` only the order of rows is: the rest is said by whoever knows what they mean."""
        made = stored if self.rows is None else stored[self.rows]
        if blocks:
            return made
        if self.transposed:
            made = made.t()
        if self.shape is not None:
            made = made.reshape(self.shape)
        return (made + self.plus if self.plus else made).contiguous()

    def undo(self, tensor: torch.Tensor, *, blocks: bool = False) -> torch.Tensor:
        """What is stored of the model's tensor: the inverse of `apply`."""
        if not blocks:
            if self.plus:
                tensor = tensor - self.plus
            if self.shape is not None:
                tensor = tensor.squeeze()
            if self.transposed:
                tensor = tensor.t()
        return (tensor if self.rows is None else tensor[self.rows.argsort()]).contiguous()
