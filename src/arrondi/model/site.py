"""Sites: what a model multiplies by.

Owns: `Site`, the only description of "this matrix multiplies that input", and `find_sites`. A site's weight is always (out, in);
in which orientation a file or a parameter holds it, under which names the model calls it, and where it lies in a stack is said
here and nowhere else. No other file compares class names, prefixes or axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from arrondi.model.flow import Flow
from arrondi.model.flow_own import has_own_program
from arrondi.model.names import Group, Names, Piece
from arrondi.nn import factor_of

Kind = Literal["linear", "convolution", "embedding", "recurrent", "other"]


@dataclass(frozen=True)
class Site:
    """One weight that multiplies an input.

    Attributes:
        tensor: the tensor that a file holds it in, by the name under which it is written.
        index: which matrix of that tensor, if it is a stack.
        shape: (out, in), or (out, in / groups, …) of a convolution's kernel.
        kind: what multiplies: a linear layer, a convolution, a look-up, a recurrent cell.
        param: the parameter that holds it in the model.
        param_index, rows, columns: the part of the parameter.
        param_flipped: the parameter holds (in, out).
        file_flipped: the file's tensor holds (in, out).
        piece: the rectangle of the stored tensor that it comes from; None where the stored tensors are not merely moved.
        modules: every path by which the model calls it; the first is the one that configs name.
        classes: names of the classes of these modules and their bases; "Linear" is among them for whatever is a linear layer.
        block: the unit that uses it, None outside of all units.
        reads: what it multiplies: equal for sites that read the same activation; None where that is not known.
        unfit: why it cannot be held in few bits, None if it can.
        reached: token ids reach it; True where nothing is known.
    """

    tensor: str
    index: int | None
    shape: tuple[int, ...]
    kind: Kind
    param: str
    param_index: int | None
    rows: slice
    columns: slice
    param_flipped: bool
    file_flipped: bool
    piece: Piece | None
    modules: tuple[str, ...]
    classes: tuple[str, ...]
    block: int | None
    reads: str | None = None
    unfit: str | None = None
    reached: bool = True

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape of the weight as a matrix; a kernel's positions are inputs."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def rounds_inputs(self) -> tuple[str, ...]:
        """Modules whose input is rounded where the scheme rounds inputs; those of fused experts never are."""
        return self.modules if self.kind in ("linear", "convolution") and self.param_index is None else ()

    @property
    def name(self) -> str:
        """The tensor, and which matrix of it."""
        return self.tensor if self.index is None else f"{self.tensor}[{self.index}]"

    def region(self, parameter: torch.Tensor) -> torch.Tensor:
        """The site's weight inside its parameter, (out, in), as a view that may be written to.

        The kernel of a convolution is (out, in / groups · positions).
        """
        matrix = parameter if self.param_index is None else parameter[self.param_index]
        if matrix.ndim != 2:
            return matrix.flatten(1)
        part = matrix[self.rows, self.columns]
        return part.T if self.param_flipped else part

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """The site's weight inside the tensor of the file that it comes from, (out, in)."""
        assert self.piece is not None
        matrix = tensor if self.piece.source_index is None else tensor[self.piece.source_index]
        if matrix.ndim != 2:
            return matrix.flatten(1)
        part = matrix[self.piece.source_rows, self.piece.source_columns]
        return part.T if self.param_flipped is not self.piece.flipped else part

    def written(self, tensor: torch.Tensor) -> torch.Tensor:
        """The site's weight inside the tensor that is written, (out, in), as a view that may be written to."""
        matrix = tensor if self.index is None else tensor[self.index]
        if matrix.ndim != 2:
            return matrix.flatten(1)
        return matrix.T if self.file_flipped else matrix


@dataclass(frozen=True)
class Facts:
    """What running a unit once says of its parameters; empty where nothing could be run.

    Attributes:
        routers: parameters whose product chooses among experts.
        bare: parameters that are read otherwise than in a product → how.
        flipped: stacks that are summed over their middle axis: they hold (in, out).
        unreached: parameters that the model does not use on token ids.
        leaders: parameters that multiply → the first one that reads the same activation.
        reshaped: parameters of linear layers whose input does not come as (windows, tokens, n): two axes do not number its rows.
        beside: weights of layers whose class has a program of its own → what that computes besides the product.
    """

    routers: frozenset[str] = frozenset()
    bare: Mapping[str, str] = field(default_factory=dict)
    flipped: frozenset[str] = frozenset()
    unreached: frozenset[str] = frozenset()
    leaders: Mapping[str, str] = field(default_factory=dict)
    reshaped: frozenset[str] = frozenset()
    beside: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, flow: Flow) -> Facts:
        """What a run of the whole model has shown."""
        flipped = {u.param for u in flow.uses if u.matrix is not None and not u.reduces_last}
        leaders = {param: leader for stage in flow.stages for param, leader in stage.leaders.items()}
        return cls(flow.routers, flow.bare, frozenset(flipped), frozenset(), leaders, flow.reshaped, flow.beside)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the output file, if it were written without quantization.

    Attributes:
        name: under which it is written.
        shape: as written.
        sources: the stored tensors that it is made of; itself, where nothing is converted.
        sites: what of it multiplies; empty for norms, biases, buffers.
        params: the parameters (or buffers) that it fills; empty if the model has none for it.
        block: the unit that uses it, None outside of all units.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    sites: tuple[Site, ...]
    params: tuple[str, ...]
    block: int | None = None

    @property
    def converted(self) -> bool:
        """Whether the checkpoint holds it under other names, in other pieces."""
        return self.sources != (self.name,)


