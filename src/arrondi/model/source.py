"""Where a model comes from: `OnDisk`, a checkpoint and its model on the meta device.

A source gives sites, tensors and the config; `instance()` gives a model that can be run from it.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from arrondi.checkpoint import Checkpoint
from arrondi.checkpoint.containers.tensor_file import read_bytes
from arrondi.errors import FileFormatError, SchemeError
from arrondi.model.build import build_model, starts_without
from arrondi.model.chain import Chain
from arrondi.model.instance import Instance, Rounding
from arrondi.model.names import Names
from arrondi.model.overlay import Overlay
from arrondi.model.probe import probe
from arrondi.model.shapes import facts_by_shapes, unreached_by_text
from arrondi.model.site import Facts, Site, StoredTensor, find_tensors
from arrondi.model.towers import deaf_parameters
from arrondi.model.units import find_lists
from arrondi.model.whole import Whole

_CPU = torch.device("cpu")
_COMPARED = 32 << 20
"""Bytes of stored tensors that are compared at a time."""
_NAMED = 3
"""Missing tensors that a message names."""


class OnDisk:
    """A model directory, plain or quantized, without its weights.

    Attributes:
        checkpoint: where weights come from.
        model: the transformers model, its parameters on the meta device.
        names: the way from stored tensors to parameters.
        whole: the model is run as one unit.
        settled: what the model itself computes at the ends of one batch; see `settle`.

    Raises:
        FileFormatError: not a model that transformers knows, or tensors of it are missing.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
        """
        Args:
            dtype: of computed buffers, as in transformers.
        """
        self.checkpoint = checkpoint
        self.where: Path = checkpoint.folder.path
        self.home: Path = checkpoint.folder.home
        self.model = build_model(checkpoint.folder.model_config, self.where, dtype)
        self.names = Names(self.model, checkpoint.names, self.where)
        if self._untied():
            self.names = Names(self.model, checkpoint.names, self.where)
        self._refuse_missing()
        self.whole = False
        self.settled: torch.Tensor | None = None

    @classmethod
    def open(cls, path: str | Path) -> OnDisk:
        """Open a model directory."""
        return cls(Checkpoint.open(path))

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self.checkpoint.folder.config

    @property
    def config_key(self) -> str:
        """Key of the part of config.json that is the model's own config; "" where that is all of it."""
        kind = self.model.config.model_type
        if self.config["model_type"] == kind:
            return ""
        parts = {k: v for k, v in self.config.items() if isinstance(v, dict)}
        return next((k for k, v in parts.items() if v.get("model_type") == kind), "")

    @property
    def to_load(self) -> int:
        """Bytes that all weights take in float32."""
        return 4 * sum(p.numel() for p in self.model.parameters())

    def instance(self, overlay: Overlay | None = None, device: torch.device = _CPU) -> Instance:
        """The model, changed as the overlay says, filled on a device."""
        return Instance(self, overlay, device)

    @property
    def units(self) -> str:
        """Name of the list of blocks that run one after another, "" if there is none."""
        return "" if self.whole else self._probed[0]

    @cached_property
    def facts(self) -> Facts:
        """What running the units once, with made-up weights, says of the parameters; a quantized file says itself how its stacks lie."""
        placed, known = self.checkpoint.placed, dict[str, bool]()
        for group in self.names.groups:
            own = placed.get(group.sources[0])
            if own is not None and len(own.shape) == 3 and group.convert is None:
                known |= dict.fromkeys(group.targets, own.transposed)
        facts = self._probed[1]
        flipped = {n for n in facts.flipped if n not in known} | {n for n, turned in known.items() if turned}
        return replace(facts, flipped=frozenset(flipped), unreached=facts.unreached | deaf_parameters(self.model))

    @cached_property
    def _probed(self) -> tuple[str, Facts]:
        return probe(self, find_lists(self.model))

    @cached_property
    def tensors(self) -> list[StoredTensor]:
        """Every tensor that a file of this model holds."""
        return find_tensors(self.names, self.facts, self.block_of)

    @cached_property
    def sites(self) -> list[Site]:
        """Everything that multiplies, in the order of the files."""
        return [s for t in self.tensors for s in t.sites]

    def check_computed(self) -> None:
        """Refuse what the schemes of a quantized checkpoint ask for and nothing here does.

        Raises:
            SchemeError: outputs, the key/value cache, or the inputs of an embedding are to be rounded.
        """
        for name, placed in self.checkpoint.placed.items():
            if placed.scheme.outputs is not None or placed.scheme.kv is not None:
                raise SchemeError(
                    f"{name}: {placed.scheme} rounds outputs or the key/value cache, which is not computed here. Give the original model, or run it elsewhere."
                )
        embeddings = {s.tensor for s in self.sites if s.kind == "embedding"} & self.checkpoint.placed.keys()
        for name in sorted(embeddings):
            scheme = self.checkpoint.placed[name].scheme
            if scheme.inputs is not None:
                raise SchemeError(
                    f"{name}: {scheme} rounds the inputs of an embedding, which are token ids. Give embeddings a group of their own."
                )

    def rounded_inputs(self, without: Container[str] = ()) -> Rounding:
        """Module → how its input is rounded, of a checkpoint that is quantized; but of modules `without`."""
        found: Rounding = {}
        for tensor in self.tensors:
            scheme = self.checkpoint.inputs_of(tensor.name) if tensor.name in self.checkpoint.placed else None
            modules = [m for site in tensor.sites for m in site.rounds_inputs if m not in without]
            if scheme is not None and modules:
                apart = self.checkpoint.placed[tensor.name].scheme.weights.apart
                values = None if scheme.dynamic is True and apart is None else self.checkpoint.layer(tensor.name)
                how = (scheme, None, None) if values is None else (scheme, values.inputs, values.whole_columns)
                found |= dict.fromkeys(modules, how)
        return found

    def stored_dtype(self, name: str) -> torch.dtype:
        """The element type of a stored tensor."""
        return self.checkpoint.folder.entries[name].torch_dtype

    def dtype_of(self, tensor: StoredTensor) -> torch.dtype:
        """The element type of a tensor as it is written without quantization."""
        return self.stored_dtype(tensor.sources[0])

    def by_shapes(self) -> None:
        """From now on, what weights do is told by shapes alone, for those who run nothing: a unit's weights take no memory.

        A model of several senses of which shapes do not tell what text reaches is run after all.
        """
        lists = find_lists(self.model)
        units = lists[0] if lists else ""
        unreached = unreached_by_text(self.model, units)
        if unreached is not None:
            self._probed = (units, replace(facts_by_shapes(self.model), unreached=unreached))

    def run_as_whole(self, facts: Facts) -> None:
        """From now on the model is one unit, of which a run has told this."""
        self.whole, self.facts = True, replace(facts, unreached=facts.unreached | deaf_parameters(self.model))
        for name in ("tensors", "sites"):
            self.__dict__.pop(name, None)

    def units_of(self, instance: Instance) -> Chain | Whole:
        """An instance as what `walk` goes through."""
        return Whole(instance) if self.whole else Chain(instance, self.units)

    def block_of(self, param: str) -> int | None:
        """The unit that a parameter belongs to."""
        if self.whole:
            return 0
        start = f"{self.units}."
        return int(param.removeprefix(start).partition(".")[0]) if self.units and param.startswith(start) else None

    def starts_without(self, modules: Iterable[str]) -> bool:
        """Whether the class gets through its own initialisation while these modules have no `weight`.

        transformers runs it before packed weights are put in, and some classes reach for the weight unasked.
        """
        return starts_without(copy.deepcopy(self.model), modules)

    def _untied(self) -> bool:
        """Whether parameters that the config ties had to be separated: both are stored, with different values."""
        found = False
        for names in [n for n in self.names.aliases.values() if len(n) > 1]:
            stored = [n for n in names if n in self.names.group_of and self.names.group_of[n].convert is None]
            first = self.names.group_of[stored[0]].sources[0] if stored else ""
            for name in stored[1:]:
                if not self._same(first, self.names.group_of[name].sources[0]):
                    path, _, leaf = name.rpartition(".")
                    old = self.names.params[name]
                    fresh = torch.nn.Parameter(torch.empty_like(old), requires_grad=False)
                    self.model.get_submodule(path)._parameters[leaf] = fresh
                    found = True
        return found

    def _same(self, one: str, two: str) -> bool:
        """Whether two stored tensors are equal to the bit."""
        if one in self.checkpoint.placed or two in self.checkpoint.placed:
            return False
        a, b = (self.checkpoint.folder.entries[n] for n in (one, two))
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        parts = range(0, a.nbytes, _COMPARED)
        return all(torch.equal(*(read_bytes(e, o, min(_COMPARED, a.nbytes - o)) for e in (a, b))) for o in parts)

    def _refuse_missing(self) -> None:
        missing = self.names.missing()
        if missing:
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            raise FileFormatError(
                f"{self.where}: no stored tensor fills {', '.join(missing[:_NAMED])}{more}. Is a shard missing, or does config.json belong to another model?"
            )
