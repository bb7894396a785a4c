"""One step of an optimizer on flat numbers: `adam` and `momentum`, pure functions in the order of operations of PyTorch's own.

The parameter moves by the state of this step in float32; only what is kept for the next step is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Adam:
    """The numbers of a step of Adam.

    Attributes:
        lr, beta1, beta2, eps, decay: as PyTorch's; `decoupled` takes decay off the parameter (AdamW), else it is added to the gradient.
        step: of this update, from 1.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    decoupled: bool
    step: int

    @property
    def size(self) -> float:
        """lr over the first moment's bias correction."""
        return self.lr / (1 - self.beta1**self.step)

    @property
    def root(self) -> float:
        """Square root of the second moment's bias correction."""
        return float((1 - self.beta2**self.step) ** 0.5)

    def __call__(self, p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> None:
        """Change p, m and v in place; all (n,), m and v float32, p and g of one type."""
        if self.decay and self.decoupled:
            p.mul_(1 - self.lr * self.decay)
        elif self.decay:
            g = g.add(p, alpha=self.decay)
        g = g.to(m.dtype)
        m.lerp_(g, 1 - self.beta1)
        v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        below = (v.sqrt() / self.root).add_(self.eps)
        if p.dtype == m.dtype:
            p.addcdiv_(m, below, value=-self.size)
        else:
            p.add_((m / below).to(p.dtype), alpha=-self.size)


@dataclass(frozen=True)
class Momentum:
    """The numbers of a step of SGD with momentum; as PyTorch's."""

    lr: float
    momentum: float
    dampening: float
    decay: float
    nesterov: bool
    step: int

    def __call__(self, p: torch.Tensor, g: torch.Tensor, m: torch.Tensor) -> None:
        """Change p and m in place."""
        if self.decay:
            g = g.add(p, alpha=self.decay)
        g = g.to(m.dtype)
        if self.step == 1:
            m.copy_(g)
        else:
            m.mul_(self.momentum).add_(g, alpha=1 - self.dampening)
        moved = g.add(m, alpha=self.momentum) if self.nesterov else m
        p.add_(moved.to(p.dtype), alpha=-self.lr)