def find_tensors(names: Names, facts: Facts, block_of: Callable[[str], int | None]) -> list[StoredTensor]:
    """Every tensor that a file of this model holds, with its sites.

    A stored tensor that the model splits gives one tensor for each of its parts, under the names of the model's parameters;
    transformers finds those as well.

    Args:
        names: of the checkpoint and the model.
        facts: what a probe of the model said.
        block_of: parameter → the unit that uses it.
    """
    maker = _Maker(names, facts, block_of)
    found: dict[str, list[StoredTensor]] = {}
    for group in names.groups:
        for tensor in maker.tensors(group):
            tensor = replace(tensor, block=maker.block(tensor.params))
            for source in tensor.sources:
                found.setdefault(source, []).append(tensor)
    ordered: dict[str, StoredTensor] = {}
    for source, shape in names.shapes.items():
        for tensor in found.get(source) or [StoredTensor(source, tuple(shape), (source,), (), ())]:
            ordered.setdefault(tensor.name, tensor)
    return list(ordered.values())


class _Maker:
    def __init__(self, names: Names, facts: Facts, block_of: Callable[[str], int | None]) -> None:
        self.names, self.facts, self.block_of = names, facts, block_of

    def tensors(self, group: Group) -> Iterable[StoredTensor]:
        shapes = self.names.shapes
        targets = [t for t in group.targets if t in self.names.params]
        if not targets or not any(len(self.names.params[t].shape) > 1 for t in targets):
            return [StoredTensor(s, tuple(shapes[s]), (s,), (), tuple(group.targets)) for s in group.sources]
        pieces = self._pieces(group)
        by_source: dict[str, list[Piece]] = {}
        for piece in pieces:
            by_source.setdefault(piece.source, []).append(piece)
        if set(by_source) == set(group.sources) and all(self._moved(s, p) for s, p in by_source.items()):
            return [self._stored(s, p) for s, p in by_source.items()]
        return [self._split(group, t, pieces) for t in targets]

    def block(self, params: Iterable[str]) -> int | None:
        """The first unit that uses one of these parameters."""
        known = (names for p in params for names in (self.names.names_of(p) if p in self.names.params else [p]))
        return min((b for b in map(self.block_of, known) if b is not None), default=None)

    def _pieces(self, group: Group) -> list[Piece]:
        """Where stored matrices lie; a kernel of three axes is no stack."""
        if group.convert is None:
            (param,) = group.targets
            parameter = self.names.params[param]
            if not is_stack(self.names.model.get_submodule(param.rpartition(".")[0]), parameter):
                rows, columns = (slice(0, n) for n in parameter.shape[:2])
                return [Piece(group.sources[0], None, rows, columns, param, None, rows, columns)]
        return self.names.pieces(group)

    def _moved(self, source: str, pieces: list[Piece]) -> bool:
        """Whether every matrix of a stored tensor lies in one piece in the model."""
        shape = self.names.shapes[source]
        if pieces[0].source_index is None and len(shape) != 2:
            return len(pieces) == 1
        whole = (slice(0, shape[-2]), slice(0, shape[-1]))
        count = 1 if len(shape) == 2 else shape[0]
        return len(pieces) == count and all((p.source_rows, p.source_columns) == whole for p in pieces)

    def _stored(self, source: str, pieces: list[Piece]) -> StoredTensor:
        """A stored tensor whose every matrix is a site."""
        sites = [self._site(source, p.source_index, p) for p in sorted(pieces, key=lambda p: p.source_index or 0)]
        params = tuple(dict.fromkeys(p.param for p in pieces))
        return StoredTensor(source, tuple(self.names.shapes[source]), (source,), tuple(sites), params)

    def _split(self, group: Group, param: str, pieces: list[Piece]) -> StoredTensor:
        """A parameter that is made of parts of stored tensors."""
        shape = tuple(self.names.params[param].shape)
        count = range(shape[0]) if len(shape) == 3 else [None]
        sites = []
        for e in count:
            own = [p for p in pieces if p.param == param and p.index == e]
            whole = Piece(
                param, e, slice(0, shape[-2]), slice(0, shape[-1]), param, e, slice(0, shape[-2]), slice(0, shape[-1])
            )
            sites.append(self._site(param, e, own[0] if len(own) == 1 else None, whole))
        return StoredTensor(param, shape, tuple(group.sources), tuple(sites), (param,))

    def _site(self, tensor: str, index: int | None, piece: Piece | None, place: Piece | None = None) -> Site:
        place = place or piece
        assert place is not None
        parameter = self.names.params[place.param]
        aliases = self.names.names_of(place.param)
        owners = [a.rpartition(".")[0] for a in aliases]
        modules = [self.names.model.get_submodule(o) for o in owners]
        module = modules[0]
        named = [c.__name__ for m in modules for c in type(m).__mro__[:-1] if c is not torch.nn.Module]
        kinds = [kind_of(m, parameter) for m in modules]
        classes = tuple(dict.fromkeys([*named, *(["Linear"] if "linear" in kinds else [])]))
        kind: Kind = "embedding" if "embedding" in kinds else kinds[0]
        fused = is_stack(module, parameter)
        flipped = self._flipped(module, place.param, parameter)
        shape = tuple(parameter.shape)
        if fused or len(shape) == 2:
            shape = (place.rows.stop - place.rows.start, place.columns.stop - place.columns.start)
            shape = shape[::-1] if flipped else shape
        # A tensor under the model's own name keeps the parameter's orientation; a stored one may have the other.
        file_flipped = flipped if piece is None or tensor == place.param else flipped is not piece.flipped
        paths = tuple(self._path(tensor, o) for o in owners) if fused and index is None else tuple(owners)
        return Site(
            tensor, index, shape, kind, place.param, place.index, place.rows, place.columns, flipped, file_flipped, piece,
            paths, classes, self.block(aliases),
            self._reads(aliases, place.index), self._unfit(aliases, kind, classes, modules), not all(a in self.facts.unreached for a in aliases),
        )  # fmt: skip

    def _path(self, tensor: str, owner: str) -> str:
        """One expert of a fused parameter as a module: what it was before transformers fused it."""
        stem, lead = tensor.removesuffix(".weight"), f"{self.names.model.base_model_prefix}."
        return lead + stem if owner.startswith(lead) and not stem.startswith(lead) else stem

    def _flipped(self, module: Any, param: str, parameter: torch.Tensor) -> bool:
        if is_stack(module, parameter):
            return param in self.facts.flipped or bool(getattr(module, "is_transposed", False))
        return _is_conv1d(module)

    def _reads(self, aliases: list[str], index: int | None) -> str | None:
        leader = next((self.facts.leaders[a] for a in aliases if a in self.facts.leaders), None)
        return leader if index is None or leader is None else f"{leader}[{index}]"

    def _unfit(self, aliases: list[str], kind: Kind, classes: tuple[str, ...], modules: list[Any]) -> str | None:
        if any(a in self.facts.routers for a in aliases):
            return "a router: its output chooses experts, and runtimes want it plain"
        if kind == "recurrent":
            return None  # its cells read the weight themselves, and keep rounded numbers instead of codes
        bare = next((self.facts.bare[a] for a in aliases if a in self.facts.bare), None)
        if bare is not None:
            return f"the model reads the weight itself ({bare}), not only its products"
        beside = next((self.facts.beside[a] for a in aliases if a in self.facts.beside), None)
        if beside is not None:
            return f"its class computes more than the product ({beside})"
        if kind == "embedding":
            return self._unfit_table(aliases, modules)
        if kind == "convolution" and any("Transpose" in c for c in classes):
            return "a transposed convolution"
        if kind == "convolution" and any(has_own_program(m) for m in modules):
            return f"a convolution that computes in a way of its own ({classes[0]})"
        if kind == "other":
            return f"not a matrix product ({'/'.join(classes)})"
        return None

    def _unfit_table(self, aliases: list[str], modules: list[Any]) -> str | None:
        """Why a table, or what it is tied to, cannot hold packed rows."""
        for alias, module in zip(aliases, modules, strict=True):
            kind = kind_of(module, self.names.params[alias])
            table = kind == "embedding" and alias.endswith(".weight") and factor_of(module) is not None
            if not table and not (kind == "linear" and not _is_conv1d(module)):
                return f"an embedding that is looked up in a way of its own ({type(module).__name__})"
            if kind == "linear" and has_own_program(module):
                return f"it is tied to {alias}, whose class computes more than the product ({type(module).__name__})"
        return None


def kind_of(module: torch.nn.Module, parameter: torch.Tensor) -> Kind:
    """What a module does with one of its parameters."""
    nn = torch.nn
    own = module._parameters.get("weight") is parameter  # a subclass may have matrices besides
    if is_stack(module, parameter) or (own and (isinstance(module, nn.Linear) or _is_conv1d(module))):
        return "linear"
    if own and isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent"
    if isinstance(module, nn.Embedding) or "Embedding" in type(module).__name__:
        return "embedding"
    return "other"


def is_stack(module: torch.nn.Module, parameter: torch.Tensor) -> bool:
    """Whether a parameter holds one matrix for each expert."""
    return parameter.ndim == 3 and getattr(module, "num_experts", None) == parameter.shape[0]


def _is_conv1d(module: torch.nn.Module) -> bool:
    """transformers' Conv1D: a linear layer that holds (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")
