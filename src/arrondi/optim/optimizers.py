"""Optimizers like PyTorch's whose states take 8 bits: `AdamW8bit`, `Adam8bit`, `Momentum8bit`.

2.03 bytes of state a parameter instead of 8. Tensors of fewer than 4,096 numbers keep float32 states, and so do embeddings, whose rows are
seldom used and then move far: an optimizer knows them where it is given the model (or `keep`), for a tensor alone does not tell.

Source: Dettmers, Lewis, Shleifer, Zettlemoyer 2021, arXiv:2110.02861.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import nn

from arrondi.errors import DataError, SchemeError
from arrondi.optim import kernel
from arrondi.optim.blocks import Blocks
from arrondi.optim.update import Adam, Momentum

_CHUNK: Final = 1 << 18
"""Numbers that are in float32 at a time."""

_ADDED: Final = ("maximize", "differentiable")
"""Of the groups' settings, those that PyTorch's optimizers did not always have."""

Params = nn.Module | Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]


class _Optimizer8bit(torch.optim.Optimizer):
    """What all of them share: which states are rounded, reading and writing them, and state dicts."""

    maps: dict[str, str]
    """State → the map that it is rounded to; named as PyTorch names them."""

    def __init__(
        self, params: Params, defaults: dict[str, Any], block: int, least: int, keep: Iterable[nn.Module | torch.Tensor]
    ) -> None:
        if block < 1 or least < 0:
            raise SchemeError(f"A block has 1 number or more and the least tensor 0, got {block} and {least}.")
        kept = list(keep)
        if isinstance(params, nn.Module):
            kept += [m for m in params.modules() if isinstance(m, nn.Embedding)]
            params = [p for p in params.parameters() if p.requires_grad]
        self.block, self.least = block, least
        self._whole = [p for one in kept for p in ([one] if isinstance(one, torch.Tensor) else one.parameters())]
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles; PyTorch's own leaves out what it does not know."""
        own = {"block": self.block, "least": self.least, "_whole": self._whole}
        return {**super().__getstate__(), **own}

    def rule(self, group: dict[str, Any], step: int) -> Callable[..., None]:
        """The update of a group's parameters."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the closure, if there is one, is called first and its loss returned.

        Raises:
            DataError: a gradient is sparse, or a parameter no floating-point tensor; nothing has moved.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [(p, p.grad, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, grad, _ in moving:  # before anything moves
            self._refuse(p, grad)
        for p, grad, group in moving:
            self._update(p, -grad if group.get("maximize") else grad, group)
        return loss

    def _refuse(self, p: torch.Tensor, grad: torch.Tensor) -> None:
        if grad.is_sparse or not p.is_floating_point():
            sparse = "Its gradient is sparse: use torch.optim.SparseAdam for it, or sparse=False."
            other = f"It is of {p.dtype}: give it to an optimizer of PyTorch's."
            raise DataError(
                f"{type(self).__name__} takes dense gradients of floating-point tensors. {sparse if grad.is_sparse else other}"
            )

    def _update(self, p: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name, map in self.maps.items():
                state[name] = self._new(p, map)
        state["step"] += 1
        rule = self.rule(group, int(state["step"]))
        states = [state[name] for name in self.maps]
        if not isinstance(states[0], Blocks):
            rule(p, grad, *states)
            return
        own = _local(p.detach())
        flat, g = own.contiguous().view(-1), _local(grad.detach()).contiguous().view(-1)
        self._blocks(rule, flat, g, states)
        if flat.data_ptr() != own.data_ptr():
            own.copy_(flat.view(own.shape))

    def _blocks(self, rule: Callable[..., None], p: torch.Tensor, g: torch.Tensor, states: list[Blocks]) -> None:
        """One step on flat numbers, in float32 and some at a time."""
        size = max(_CHUNK // self.block, 1) * self.block
        compiled = kernel.step_of(rule) if kernel.takes(p, states) else None
        if compiled is not None and p.dtype == g.dtype == torch.float32:
            compiled(rule, p, g, *states)
            return
        for start in range(0, p.numel(), size):
            stop = min(start + size, p.numel())
            moved, grad = p[start:stop].float(), g[start:stop].float()
            values = [s.read(start, stop) for s in states]
            rule(moved, grad, *values)
            for state, value in zip(states, values, strict=True):
                state.write(start, value)
            p[start:stop] = moved

    def _new(self, p: torch.Tensor, map: str) -> Blocks | torch.Tensor:
        if self._rounds(p):
            return Blocks.zeros(_local(p).numel(), map, self.block, p.device)
        return torch.zeros_like(p, dtype=_wide(p), memory_format=torch.preserve_format)

    def _rounds(self, p: torch.Tensor) -> bool:
        return p.numel() >= self.least and not any(p is kept for kept in self._whole)

    @property
    def state_nbytes(self) -> int:
        """Bytes that states take, without the counts of steps."""
        states = [s[name] for s in self.state.values() for name in self.maps if name in s]
        return sum(s.nbytes for s in states)

    def state_dict(self, *, bits: int = 8) -> dict[str, Any]:
        """States and groups.

        Args:
            bits: 8 as they are, each with its map and block; 32 as PyTorch's optimizer of this kind takes them.
        """
        found: dict[str, Any] = super().state_dict()
        params = [p for group in self.param_groups for p in group["params"]]
        for number, state in found["state"].items():
            p = params[number]
            found["state"][number] = {
                k: (v.to_dict() if bits == 8 else _placed(v.read(0, v.codes.numel()), p))
                if isinstance(v, Blocks)
                else v
                for k, v in state.items()
            }
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """States of an optimizer like this one, or of PyTorch's, which are rounded where this one's are.

        Raises:
            DataError, SchemeError: they are of another model, or keep what is not computed here (amsgrad).
        """
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise SchemeError("amsgrad keeps a third state, which is not computed here. Load a state without it.")
        needed = [name for name in self.defaults if name not in _ADDED]
        for group in state_dict["param_groups"]:
            if missing := [name for name in needed if name not in group]:
                raise DataError(
                    f"The state is of another kind of optimizer: {type(self).__name__} finds no {missing[0]!r} in its groups. Load one of its own kind."
                )
        params = [p for group in self.param_groups for p in group["params"]]
        order = [n for group in state_dict["param_groups"] for n in group["params"]]
        plain = {n: {k: v for k, v in s.items() if k == "step"} for n, s in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": plain})
        for number, p in zip(order, params, strict=True):
            given = state_dict["state"].get(number)
            if given:
                self.state[p] |= {name: self._loaded(p, name, given) for name in self.maps}
                self.state[p].setdefault("step", torch.tensor(1.0))  # PyTorch's SGD does not count

    def _loaded(self, p: torch.Tensor, name: str, given: dict[str, Any]) -> Blocks | torch.Tensor:
        value, count = given.get(name), _local(p).numel()
        if value is None:
            return self._new(p, self.maps[name])
        if isinstance(value, dict):
            found = Blocks.from_dict(value, count, p.device)
            return found if self._rounds(p) else _placed(found.read(0, count), p)
        if value.shape != p.shape:
            raise DataError(
                f"A state of shape {tuple(value.shape)} is none of a parameter of {tuple(p.shape)}. Load the state of this model."
            )
        value = value.detach().to(p.device, _wide(p), copy=True)
        return Blocks.of(_local(value), self.maps[name], self.block) if self._rounds(p) else value


def _wide(p: torch.Tensor) -> torch.dtype:
    """Of a state that is not rounded: in 16 bits a moving average of squares would stand still."""
    return torch.promote_types(p.dtype, torch.float32)


def _local(x: torch.Tensor) -> torch.Tensor:
    """What this rank has of it; all, unless it is sharded."""
    return x.to_local() if isinstance(x, _sharded()) else x


def _placed(values: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Flat values of this rank in the shape of a parameter, sharded as it is."""
    own = values.view(_local(p).shape)
    sharded: Any = _sharded()
    if not isinstance(p, sharded):
        return own
    of: Any = p
    whole = {"shape": p.shape, "stride": p.stride(), "run_check": False}
    placed: torch.Tensor = sharded.from_local(own, of.device_mesh, of.placements, **whole)
    return placed


