"""A model without its weights that can nevertheless be run: `Skeleton`.

Matrices stay on the meta device, and what is computed from them is made up: a product with one gives random numbers of the right
shape. Vectors (norms, biases) are random too; activations, masks, positions and the choice of experts are real. Such a run tells where
numbers go and never what they are, in the time and memory of a few tokens, whatever the size of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_map

from arrondi.model.build import configs_in
from arrondi.model.chain import Inputs
from arrondi.model.flow_routers import tensors_of
from arrondi.model.shapes import usual_inputs

FEW, MANY = 4, 48
"""Tokens in each of two windows: enough to tell rows from columns, and enough that most of some experts are chosen."""


class Skeleton:
    """A copy of a model whose parameters take no memory.

    Attributes:
        model: the copy, in eval mode on the CPU, without caches, its experts called one by one.
        params: its parameters, each by the first of its names; matrices on the meta device, vectors random.
    """

    def __init__(self, model: Any) -> None:
        self._made = torch.Generator().manual_seed(0)
        memo: dict[int, Any] = {}
        made_of = {id(p) for m in model.modules() if isinstance(m, ParametrizationList) for p in m.parameters()}
        for parameter in model.parameters():
            empty = self._empty(parameter, whole=id(parameter) in made_of)
            memo[id(parameter)] = torch.nn.Parameter(empty, requires_grad=False)
        self.model: Any = copy.deepcopy(model, memo)
        for module in self.model.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[leaf] = self._buffer(buffer)
        config = getattr(self.model, "config", None)
        for part in [] if config is None else configs_in(config):
            part.use_cache = False
            part._experts_implementation = "eager"
        self.model.eval()
        self.params: dict[str, torch.Tensor] = dict(self.model.named_parameters())

    def inputs(self, tokens: int = FEW) -> Iterator[Inputs]:
        """What the model may want to be called with, the likeliest first."""
        config = getattr(self.model, "config", None)
        if config is None:
            return
        size = int(getattr(config.get_text_config(), "vocab_size", 0) or 1000)
        ids = torch.randint(0, size, (2, tokens), generator=self._made)
        yield Inputs.of(ids)
        for usual in usual_inputs(self.model, torch.device("cpu")):
            yield Inputs((), {name: ids if value.dtype == torch.long else value for name, value in usual.items()})

    def _empty(self, parameter: torch.Tensor, *, whole: bool) -> torch.Tensor:
        """A vector or, on the meta device, a matrix; `whole`: of a weight that is computed from several, never a vector."""
        shape = tuple(parameter.shape)
        if whole or sum(n > 1 for n in shape) > 1:
            return torch.empty(shape, dtype=torch.float32, device="meta")
        return torch.rand(shape, generator=self._made) + 0.5

    def _buffer(self, buffer: torch.Tensor) -> torch.Tensor:
        if not buffer.is_meta:
            return buffer.float().cpu() if buffer.is_floating_point() else buffer.cpu()
        if buffer.is_floating_point():
            return torch.rand(buffer.shape, generator=self._made) + 0.5
        return torch.zeros(buffer.shape, dtype=buffer.dtype)


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation of aten gives; random numbers where an operand has none."""
    tensors = list(tensors_of((args, kwargs)))
    if func is torch.ops.aten._local_scalar_dense.default and tensors[0].is_meta:
        return 1
    if all(not t.is_meta for t in tensors):
        return func(*args, **kwargs)
    if all(t.is_meta for t in tensors) and torch.device(kwargs.get("device") or "meta").type == "meta":
        return func(*args, **kwargs)
    first = args[0] if args and isinstance(args[0], torch.Tensor) else None
    if func._schema.is_mutable:
        return first  # what is written does not matter
    shapes = func(*tree_map(_to_meta, list(args)), **tree_map(_to_meta, kwargs))
    return tree_map(_made_up, shapes)


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("meta")
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _made_up(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, dtype=value.dtype)
    return torch.zeros(value.shape, dtype=value.dtype)
