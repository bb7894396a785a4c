"""A model that is in memory: `InMemory`, any nn.Module as a source of sites.

It answers like `OnDisk`; its one instance is the module itself, whose weights never come or go.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch

from arrondi.errors import FileFormatError
from arrondi.model.build import build_model, starts_without
from arrondi.model.chain import REFUSALS, Chain, Inputs, said
from arrondi.model.flow import trace
from arrondi.model.flow_own import has_own_program
from arrondi.model.instance import Instance
from arrondi.model.names import Names
from arrondi.model.overlay import Overlay
from arrondi.model.segments import Segments, Straight
from arrondi.model.site import Facts, Site, StoredTensor, find_tensors, is_stack
from arrondi.model.units import find_lists
from arrondi.model.whole import Whole


class InMemory:
    """A module with its weights.

    Attributes:
        model: the module.
        names: its parameters, each by its own name.
        whole: the model is run as one unit.
        settled: what the model itself computes at the ends of one batch; see `settle`.
        where: for messages.
        example: a batch that the module was run on, if it was.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model: Any = model
        self.where = type(model).__name__
        unique = {id(p): n for n, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
        params = dict(model.named_parameters(remove_duplicate=False))
        self.names = Names(model, {n: tuple(params[n].shape) for n in unique.values()}, self.where, converted=False)
        self.units = next(iter(find_lists(model)), "")
        self.whole = False
        self.settled: torch.Tensor | None = None
        self.facts = Facts()
        self.example: Inputs | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The config of a transformers model, as a dictionary; empty for others."""
        config: Any = getattr(self.model, "config", None)
        return dict(config.to_dict()) if hasattr(config, "to_dict") else {}

    @property
    def to_load(self) -> int:
        """Bytes that are still to be loaded: none."""
        return 0

    def instance(self, overlay: Overlay | None = None, device: torch.device | None = None) -> Held:
        """The module itself."""
        return Held(self)

    @cached_property
    def tensors(self) -> list[StoredTensor]:
        """Every parameter, as a file would hold it."""
        return find_tensors(self.names, self.facts, self.block_of)

    @property
    def sites(self) -> list[Site]:
        """Everything that multiplies."""
        return [s for t in self.tensors for s in t.sites]

    def run_as_whole(self, facts: Facts) -> None:
        """From now on the model is one unit, of which a run has told this."""
        self.facts = facts
        self.whole, self.units = True, ""
        self.__dict__.pop("tensors", None)

    @property
    def straight(self) -> bool:
        """Whether the module is a line of parts, which are its units."""
        return isinstance(self.model, Straight)

    def units_of(self, instance: Instance) -> Chain | Whole | Segments:
        """The instance as what `walk` goes through."""
        if self.straight:
            return Segments(instance)
        return Whole(instance) if self.whole else Chain(instance, self.units)

    def block_of(self, param: str) -> int | None:
        """The unit that a parameter belongs to."""
        if self.straight:
            return int(param.partition(".")[0])
        if self.whole:
            return 0
        start = f"{self.units}."
        return int(param.removeprefix(start).partition(".")[0]) if self.units and param.startswith(start) else None

    def stored_dtype(self, name: str) -> torch.dtype:
        """The element type of a parameter."""
        return self.names.params[name].dtype

    def dtype_of(self, tensor: StoredTensor) -> torch.dtype:
        """The element type of a tensor."""
        return self.stored_dtype(tensor.name)

    def starts_without(self, modules: Iterable[str]) -> bool:
        """Whether transformers can build a model of this config around packed weights; other modules are not built anew."""
        import transformers

        if not isinstance(self.model, transformers.PreTrainedModel):
            return True
        config = {**self.config, "architectures": [type(self.model).__name__]}
        try:
            return starts_without(build_model(config, self.where), modules)
        except FileFormatError:  # a class that transformers does not have
            return True

    def learn_alone(self) -> None:
        """No batch is there to run: layers whose class has a program of its own are run alone."""
        beside: dict[str, str] = {}
        for layer in [m for m in self.model.modules() if isinstance(m, torch.nn.Linear) and has_own_program(m)]:
            params = {n: p for n, p in self.names.params.items() if p is layer._parameters.get("weight")}
            x = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0)).to(layer.weight)
            try:
                flow = trace(layer, params, functools.partial(layer, x))
            except REFUSALS as error:
                beside |= dict.fromkeys(params, f"alone it does not run: {said(error)}")
                continue
            beside |= (
                dict.fromkeys(params, "its weight is not multiplied") if not flow.uses else {**flow.bare, **flow.beside}
            )
        foreign = [m for m in self.model.modules() if not type(m).__module__.startswith("transformers.")]
        stacks = {id(p) for m in foreign for p in m.parameters(recurse=False) if is_stack(m, p)}
        unknown = {n: "how, only batches would tell" for n, p in self.names.params.items() if id(p) in stacks}
        self.run_as_whole(Facts(bare=unknown, beside=beside))

    def learn(self, batch: Inputs) -> None:
        """Take from one run which weights choose experts, and which are read otherwise than in products.

        Raises:
            SchemeError: the model does not run on this batch.
        """
        self.example = batch
        whole = Whole(self.instance())
        _, (call,) = whole.begin(batch)
        self.facts = Facts.of(trace(self.model, self.names.params, lambda: whole.run(0, torch.zeros(0), call)))
        self.__dict__.pop("tensors", None)


class Held(Instance):
    """The instance of a model in memory: filling and dropping do nothing."""

    def __init__(self, source: InMemory) -> None:
        self.names, self.where, self.overlay = source.names, source.where, Overlay()
        self.model = source.model
        self.empty = dict(source.names.params)
        self.device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self._inputs, self.spread, self._rounders = {}, {}, []

    def fill(self, params: Iterable[str], dtype: torch.dtype = torch.float32) -> None:
        """Nothing to do."""

    def drop(self, params: Iterable[str]) -> None:
        """Nothing to do."""

    def is_empty(self, param: str) -> bool:
        return False
