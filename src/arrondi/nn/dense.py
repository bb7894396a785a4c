"""An ordinary linear layer that is fast for one token, and in bfloat16 on every CPU.

Owns: `DenseLinear`, which `arrondi.load()` makes of the `nn.Linear` that stay unquantized, the output head above all.
"""

from __future__ import annotations

import torch
from torch import nn

from arrondi.kernels.tokens import dense_linear, takes_dense
from arrondi.native import multiplies_bfloat16


class DenseLinear(nn.Linear):
    """`nn.Linear`; products of a few rows go through `arrondi.kernels.tokens.dense_linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x (..., in) → (..., out), same dtype."""
        if takes_dense(input, self.weight):
            return dense_linear(input, self.weight, self.bias)
        if (
            input.dtype == self.weight.dtype == torch.bfloat16
            and input.device.type == "cpu"
            and not multiplies_bfloat16()
        ):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(input.float(), self.weight.float(), bias).to(torch.bfloat16)
        return super().forward(input)

    @staticmethod
    def adopt(module: nn.Module) -> None:
        """Every plain `nn.Linear` inside becomes a DenseLinear; parameters, names and hooks stay."""
        for child in module.modules():
            if type(child) is nn.Linear:
                child.__class__ = DenseLinear
