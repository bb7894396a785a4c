"""A transformers model without its weights, and the way from every stored tensor to the parameter that it fills.

Owns: `Skeleton`. The model is built with its parameters on the meta device; `fill` reads the tensors of some parameters from
the checkpoint and `drop` gives the memory back. Names and conversions (prefixes, per-expert tensors fused into one parameter)
are transformers' own, so whatever it loads is loaded here; where a stored tensor ends up inside a fused parameter is found by
sending marked tensors through the conversion.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from arrondi.checkpoint import Checkpoint
from arrondi.errors import FileFormatError


@dataclass(frozen=True)
class Slot:
    """Where a stored matrix lies in a parameter.

    Attributes:
        param: name of the parameter.
        index: which matrix of a 3-D parameter, None for a matrix parameter.
        rows, columns: the part of that matrix.
        flipped: the parameter holds the transpose of the stored matrix.
        source_index: which matrix of the stored tensor, if that is itself a stack.
    """

    param: str
    index: int | None = None
    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))
    flipped: bool = False
    source_index: int | None = None


@dataclass
class _Group:
    """Stored tensors that are converted together, and the parameters that they fill."""

    sources: list[str]
    targets: list[str]
    convert: Callable[[list[torch.Tensor]], dict[str, torch.Tensor]] | None
    slots: dict[str, list[Slot]] | None = field(default=None)


class _EmptyOnMeta(TorchFunctionMode):
    """While a model is built, `torch.empty` (parameters) allocates nothing; computed buffers stay real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def build_model(config: dict[str, Any], folder: object, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a config.json, in eval mode, its parameters empty.

    Raises:
        FileFormatError: transformers does not know the architecture, or it needs code from the checkpoint.
    """
    import transformers

    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    names = plain.get("architectures") or []
    kind = plain.get("model_type")
    if not isinstance(kind, str):
        raise FileFormatError(f"{folder}: config.json has no model_type. Is this a model of transformers?")
    if plain.get("auto_map") and kind not in transformers.CONFIG_MAPPING:
        raise FileFormatError(
            f"{folder}: this model needs code that comes with it, which is not run here. Use a model that transformers itself knows."
        )
    if kind not in transformers.CONFIG_MAPPING:
        raise FileFormatError(
            f"{folder}: transformers {transformers.__version__} does not know model_type {kind!r}. Update transformers, or check config.json."
        )
    try:
        parsed = transformers.CONFIG_MAPPING[kind](**plain)
        found = [getattr(transformers, n, None) for n in names]
        cls = next((c for c in found if c is not None), None)
        if cls is None:
            cls = transformers.MODEL_MAPPING[type(parsed)]
        parsed.use_cache = False
        parsed._experts_implementation = "eager"
        with _quiet_transformers(), torch.random.fork_rng(devices=[]), _EmptyOnMeta(), _default_dtype(dtype):
            model = cls._from_config(parsed, dtype=dtype)
    except Exception as error:  # whatever a class of transformers raises, it is the config that is wrong
        raise FileFormatError(
            f"{folder}: config.json does not give a {names or kind} model: {type(error).__name__}: {error}"
        ) from error
    _empty_parameters(model)
    return model.eval()


def _empty_parameters(model: torch.nn.Module) -> None:
    """Put the parameters that were made with values (norms, zero biases) on the meta device too; ties stay ties."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                made.setdefault(id(parameter), torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
                module._parameters[leaf] = made[id(parameter)]


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(old)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


class Skeleton:
    """A model whose parameters are filled from a checkpoint when they are needed.

    Attributes:
        model: the transformers model; parameters that are not filled are on the meta device.
        checkpoint: where weights come from. Computed buffers have the type `dtype`, as in transformers.
        unused: stored tensors that are no parameter of this model.
        missing: parameters that the checkpoint does not have (filled with zeros).
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
        self.checkpoint = checkpoint
        self.model = build_model(checkpoint.folder.config, checkpoint.folder.path, dtype)
        self.empty = dict(self.model.named_parameters(remove_duplicate=False))
        self.aliases: dict[int, list[str]] = {}
        for name, parameter in self.empty.items():
            self.aliases.setdefault(id(parameter), []).append(name)
        self.buffers = {n for n, _ in self.model.named_buffers()}
        self._groups, self.unused = self._map_names()
        self._by_target = {t: g for g in self._groups for t in g.targets}
        self._check_shapes()
        self.overrides: dict[str, torch.Tensor] = {}

    def names_of(self, param: str) -> list[str]:
        """All names of a parameter: tied ones have several."""
        return self.aliases[id(self.empty[param])]

    @cached_property
    def missing(self) -> list[str]:
        """One name of every parameter that no stored tensor fills."""
        return [names[0] for names in self.aliases.values() if not any(n in self._by_target for n in names)]

    def sources(self, param: str) -> list[str]:
        """The stored tensors that fill a parameter (through any of its names)."""
        for name in self.names_of(param):
            if name in self._by_target:
                return self._by_target[name].sources
        return []

    @cached_property
    def params_of(self) -> dict[str, list[str]]:
        """Stored tensor → the parameters that it fills, first names only."""
        return {s: g.targets for g in self._groups for s in g.sources}

    def slots(self, source: str) -> list[Slot]:
        """Where a stored tensor lies; empty if the conversion does more than move it."""
        target = self.params_of.get(source, [None])[0]
        if target is None or target not in self.empty:
            return []
        group = self._by_target[target]
        if group.slots is None:
            group.slots = self._find_slots(group)
        return group.slots.get(source, [])

    def fill(self, params: Iterable[str], dtype: torch.dtype = torch.float32) -> None:
        """Read these parameters (and whatever shares their storage or their conversion), floating ones in `dtype`."""
        wanted = {id(self.empty[p]): p for p in params}
        done: set[int] = set()
        for key, param in wanted.items():
            if key in done or not self.is_empty(param):
                continue
            group = next((self._by_target[n] for n in self.aliases[key] if n in self._by_target), None)
            if group is None:
                self._assign(param, torch.zeros(self.empty[param].shape, dtype=self.empty[param].dtype), dtype)
                continue
            tensors = [self.tensor(s, dtype) for s in group.sources]
            values = {group.targets[0]: tensors[0]} if group.convert is None else group.convert(tensors)
            for target, value in values.items():
                if target in self.empty:
                    self._assign(target, value, dtype)
                    done.add(id(self.empty[target]))

    def tensor(self, source: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A stored tensor in `dtype`, or its override."""
        if source in self.overrides:
            return self.overrides[source]
        return self.checkpoint.dense(source, dtype)

    def is_empty(self, param: str) -> bool:
        module, leaf = self._owner(param)
        return bool(module._parameters[leaf].device.type == "meta")

    def drop(self, params: Iterable[str]) -> None:
        """Give the memory of these parameters back."""
        for param in params:
            for name in self.names_of(param):
                module, leaf = self._owner(name)
                module._parameters[leaf] = self.empty[name]

    def starts_without(self, modules: Iterable[str]) -> bool:
        """Whether the class gets through its own initialisation while these modules have no `weight`.

        transformers runs it before packed weights are put in, and some classes reach for the weight unasked.
        """
        model = copy.deepcopy(self.model)  # initialising writes buffers
        for module in {m for n, m in model.named_modules() if n in set(modules)}:
            module._parameters.pop("weight", None)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                for module in model.modules():
                    model._init_weights(module)
        except AttributeError:
            return False
        return True

    def load_buffers(self) -> None:
        """Read stored buffers (running statistics and the like) into the model."""
        for group in self._groups:
            for target in group.targets:
                if target in self.buffers:
                    module, leaf = self._owner(target)
                    exact = any(name in target for name in self.model._keep_in_fp32_modules_strict or ())
                    kind = torch.float32 if exact else module._buffers[leaf].dtype
                    module._buffers[leaf] = self.checkpoint.dense(group.sources[0]).to(kind)

    def parameter(self, param: str) -> torch.Tensor:
        """The parameter as it is now."""
        module, leaf = self._owner(param)
        found: torch.Tensor = module._parameters[leaf]
        return found

    def _owner(self, name: str) -> tuple[Any, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf

    def _assign(self, param: str, value: torch.Tensor, dtype: torch.dtype) -> None:
        wanted = self.empty[param]
        if tuple(value.shape) != tuple(wanted.shape):
            raise FileFormatError(
                f"{self.checkpoint.folder.path}: {param} should have shape {tuple(wanted.shape)}, the file has {tuple(value.shape)}."
            )
        if value.dtype.is_floating_point:
            value = value.to(dtype)
        # The zero-copy case would alias an override that the caller still owns.
        filled = torch.nn.Parameter(value.contiguous(), requires_grad=False)
        for name in self.names_of(param):
            module, leaf = self._owner(name)
            module._parameters[leaf] = filled

    def _map_names(self) -> tuple[list[_Group], list[str]]:
        """Group the stored tensors by the parameter that transformers would load them into."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        rules = get_model_conversion_mapping(self.model)
        renamings = [r for r in rules if isinstance(r, WeightRenaming)]
        converters = [r for r in rules if isinstance(r, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        state = {
            **dict(self.model.named_parameters(remove_duplicate=False)),
            **dict(self.model.named_buffers()),
        }
        prefix = self.model.base_model_prefix
        plain: list[_Group] = []
        converted: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        unused = []
        for source in sorted(self.checkpoint.names, key=dot_natural_key):
            target, pattern = rename_source_key(source, renamings, converters, prefix, state)
            if target not in state and source in state:
                target, pattern = source, None
            if target not in state:
                unused.append(source)
            elif pattern is None:
                plain.append(_Group([source], [target], None))
            else:
                converted.setdefault(target, (by_pattern[pattern], []))[1].append((source, pattern))
        return plain + [self._conversion(t, c, found) for t, (c, found) in converted.items()], unused

    def _conversion(self, target: str, converter: Any, found: list[tuple[str, str]]) -> _Group:
        def convert(tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
            fresh = copy.deepcopy(converter)
            for (source, pattern), tensor in zip(found, tensors, strict=True):
                fresh.add_tensor(target, source, pattern, tensor)
            values = fresh.convert(target, model=self.model, config=self.model.config)
            return {n: v[0] if isinstance(v, list) else v for n, v in values.items()}

        names = self.checkpoint.names
        sources = [s for s, _ in found]
        shapes = convert([torch.empty(names[s], device="meta") for s in sources])
        return _Group(sources, list(shapes), convert)

    def _check_shapes(self) -> None:
        for group in self._groups:
            if group.convert is not None or group.targets[0] not in self.empty:
                continue
            have, want = self.checkpoint.names[group.sources[0]], tuple(self.empty[group.targets[0]].shape)
            if tuple(have) != want:
                raise FileFormatError(
                    f"{self.checkpoint.folder.path}: {group.sources[0]} has shape {tuple(have)}, config.json says {want}. Do the weights belong to this config?"
                )

    def _find_slots(self, group: _Group) -> dict[str, list[Slot]]:
        names = self.checkpoint.names
        if group.convert is None:
            source, target = group.sources[0], group.targets[0]
            shape = names[source]
            if len(shape) == 3:
                return {source: [Slot(target, e, source_index=e) for e in range(shape[0])]}
            return {source: [Slot(target)]}
        marked = group.convert(
            [torch.tensor(i, dtype=torch.int16).expand(names[s]) for i, s in enumerate(group.sources)]
        )
        slots: dict[str, list[Slot]] = {s: [] for s in group.sources}
        for target, value in marked.items():
            stack = value if value.ndim == 3 else value.unsqueeze(0)
            for e, matrix in enumerate(stack):
                for i in torch.unique(matrix).tolist():
                    slot = self._region(matrix == i, names[group.sources[i]], target, e if value.ndim == 3 else None)
                    if slot is None:
                        return {}
                    slots[group.sources[i]].append(slot)
        square = any(len(set(names[s])) == 1 for s in group.sources)
        return self._detect_flips(group, slots) if square else slots

    @staticmethod
    def _region(mask: torch.Tensor, shape: tuple[int, ...], target: str, index: int | None) -> Slot | None:
        """The rectangle that a marked tensor fills, if it is one of its own shape or of its transpose."""
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        r, c = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
        size = (r.stop - r.start, c.stop - c.start)
        if not bool(mask[r, c].all()) or sorted(size) != sorted(shape):
            return None
        return Slot(target, index, r, c, flipped=size != tuple(shape))

    def _detect_flips(self, group: _Group, slots: dict[str, list[Slot]]) -> dict[str, list[Slot]]:
        """Square tensors look alike when transposed: send row numbers through and see along which axis they run."""
        assert group.convert is not None
        names = self.checkpoint.names
        numbered = [torch.arange(names[s][0], dtype=torch.float32).unsqueeze(1).expand(names[s]) for s in group.sources]
        values = group.convert(numbered)
        found: dict[str, list[Slot]] = {}
        for source, places in slots.items():
            found[source] = []
            for slot in places:
                matrix = values[slot.param] if slot.index is None else values[slot.param][slot.index]
                part = matrix[slot.rows, slot.columns]
                flipped = bool((part[0] != part[0, 0]).any())
                found[source].append(Slot(slot.param, slot.index, slot.rows, slot.columns, flipped))
        return found
