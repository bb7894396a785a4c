"""A model whose weights come and go: `Instance`.

Parameters are on the meta device until `fill` reads them from the source, changed as the overlay says; `drop` gives the memory
back. Two instances of one source are two models, so that the original and the quantized one can be followed side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from arrondi.checkpoint import Checkpoint
from arrondi.errors import FileFormatError
from arrondi.formats import ActivationScheme
from arrondi.model.build import computed_parameter
from arrondi.model.memory import release
from arrondi.model.names import Names
from arrondi.model.overlay import Overlay
from arrondi.nn import RoundedInputs
from arrondi.rewrite.spread import spread
from arrondi.tensor.ranges.grid import Grid

Rounding = dict[str, tuple[ActivationScheme, Grid | None] | tuple[ActivationScheme, Grid | None, torch.Tensor | None]]
"""Module → how its input is rounded, and the static grid if there is one."""


class Origin(Protocol):
    """Where an instance gets its values.

    Attributes:
        model: the model on the meta device.
        names: its parameters, and the stored tensors that fill them.
        checkpoint: the files.
        where: for messages.
    """

    model: Any
    names: Names
    checkpoint: Checkpoint
    where: Path


class Instance:
    """One model of a source.

    Attributes:
        names, where: of the source.
        model: the transformers model; what is not filled lies on the meta device.
        overlay: what differs from the source.
        spread: modules whose inputs are spread, and the size of the blocks.
        lender: another instance of the same source, whose weights this one takes where they are the same, instead of its own
            copy. Only while neither changes any.
        device: where parameters are filled.
    """

    def __init__(
        self, source: Origin, overlay: Overlay | None = None, device: torch.device = torch.device("cpu")
    ) -> None:
        self.device = device
        self.names, self.where, self.overlay = source.names, str(source.where), overlay or Overlay()
        self._checkpoint = source.checkpoint
        self.model: Any = copy.deepcopy(source.model)
        self.empty = dict(self.model.named_parameters(remove_duplicate=False))
        self.lender: Instance | None = None
        self._inputs: Rounding = {}
        self.spread: dict[str, int] = {}
        self._rounders: list[Any] = []
        self._load_buffers()

    def fill(self, params: Iterable[str], dtype: torch.dtype = torch.float32) -> None:
        """Read these parameters (and whatever shares their conversion), floating ones in `dtype`."""
        for param in params:
            if param in self.overlay.added:
                self.put_added(param.__eq__)
            elif self.is_empty(param) and not self._borrows(param, dtype):
                for name, value in self._values(param, dtype).items():
                    if name in self.empty and self.is_empty(name):
                        self._assign(name, value, dtype)

    def _borrows(self, param: str, dtype: torch.dtype) -> bool:
        group = self.names.group(param)
        names = {*self.names.names_of(param), *(group.sources if group else ())}
        if self.lender is None or names & self.overlay.changed.keys():
            return False
        self.lender.fill([param], dtype)
        for name in self._shared(param):
            self.hold(name, self.lender.parameter(param))
        return True

    def hold(self, param: str, value: torch.Tensor) -> None:
        """Let one module hold a parameter, whatever others that share it do."""
        module, leaf = self._owner(param)
        module._parameters[leaf] = value

    def _values(self, param: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The parameter's value, and those of the parameters that are made together with it."""
        own = next((n for n in self.names.names_of(param) if n in self.overlay.changed), None)
        group = self.names.group(param)
        if own is not None and (group is None or own not in group.sources):
            return {param: self.overlay.changed[own]()}
        if group is None:
            value = computed_parameter(self.model, param)
            if value is None:
                raise FileFormatError(f"{self.where}: no stored tensor fills {param}.")
            return {param: value.to(dtype)}
        tensors = [self.tensor(s, dtype) for s in group.sources]
        if group.convert is None:
            return {param: tensors[0]}
        made = group.convert(tensors)
        # A part that was changed under its own name is not made again from the original whole.
        return {n: self.overlay.changed[n]() if n in self.overlay.changed else v for n, v in made.items()}

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor of the file, as it is now."""
        changed = self.overlay.changed.get(name)
        return changed() if changed is not None else self._checkpoint.dense(name, dtype)

    def is_empty(self, param: str) -> bool:
        return self.parameter(param).is_meta

    def drop(self, params: Iterable[str]) -> None:
        """Give the memory of these parameters back."""
        for param in params:
            for name in self._shared(param):
                module, leaf = self._owner(name)
                module._parameters[leaf] = self.empty[name]
        release()

    def _shared(self, param: str) -> list[str]:
        """All names of a parameter, without those that the overlay gives a value of their own."""
        return [n for n in self.names.names_of(param) if n == param or n not in self.overlay.added]

    def parameter(self, param: str) -> torch.Tensor:
        """The parameter as it is now."""
        module, leaf = self._owner(param)
        found: torch.Tensor = module._parameters[leaf]
        return found

    def owner(self, param: str) -> torch.nn.Module:
        """The module that has the parameter."""
        return self._owner(param)[0]

    def put(self, param: str, value: torch.Tensor | None) -> None:
        """Give a module a parameter that the source does not have, or take it away."""
        module, leaf = self._owner(param)
        filled = None if value is None else torch.nn.Parameter(value.to(self.device), requires_grad=False)
        module._parameters[leaf] = filled

    def put_added(self, mine: Callable[[str], bool]) -> None:
        """Fill those parameters that the overlay adds."""
        for name in filter(mine, self.overlay.added):
            self.put(name, self.overlay.added[name]())

    def drop_added(self, mine: Callable[[str], bool]) -> None:
        """Give the memory of those parameters that the overlay adds back."""
        for name in filter(mine, self.overlay.added):
            module, leaf = self._owner(name)
            module._parameters[leaf] = self.empty.get(name)

    def round_inputs(self, inputs: Rounding) -> None:
        """From now on the inputs of these modules are rounded, as they will be when the packed model runs.

        Args:
            inputs: module → how, the static grid if there is one, and the features that are not rounded if there are any. Without the grid that its scheme needs, an input stays.
        """
        for name, how in inputs.items():
            if name not in self._inputs:
                hook = _rounder(self._inputs, name)
                module = self.model.get_submodule(name)
                self._rounders.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            self._inputs[name] = how

    def spread_inputs(self, blocks: Mapping[str, int]) -> None:
        """From now on the inputs of these modules are spread, before they are rounded; their weights must be made for it.

        Args:
            blocks: module → size of the blocks, see `arrondi.rewrite.spread`.
        """
        for name in blocks.keys() - self.spread.keys():
            module = self.model.get_submodule(name)
            hook = _spreader(self.spread, name)
            self._rounders.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
        self.spread.update(blocks)

    def leave_inputs(self) -> None:
        """From now on no inputs are spread or rounded."""
        for handle in self._rounders:
            handle.remove()
        self._rounders, self._inputs, self.spread = [], {}, {}

    @contextmanager
    def plain_inputs(self) -> Iterator[None]:
        """Inside, no inputs are rounded: what they are before rounding can be seen."""
        kept, blocks = self._inputs, self.spread
        self.leave_inputs()
        self.spread_inputs(blocks)
        try:
            yield
        finally:
            self.round_inputs(kept)

    def _load_buffers(self) -> None:
        """Buffers lie where the model runs. Stored buffers (running statistics, router biases, hash tables) hold what the checkpoint says."""
        for group in self.names.groups:
            for target in group.targets:
                if target in self.names.buffers:
                    module, leaf = self._owner(target)
                    exact = any(n in target for n in self.model._keep_in_fp32_modules_strict or ())
                    kind = torch.float32 if exact else module._buffers[leaf].dtype
                    module._buffers[leaf] = self._checkpoint.dense(group.sources[0]).to(kind)
        for module in self.model.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None and buffer.device != self.device and not buffer.is_meta:
                    module._buffers[leaf] = buffer.to(self.device)

    def _owner(self, name: str) -> tuple[Any, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf

    def _assign(self, param: str, value: torch.Tensor, dtype: torch.dtype) -> None:
        wanted = self.empty[param]
        if tuple(value.shape) != tuple(wanted.shape):
            raise FileFormatError(
                f"{self.where}: {param} should have shape {tuple(wanted.shape)}, the file has {tuple(value.shape)}."
            )
        if value.dtype.is_floating_point:
            value = value.to(dtype)
        filled = torch.nn.Parameter(value.to(self.device).contiguous(), requires_grad=False)
        for name in self._shared(param):
            module, leaf = self._owner(name)
            module._parameters[leaf] = filled


def _rounder(inputs: Rounding, name: str) -> Any:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        scheme, grid, *columns = inputs[name]
        if grid is None and scheme.dynamic is not True:
            return args, kwargs
        return RoundedInputs(scheme.rounding, grid, *columns, name=f"the input of {name}")(module, args, kwargs)

    return hook


def _spreader(blocks: Mapping[str, int], name: str) -> Any:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (spread(args[0], blocks[name]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: spread(kwargs[first], blocks[name])}

    return hook