def _sharded() -> Any:
    """The class of parameters of `fully_shard`; nothing is of it where nobody has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", ())


class Adam8bit(_Optimizer8bit):
    """Adam with both moments in 8 bits; decay is added to the gradient.

    Args:
        params: parameters, groups of them, or a model, whose embeddings then keep float32 states.
        lr, betas, eps, weight_decay, maximize: as PyTorch's.
        block: numbers under one scale.
        least: tensors of fewer numbers keep float32 states.
        keep: modules or parameters that keep float32 states.

    Gradients with NaN or infinity reach parameters and states as in PyTorch; a block's state is then NaN.

    >>> layer = nn.Linear(128, 64)
    >>> optimizer = AdamW8bit(layer.parameters(), lr=1e-3)
    """

    maps = {"exp_avg": "dynamic8", "exp_avg_sq": "dynamic8-unsigned"}  # noqa: RUF012
    decoupled = False
    decay = 0.0

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        *,
        maximize: bool = False,
        block: int = 256,
        least: int = 4096,
        keep: Iterable[nn.Module | torch.Tensor] = (),
    ) -> None:
        decay = self.decay if weight_decay is None else weight_decay
        if not (lr >= 0 and eps >= 0 and decay >= 0 and all(0 <= b < 1 for b in betas)):
            raise SchemeError(
                f"lr, eps and weight_decay are at least 0 and betas in 0 … 1, got {lr}, {eps}, {decay} and {betas}."
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": decay, "maximize": maximize}
        super().__init__(params, defaults, block, least, keep)

    def rule(self, group: dict[str, Any], step: int) -> Adam:
        """The update of a group's parameters."""
        beta1, beta2 = group["betas"]
        decoupled = self.decoupled or group.get("decoupled_weight_decay", False)  # as Adam does with a state of AdamW
        return Adam(
            float(group["lr"]), float(beta1), float(beta2), group["eps"], group["weight_decay"], decoupled, step
        )


class AdamW8bit(Adam8bit):
    """Adam with both moments in 8 bits; decay is taken off the parameter. Arguments as `Adam8bit`; `weight_decay` is 0.01."""

    decoupled = True
    decay = 0.01


class Momentum8bit(_Optimizer8bit):
    """SGD whose momentum takes 8 bits.

    Args:
        params, block, least, keep: as `Adam8bit`.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as PyTorch's SGD.
    """

    maps = {"momentum_buffer": "dynamic8"}  # noqa: RUF012

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        block: int = 256,
        least: int = 4096,
        keep: Iterable[nn.Module | torch.Tensor] = (),
    ) -> None:
        if not (lr >= 0 and momentum >= 0 and weight_decay >= 0) or (nesterov and (momentum == 0 or dampening != 0)):
            raise SchemeError(
                f"lr, momentum and weight_decay are at least 0, and nesterov goes with a momentum and no dampening, got {lr}, {momentum}, {weight_decay} and {dampening}."
            )
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
            "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults, block, least, keep)

    def rule(self, group: dict[str, Any], step: int) -> Momentum:
        """The update of a group's parameters."""
        return Momentum(
            float(group["lr"]), group["momentum"], group["dampening"], group["weight_decay"], group["nesterov"], step
        )
