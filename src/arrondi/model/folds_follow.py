"""Which channels of what each matrix multiplies, seen while a skeleton runs: `follow`.

Operations are watched below Python, where nothing is hidden: scripted functions, attention and fused layers are made of the same few.
An operation that is not known reads its operands for another purpose, so that what is not understood is never scaled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from arrondi.model.flow_ops import ATEN, Call
from arrondi.model.flow_regions import Reads, Regions, storage_key
from arrondi.model.flow_routers import tensors_of
from arrondi.model.flow_uses import Use, uses_of
from arrondi.model.folds_ops import MAKES, MOVES, RULES, ZEROS, added, constant, origins, spoiled
from arrondi.model.folds_shadow import FIRST, OTHER, Origin, Shadows, Tags
from arrondi.model.skeleton import compute

_COPIES: Final = {"clone", "_to_copy"}
_ADDMM: Final = {"addmm", "baddbmm", "addmv", "addmm_", "baddbmm_", "addmv_"}
_MIXED: Final = "its channels are mixed by a product of two activations"


@dataclass(frozen=True)
class Read:
    """One product of an activation with a matrix.

    Attributes:
        use: the parameter, which part of it, and the number of the activation.
        columns: for everything that the activation is of, the channel of each of its columns, as in a shadow.
        note: what made the activation, in words.
    """

    use: Use
    columns: Mapping[Origin, torch.Tensor]
    note: str


@dataclass
class Followed:
    """What one run has shown.

    Attributes:
        reads: every product with a matrix, in order.
        origins: everything that can be scaled channel by channel.
        bare: parameter → how it is read otherwise than in a product.
        lost: parameters of products whose rows are not found again in the result.
    """

    reads: list[Read] = field(default_factory=list)
    origins: dict[tuple[Any, ...], Origin] = field(default_factory=dict)
    bare: dict[str, str] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)


def follow(model: nn.Module, params: Mapping[str, torch.Tensor], run: Callable[[], Any]) -> Followed:
    """Watch `run`, which runs the skeleton `model` with the parameters `params`; what it returns is read by others."""
    followed = Followed()
    with _places(model) as place, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        follower = _Follower(params, followed, place)
        with follower:
            result = run()
        spoiled(follower.shadows, [result], "the model returns it")
    return followed


@contextlib.contextmanager
def _places(model: nn.Module) -> Iterator[Callable[[], str]]:
    """The path of the module that runs."""
    paths = {id(m): path for path, m in model.named_modules()}
    running: list[str] = []
    handles = (
        register_module_forward_pre_hook(lambda module, args: running.append(paths.get(id(module), ""))),
        register_module_forward_hook(lambda module, args, result: _left(running), always_call=True),
    )
    try:
        yield lambda: running[-1] if running else ""
    finally:
        for handle in handles:
            handle.remove()


def _left(running: list[str]) -> None:
    running.pop()


class _Follower(TorchDispatchMode):
    def __init__(self, params: Mapping[str, torch.Tensor], followed: Followed, place: Callable[[], str]) -> None:
        super().__init__()
        self.shadows = Shadows()
        self._followed, self._place = followed, place
        self._regions, self._reads, self._order = Regions(params), Reads(), 0
        for name, param in params.items():
            if not param.is_meta and param.numel() > 1:
                origin = self._origin("norm", name, None, param.numel())
                shadow = torch.arange(param.numel(), dtype=torch.int32).add_(FIRST).reshape(param.shape)
                self.shadows.write(param, {origin: shadow})
                self.shadows.hold(param, origin)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        parse = ATEN.get(func.overloadpacket)
        if parse is None and torch.is_inference_mode_enabled() and func._can_decompose():
            with self:  # inference mode leaves operations whole that are made of others
                whole = func.decompose(*args, **kwargs)
            if whole is not NotImplemented:
                return whole
        given = list(tensors_of((args, kwargs)))
        name = func.overloadpacket.__name__ if func.namespace == "aten" else str(func)
        result = compute(func, args, kwargs)
        results = list(tensors_of([result]))
        written = [
            a for a, s in zip(args, func._schema.arguments, strict=False) if s.alias_info and s.alias_info.is_write
        ]
        written += [kwargs[s.name] for s in func._schema.arguments if s.is_out and s.name in kwargs]
        if not written and results and _is_view(given, results):
            return result
        for tensor in tensors_of(written):
            self._reads.changed(tensor)
        if name in MAKES:
            tags: Tags = {}
        elif parse is not None:
            tags = self._product(name, parse(args, kwargs)[0], args, results[0])
        else:
            tags = self._other(name, func, args, kwargs, given, results)
        zero = name in ZEROS or (
            name in ("full", "scalar_tensor", "new_full", "full_like", "fill_") and not _number(args)
        )
        note = self.shadows.note(given[0]) if name in MOVES and given else name
        for i, tensor in enumerate(dict.fromkeys([*results, *tensors_of(written)])):
            if not tensor.is_meta:
                self.shadows.write(tensor, tags if i == 0 else {}, note, zero=zero)
        if name in _COPIES and results:
            self._copied(args[0], results[0])
        return result

    # ── what is no product ────────────────────────────────────────────────────────────────────────────────────────────

    def _other(self, name: str, func: Any, args: Any, kwargs: Any, given: list[Any], results: list[Any]) -> Tags:
        if name in _COPIES and results[0].is_floating_point():
            return self.shadows.of(args[0])
        for tensor in given:
            for param in self._regions.names(tensor) if tensor in self._regions else ():
                self._followed.bare.setdefault(param, f"{name} in {self._place() or 'the model'}")
        shifted = self._shifted(name, args)
        if shifted is not None:
            return shifted
        for origin in {self.shadows.bare(t) for t in given} - {None}:
            assert origin is not None
            origin.reads += 1
        rule = RULES.get(name)
        if rule is None or not results or not results[0].is_floating_point() or results[0].is_meta:
            return spoiled(self.shadows, given, f"{name.strip('_')} is taken of it")
        return rule(self.shadows, func, args, kwargs)

    def _shifted(self, name: str, args: Any) -> Tags | None:
        """A number plus a parameter: what is multiplied by the sum is scaled by another parameter."""
        if name != "add" or len(args) < 2 or not isinstance(args[1], int | float) or not args[1]:
            return None
        held = self.shadows.bare(args[0]) if isinstance(args[0], torch.Tensor) else None
        if held is None:
            return None
        origin = self._origin("norm", held.param, None, held.count, offset=float(args[1]))
        return {origin: self.shadows.seen_as(args[0], held)}

    def _copied(self, source: torch.Tensor, copy: torch.Tensor) -> None:
        if source in self._regions:
            self._regions.copied(source, copy)
            if copy not in self._regions:
                self._bare(source, "a part of it is copied")
        held = self.shadows.bare(source)
        if held is not None:
            self.shadows.hold(copy, held)

    # ── products ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _product(self, name: str, call: Call, args: Any, result: torch.Tensor) -> Tags:
        tags = self._with_weight(call, result) if call.right in self._regions else None
        if tags is None and call.weight == "either" and call.left in self._regions:
            tags = self._with_weight(call, result)
        if tags is None:
            tags = self._of_activations(call, result)
        third = 0 if name in _ADDMM else 2
        bias = args[third] if name in _ADDMM or (name in ("linear", "convolution") and len(args) > third) else None
        if bias is None:
            return tags
        held = self.shadows.bare(bias)
        if held is not None:
            held.reads += 1
        if bias in self._regions and bias.is_meta:
            self._bare(bias, "it is added")
        return added(self.shadows, result, bias, tags) if name != "convolution" else {}

    def _with_weight(self, call: Call, result: torch.Tensor) -> Tags:
        uses = list(uses_of(call, self._regions, self._reads, self._count))
        right = call.right in self._regions
        weight, x = (call.right, call.left) if right else (call.left, call.right)
        names = self._regions.names(weight)
        if x in self._regions:
            self._bare(x, "an operand of a product")
        if call.kind == "embedding":
            self._bare(weight, "rows are looked up")
            return {}
        if not uses or call.kind == "convolution" or self._regions.find(weight) is None:
            what = "a convolution" if call.kind == "convolution" else "a product that is not followed"
            self._followed.lost.update(names)
            if call.kind != "convolution":
                self._bare(weight, what)
            spoiled(self.shadows, [x], f"{what} reads it ({', '.join(names)})")
            self._followed.reads += [Read(_without_source(u), {}, "") for u in uses]
            return {}
        for use in uses:
            self._read(use)
        tags = {} if result.is_meta else self._outputs(call, weight, right, uses, result)
        if not tags:
            self._followed.lost.update(names)
        return tags

    def _read(self, use: Use) -> None:
        assert use.source is not None
        if not use.source.numel():
            return  # an expert that no token has reached
        columns = {}
        for origin, shadow in self.shadows.of(use.source).items():
            seen = use.see(shadow)
            several = f"the rows that {use.param} reads differ in their channels"
            columns[origin] = constant(origin, seen.reshape(-1, seen.shape[-1]), [0], False, several)
        note = self.shadows.note(use.source)
        self._followed.reads.append(Read(_without_source(use), columns, note))

    def _outputs(self, call: Call, weight: torch.Tensor, right: bool, uses: list[Use], result: torch.Tensor) -> Tags:
        """The rows of a matrix are channels of what it gives."""
        axes = call.right_axes if right else call.left_axes
        letters = _letters(call)
        region = self._regions.find(weight)
        if region is None:
            return {}
        kept = [i for i, a in enumerate(axes) if a in call.result and region.axes[i] is not None]
        stacked = [i for i in kept if len(region.shape) == 3 and region.axes[i] == 0]
        rows = [i for i in kept if i not in stacked]
        if len(rows) != 1 or len(stacked) > 1 or len(letters) != result.ndim:
            return {}
        out, axis = letters.index(axes[rows[0]]), region.axes[rows[0]]
        assert axis is not None
        numbers = torch.arange(weight.shape[rows[0]], dtype=torch.int32) * region.steps[axis] + region.starts[axis]
        shape = [1] * result.ndim
        shape[out] = -1
        shadow = (numbers + FIRST).reshape(shape).expand(result.shape)
        found: Tags = {}
        for use in uses:
            origin = self._origin("linear", use.param, use.matrix, region.shape[axis], axis=axis - len(region.shape))
            if not stacked:
                found[origin] = shadow
                continue
            of = torch.arange(weight.shape[stacked[0]]) * region.steps[0] + region.starts[0] == (use.matrix or 0)
            place = [1] * result.ndim
            place[letters.index(axes[stacked[0]])] = -1
            found[origin] = torch.where(of.reshape(place), shadow, OTHER)
        return found

    def _of_activations(self, call: Call, result: torch.Tensor) -> Tags:
        """Attention: what it gives is of the channels of the values, if they are the same for all that are summed."""
        found: Tags = {}
        letters = _letters(call)
        if call.kind in ("convolution", "embedding") or len(letters) != result.ndim:
            return spoiled(self.shadows, [call.left, call.right], f"a {call.kind} reads it")
        for origin in origins(self.shadows, [call.left, call.right]):
            seen = [self.shadows.seen_as(t, origin) for t in (call.left, call.right)]
            both = all(bool((s >= FIRST).any()) for s in seen)
            if both:
                for shadow in seen:
                    origin.spoil(shadow, _MIXED)
                continue
            which = 0 if bool((seen[0] >= FIRST).any()) else 1
            axes = (call.left_axes, call.right_axes)[which]
            summed = [i for i, a in enumerate(axes) if a not in call.result]
            one = constant(origin, seen[which], summed, False, _MIXED)
            left = [a for a in axes if a in call.result]
            shape = [one.shape[left.index(a)] if a in left else 1 for a in letters]
            found[origin] = (
                one.permute([left.index(a) for a in letters if a in left]).reshape(shape).expand(result.shape)
            )
        return found

    # ── small things ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _origin(
        self, kind: str, param: str, index: int | None, count: int, *, offset: float = 0.0, axis: int = 0
    ) -> Origin:
        key = (kind, param, index, offset, axis)
        known = self._followed.origins
        if key not in known:
            known[key] = Origin(kind, param, index, offset, axis, count, place=self._place)
        return known[key]

    def _bare(self, tensor: torch.Tensor, how: str) -> None:
        for param in self._regions.names(tensor):
            self._followed.bare.setdefault(param, f"{how} in {self._place() or 'the model'}")

    def _count(self) -> int:
        self._order += 1
        return self._order - 1


def _is_view(given: list[torch.Tensor], results: list[torch.Tensor]) -> bool:
    keys = {storage_key(t) for t in given}
    return bool(given) and all(storage_key(t) in keys for t in results)


def _letters(call: Call) -> list[Hashable]:
    """The axes of a matrix product in their order: those of the batch, rows, columns."""
    last = {"row": 1, "column": 2}
    return sorted(call.result, key=lambda a: (0, a) if isinstance(a, int) else (last.get(str(a), 3), 0))


def _number(args: Any) -> float:
    """The number that a tensor is filled with."""
    last = args[-1] if args else 1
    return float(last) if isinstance(last, int | float) else 1.0


def _without_source(use: Use) -> Use:
    """A use that keeps no activation alive."""
    return replace(use, source=None, see=lambda x: x)
