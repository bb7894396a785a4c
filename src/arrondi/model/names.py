"""Which stored tensors fill which parameters of a model, by transformers' own rules.

Owns: `Names` and `Piece`. Prefixes, renamed modules, experts that are stored one by one and fused in the model: whatever
transformers loads is loaded here by the same conversions. Where a stored matrix ends up inside a parameter is found by sending
marked tensors through the conversion.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from arrondi.errors import FileFormatError

Shapes = Mapping[str, tuple[int, ...]]
Convert = Callable[[list[torch.Tensor]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Piece:
    """A rectangle of a stored matrix, and the rectangle of a parameter that it fills.

    Attributes:
        source: name of the stored tensor.
        source_index: which matrix of it, if it is a stack.
        source_rows, source_columns: which part of that matrix.
        param: name of the parameter.
        index: which matrix of it, if it is a stack.
        rows, columns: which part of that matrix.
        flipped: the parameter holds the transpose of what is stored.
    """

    source: str
    source_index: int | None
    source_rows: slice
    source_columns: slice
    param: str
    index: int | None
    rows: slice
    columns: slice
    flipped: bool = False


@dataclass
class Group:
    """Stored tensors that are converted together, and the parameters (or buffers) that they fill.

    Attributes:
        sources, targets: names of the tensors, and of what they fill.
        convert: what turns ones into the others, None where they are equal.
        patterns: by which transformers knows each source, where it converts.
        key: equal for groups whose pieces lie alike.
        pieces: where stored matrices lie, once it was looked for.
    """

    sources: list[str]
    targets: list[str]
    convert: Convert | None = None
    patterns: tuple[str, ...] = ()
    key: tuple[Any, ...] = ()
    pieces: list[Piece] | None = field(default=None)

    @property
    def joins_weights(self) -> bool:
        """Whether transformers makes one parameter of stored tensors that it knows by the names of their weights."""
        return len(self.targets) == 1 and bool(self.patterns) and all(p.endswith(".weight") for p in self.patterns)


class Names:
    """The way from the tensors of a checkpoint to a model's parameters.

    Attributes:
        groups: what is converted together.
        unused: stored tensors that are no parameter or stored buffer of this model.
        group_of: parameter or buffer → its group.
        split: the first part that each rule of transformers for this class gives, used or not, which makes several parameters of
            one stored tensor that it knows by the name of its weight; patterns.
    """

    def __init__(self, model: Any, shapes: Shapes, where: object, *, converted: bool = True) -> None:
        """
        Args:
            model: only names and shapes are looked at.
            shapes: of every stored tensor, by name.
            where: the checkpoint, for messages.
            converted: the model is transformers', whose rules say where a tensor belongs; False: names are the parameters' own.

        Raises:
            FileFormatError: a stored tensor has another shape than the model's config says.
        """
        self.model, self.shapes, self.where = model, shapes, where
        self.params: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
        stored = model.state_dict(keep_vars=True)  # without buffers that are computed: transformers reads none of them
        self.buffers = {n: b for n, b in model.named_buffers(remove_duplicate=False) if n in stored}
        self.aliases: dict[int, list[str]] = {}
        for name, parameter in self.params.items():
            self.aliases.setdefault(id(parameter), []).append(name)
        self.split: list[str] = []
        if converted:
            self.groups, self.unused = self._grouped()
        else:
            self.groups, self.unused = [Group([n], [n]) for n in shapes], []
        self.group_of = {t: g for g in self.groups for t in g.targets}
        self.targets_of = {s: g.targets for g in self.groups for s in g.sources}
        self._known: dict[tuple[Any, ...], tuple[Group, list[Piece]]] = {}
        self._check_shapes()

    def names_of(self, param: str) -> list[str]:
        """All names of a parameter: tied ones have several."""
        return self.aliases[id(self.params[param])]

    def group(self, param: str) -> Group | None:
        """What fills a parameter, through any of its names."""
        return next((self.group_of[n] for n in self.names_of(param) if n in self.group_of), None)

    def missing(self) -> list[str]:
        """One name of every parameter and stored buffer that no tensor fills, though transformers expects one.

        Buffers of whole numbers (counters, positions) have the values that the model starts with.
        """
        ignored = ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_save")  # the latter are computed
        patterns = [p for name in ignored for p in getattr(self.model, name, None) or []]
        buffers = [[n] for n, b in self.buffers.items() if b.is_floating_point()]
        return [
            names[0]
            for names in (*self.aliases.values(), *sorted(buffers))
            if not any(n in self.group_of for n in names) and not any(re.search(p, n) for p in patterns for n in names)
        ]

    def pieces(self, group: Group) -> list[Piece]:
        """Where the stored matrices of a group lie; empty if its conversion does more than move rectangles."""
        if group.pieces is None:
            group.pieces = self._find(group)
        return group.pieces

    # ── by transformers' rules ────────────────────────────────────────────────────────────────────────────────────────

    def _grouped(self) -> tuple[list[Group], list[str]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        rules = get_model_conversion_mapping(self.model)
        renamings = [r for r in rules if isinstance(r, WeightRenaming)]
        converters = [r for r in rules if isinstance(r, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        self.split = [
            c.target_patterns[0]
            for c in converters
            if len(c.target_patterns) > 1 and all(p.endswith(".weight") for p in c.source_patterns)
        ]
        state = {**self.params, **self.buffers}
        prefix = self.model.base_model_prefix
        plain: list[Group] = []
        converted: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        unused = []
        for source in sorted(self.shapes, key=dot_natural_key):
            target, pattern = rename_source_key(source, renamings, converters, prefix, state)
            if target not in state and source in state:
                target, pattern = source, None
            if target not in state:
                unused.append(source)
            elif pattern is None:
                plain.append(Group([source], [target]))
            else:
                converted.setdefault(target, (by_pattern[pattern], []))[1].append((source, pattern))
        return plain + [self._conversion(t, c, found) for t, (c, found) in converted.items()], unused

    def _conversion(self, target: str, converter: Any, found: list[tuple[str, str]]) -> Group:
        def convert(tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
            fresh = copy.deepcopy(converter)
            for (source, pattern), tensor in zip(found, tensors, strict=True):
                fresh.add_tensor(target, source, pattern, tensor)
            values = fresh.convert(target, model=self.model, config=self.model.config)
            return {n: v[0] if isinstance(v, list) else v for n, v in values.items()}

        sources = [s for s, _ in found]
        try:
            made = convert([torch.empty(self.shapes[s], device="meta") for s in sources])
        except Exception as error:  # the conversion is transformers'; what does not fit it is the file
            raise FileFormatError(
                f"{self.where}: {sources[0]} and what belongs to it cannot be turned into {target} ({type(error).__name__}: {error}). Is a tensor missing?"
            ) from error
        for name, value in made.items():
            if name in self.params and tuple(value.shape) != tuple(self.params[name].shape):
                raise FileFormatError(
                    f"{self.where}: {len(sources)} stored tensors such as {sources[0]} give {name} the shape {tuple(value.shape)}, config.json says {tuple(self.params[name].shape)}. Is a tensor missing?"
                )
        patterns = tuple(p for _, p in found)
        key = (id(converter), tuple(self.shapes[s] for s in sources), patterns, len(made))
        return Group(sources, list(made), convert, patterns, key)

    def _check_shapes(self) -> None:
        state = {**self.params, **self.buffers}
        for group in self.groups:
            if group.convert is not None:
                continue
            have, want = self.shapes[group.sources[0]], tuple(state[group.targets[0]].shape)
            if tuple(have) != want:
                raise FileFormatError(
                    f"{self.where}: {group.sources[0]} has shape {tuple(have)}, config.json says {want}. Do the weights belong to this config?"
                )

    # ── where stored matrices lie ─────────────────────────────────────────────────────────────────────────────────────

    def _find(self, group: Group) -> list[Piece]:
        if group.convert is None:
            source, target = group.sources[0], group.targets[0]
            shape = self.shapes[source]
            if len(shape) == 3 and target in self.params:
                return [self._whole(source, target, e, shape[1:]) for e in range(shape[0])]
            return [self._whole(source, target, None, shape)]
        if not all(len(self.shapes[s]) in (2, 3) for s in group.sources):
            return []
        if group.key not in self._known:
            self._known[group.key] = (group, self._marked(group))
        # Layers are alike: what was found for one holds for all, with other names.
        like, first = self._known[group.key]
        names = dict(zip([*like.sources, *like.targets], [*group.sources, *group.targets], strict=True))
        return [
            Piece(names[p.source], p.source_index, p.source_rows, p.source_columns, names[p.param], p.index, p.rows, p.columns, p.flipped)
            for p in first
        ]  # fmt: skip

    @staticmethod
    def _whole(source: str, target: str, index: int | None, shape: tuple[int, ...]) -> Piece:
        rows = slice(0, shape[0] if shape else 1)
        columns = slice(0, shape[1] if len(shape) > 1 else 1)
        return Piece(source, index, rows, columns, target, index, rows, columns)

    def _marked(self, group: Group) -> list[Piece]:
        convert = group.convert
        assert convert is not None
        shapes = [self.shapes[s] for s in group.sources]

        def sent(values: Callable[[int, tuple[int, ...]], torch.Tensor]) -> dict[str, torch.Tensor]:
            made = convert([values(i, shape).expand(shape) for i, shape in enumerate(shapes)])
            return {n: v if v.ndim == 3 else v.unsqueeze(0) for n, v in made.items()}

        def along(axis: int) -> dict[str, torch.Tensor]:
            """Every element's index along an axis, counted from the last."""

            def numbers(_: int, shape: tuple[int, ...]) -> torch.Tensor:
                if len(shape) < -axis:
                    return torch.zeros((1,) * len(shape))
                return torch.arange(shape[axis], dtype=torch.float32).reshape(-1, *(1 for _ in range(-axis - 1)))

            return sent(numbers)

        ids = sent(lambda i, shape: torch.full((1,) * len(shape), i, dtype=torch.int16))
        rows, columns = along(-2), along(-1)
        depth = along(-3) if any(len(s) == 3 for s in shapes) else None
        found = []
        for target, stack in ids.items():
            for e, matrix in enumerate(stack):
                for i in torch.unique(matrix).tolist():
                    mask = matrix == i
                    r, c = _span(mask.any(1)), _span(mask.any(0))
                    layer = None if depth is None or len(shapes[i]) < 3 else _constant(depth[target][e][r, c])
                    placed = _read_off(rows[target][e][r, c], columns[target][e][r, c])
                    if not bool(mask[r, c].all()) or placed is None or (layer is None) is not (len(shapes[i]) < 3):
                        return []
                    index = e if self.params[target].ndim == 3 else None
                    found.append(Piece(group.sources[i], layer, *placed[:2], target, index, r, c, placed[2]))
        return found


def _span(hits: torch.Tensor) -> slice:
    where = hits.nonzero().flatten()
    return slice(int(where[0]), int(where[-1]) + 1)


def _constant(values: torch.Tensor) -> int | None:
    return int(values[0, 0]) if bool((values == values[0, 0]).all()) else None


def _read_off(rows: torch.Tensor, columns: torch.Tensor) -> tuple[slice, slice, bool] | None:
    """The stored rows and columns that a rectangle of a parameter holds, and whether it holds them transposed."""
    for flipped in (False, True):
        r, c = (rows.T, columns.T) if flipped else (rows, columns)
        first, last = int(r[0, 0]), int(c[0, 0])
        wanted = torch.arange(first, first + r.shape[0]).unsqueeze(1), torch.arange(last, last + c.shape[1])
        if bool((r == wanted[0]).all()) and bool((c == wanted[1]).all()):
            return slice(first, first + r.shape[0]), slice(last, last + c.shape[1]), flipped
    return None
