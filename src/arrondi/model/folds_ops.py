"""What operations of aten do to shadows: which of them move numbers, scale them, add them, or make something else of them.

Owns: `RULES`, operation → the shadows of its result. An operation that is in no table is one that reads its operands for another
purpose: whatever they are of cannot be scaled any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

import torch
from torch.utils._pytree import tree_map

from arrondi.model.flow_routers import tensors_of
from arrondi.model.folds_shadow import FIRST, OTHER, ZERO, Origin, Shadows, Tags

Rule = Callable[[Shadows, Any, Any, Any], Tags]
"""(shadows, operation, arguments, keyword arguments) → shadows of the (first) result."""

ADDED: Final = "something that is not scaled is added to it"
_TURNED: Final = "different channels of it are added to each other (as rotary positions do)"
_SUMMED: Final = "different channels of it are summed up"
_SQUARED: Final = "it is multiplied by itself"
_DIVIDES: Final = "something is divided by it"


# ── numbers that are moved ────────────────────────────────────────────────────────────────────────────────────────────────


def _moved(shadows: Shadows, func: Any, args: Any, kwargs: Any, *, value: int | None = None) -> Tags:
    """The same operation on the shadows; `value` is the place of a number that is filled in."""

    def shadow(origin: Origin, x: Any) -> Any:
        return shadows.seen_as(x, origin) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    given = list(args)
    if kwargs.get("reduce") or (func.overloadpacket.__name__.startswith("index_put") and given[3:4] == [True]):
        return spoiled(shadows, given, ADDED)
    if value is not None and value < len(given) and isinstance(given[value], int | float):
        given[value] = OTHER if given[value] else ZERO
    found: Tags = {}
    for origin in origins(shadows, given):
        seen = tree_map(partial(shadow, origin), given)
        if func._schema.is_mutable:
            seen[0] = seen[0].clone()
        try:
            found[origin] = func(*seen, **kwargs)
        except NotImplementedError:  # for whole numbers
            exact = tree_map(
                lambda x: x.double() if isinstance(x, torch.Tensor) and x.dtype == torch.int32 else x, seen
            )
            found[origin] = func(*exact, **kwargs).to(torch.int32)
    return found


def _copied(shadows: Shadows, func: Any, args: Any, kwargs: Any) -> Tags:
    return shadows.of(args[0])


def _written(shadows: Shadows, func: Any, args: Any, kwargs: Any) -> Tags:
    """`copy_`: the second operand, spread to the shape of the first."""
    return {origin: shadow.expand(args[0].shape) for origin, shadow in shadows.of(args[1]).items()}


# ── arithmetic ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _kept(shadows: Shadows, func: Any, args: Any, kwargs: Any) -> Tags:
    """An operation under which f(s·x) = s·f(x), number by number."""
    return shadows.of(args[0])


def _clamped(shadows: Shadows, func: Any, args: Any, kwargs: Any) -> Tags:
    """Clamping below at zero is one; any other is not."""
    low = args[1] if len(args) > 1 else kwargs.get("min")
    high = args[2] if len(args) > 2 else kwargs.get("max")
    if isinstance(low, torch.Tensor) or low != 0 or high is not None:
        return spoiled(shadows, args, f"{func.overloadpacket.__name__} is taken of it")
    return shadows.of(args[0])


def _multiplied(shadows: Shadows, func: Any, args: Any, kwargs: Any) -> Tags:
    found: Tags = {}
    for origin in origins(shadows, args[:2]):
        a, b = _pair(shadows, origin, args)
        both = (a >= FIRST) & (b >= FIRST)
        _spoil(origin, both, _SQUARED, a, b)
        product = torch.where((a == ZERO) | (b == ZERO), ZERO, torch.maximum(a, b))
        found[origin] = product.masked_fill(both, OTHER)
    return found


def _divided(shadows: Shadows, func: Any, args: Any, kwargs: Any) -> Tags:
    if kwargs.get("rounding_mode") is not None:
        return spoiled(shadows, args, "it is rounded")
    found: Tags = {}
    for origin in origins(shadows, args[:2]):
        a, b = _pair(shadows, origin, args)
        below = b >= FIRST
        _spoil(origin, below, _DIVIDES, a, b)
        found[origin] = a.masked_fill(below, OTHER)
    return found


def _added(shadows: Shadows, func: Any, args: Any, kwargs: Any) -> Tags:
    return added(shadows, *args[:2])


def added(shadows: Shadows, left: Any, right: Any, left_tags: Tags | None = None) -> Tags:
    """The shadows of a sum; a parameter that is added channel by channel is a bias.

    Args:
        left_tags: shadows of `left` that are not yet written down.
    """
    of_left = (shadows.of(left) if isinstance(left, torch.Tensor) else {}) if left_tags is None else left_tags
    of_right = shadows.of(right) if isinstance(right, torch.Tensor) else {}
    held = [shadows.bare(x) if isinstance(x, torch.Tensor) else None for x in (left, right)]
    found: Tags = {}
    for origin in dict.fromkeys([*of_left, *of_right]):
        a = of_left[origin] if origin in of_left else _shadow(shadows, origin, left)
        b = of_right[origin] if origin in of_right else _shadow(shadows, origin, right)
        a, b = torch.broadcast_tensors(a, b)
        if held[1] is not None and _is_bias(origin, a, held[1], of_right.get(held[1])):
            origin.biases[held[1]] = origin.biases.get(held[1], 0) + 1
            found[origin] = a
        elif held[0] is not None and _is_bias(origin, b, held[0], of_left.get(held[0])):
            origin.biases[held[0]] = origin.biases.get(held[0], 0) + 1
            found[origin] = b
        else:
            found[origin] = _joined(origin, a, b)
    return found


def _is_bias(origin: Origin, seen: torch.Tensor, bias: Origin, of_bias: torch.Tensor | None) -> bool:
    """Whether channel c of the bias is added to what is of channel c, and to nothing else."""
    if of_bias is None or bias is origin or bias.count != origin.count:
        return False
    return torch.equal(seen, of_bias.expand(seen.shape))


def _joined(origin: Origin, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    differ = (a != b) & (a != ZERO) & (b != ZERO)
    if bool(differ.any()):
        within = differ & (a >= FIRST) & (b >= FIRST)
        _spoil(origin, within, _TURNED, a, b)
        _spoil(origin, differ & ~within, ADDED, a, b)
    return torch.where(a == ZERO, b, a).masked_fill(differ, OTHER)


def _reduced(shadows: Shadows, func: Any, args: Any, kwargs: Any) -> Tags:
    """Sums and means along axes."""
    x = args[0]
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    axes = list(range(x.ndim)) if not dims and dims != 0 else [dims] if isinstance(dims, int) else list(dims)
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    return {origin: constant(origin, shadow, axes, keep) for origin, shadow in shadows.of(x).items()}


def constant(origin: Origin, shadow: torch.Tensor, axes: list[int], keep: bool, reason: str = _SUMMED) -> torch.Tensor:
    """What a sum along these axes is of: of the one channel that is summed; several are spoiled."""
    if any(shadow.shape[a] == 0 for a in axes):
        return shadow.sum(axes, keepdim=keep, dtype=torch.int32)
    high = shadow.amax(axes, keepdim=True)
    low = torch.where(shadow == ZERO, high, shadow).amin(axes, keepdim=True)
    mixed = high != low
    if bool(mixed.any()):
        origin.spoil(shadow[mixed.expand(shadow.shape)], reason)
        high = high.masked_fill(mixed, OTHER)
    return high if keep else high.squeeze(axes)


def _normed(shadows: Shadows, func: Any, args: Any, kwargs: Any, *, weight: int, axis: int | None = None) -> Tags:
    """A norm reads its input; what it gives is of its weight, channel by channel. `weight` and the next are the places."""
    spoiled(shadows, [args[0], *args[weight + 2 :]], "a norm reads it")
    x, scale, bias = args[0], args[weight], args[weight + 1] if weight + 1 < len(args) else None
    if scale is None:
        return spoiled(shadows, [bias], ADDED)
    shape = (1, -1, *(1 for _ in range(x.ndim - 2))) if axis == 1 else scale.shape
    tags = {origin: shadow.reshape(shape).expand(x.shape) for origin, shadow in shadows.of(scale).items()}
    if bias is None:
        return tags
    return added(shadows, torch.empty(x.shape, device="meta"), bias.reshape(shape), tags)


# ── helpers ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def origins(shadows: Shadows, values: Iterable[Any]) -> list[Origin]:
    """Everything that one of these tensors is of."""
    return list(dict.fromkeys(o for t in tensors_of(values) for o in shadows.of(t)))


def spoiled(shadows: Shadows, values: Iterable[Any], reason: str) -> Tags:
    """Nothing that these tensors are of can be scaled any more."""
    for tensor in tensors_of(values):
        for origin, shadow in shadows.of(tensor).items():
            origin.spoil(shadow, reason)
    return {}


def _pair(shadows: Shadows, origin: Origin, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.broadcast_tensors(*(_shadow(shadows, origin, x) for x in args[:2]))
    return a, b


def _shadow(shadows: Shadows, origin: Origin, x: Any) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return shadows.seen_as(x, origin)
    return torch.tensor(OTHER if x else ZERO, dtype=torch.int32)


def _spoil(origin: Origin, where: torch.Tensor, reason: str, *seen: torch.Tensor) -> None:
    if bool(where.any()):
        for shadow in seen:
            origin.spoil(shadow[where], reason)


MOVES: Final = frozenset(
    [
        "clone",
        "_to_copy",
        "contiguous",
        "_unsafe_view",
        "index",
        "index_select",
        "gather",
        "take",
        "cat",
        "stack",
        "repeat",
        "roll",
        "flip",
        "repeat_interleave",
        "expand_copy",
        "view_copy",
        "permute_copy",
        "tril",
        "triu",
        "masked_select",
        "where",
        "slice_scatter",
        "select_scatter",
        "index_put",
        "index_put_",
        "index_copy",
        "index_copy_",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "im2col",
        "unfold_copy",
    ]
)
"""Operations that only move numbers, or leave zeros in their place."""

FILLS: Final = {"constant_pad_nd": 2, "masked_fill": 2, "masked_fill_": 2, "fill_": 1, "scatter": 3, "scatter_": 3}
"""Operations that also fill in a number, which is the argument at this place."""

MAKES: Final = frozenset(
    [
        "empty_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_empty",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty_strided",
        "zero_",
        "sym_size",
        "sym_stride",
        "sym_numel",
        "is_same_size",
    ]
)
"""Operations that take of a tensor no more than its shape."""

ZEROS: Final = frozenset(["zeros", "zeros_like", "new_zeros", "zero_"])
"""Operations that give nothing but zeros; so do those that fill, if the number is one."""

RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(MOVES, _moved),
    **{name: partial(_moved, value=place) for name, place in FILLS.items()},
    **dict.fromkeys(["clone", "_to_copy", "_unsafe_view"], _copied),
    "copy_": _written,
    **dict.fromkeys(["neg", "neg_", "abs", "abs_", "relu", "relu_", "leaky_relu", "leaky_relu_", "positive"], _kept),
    **dict.fromkeys(["clamp", "clamp_", "clamp_min", "clamp_min_"], _clamped),
    **dict.fromkeys(["mul", "mul_"], _multiplied),
    **dict.fromkeys(["div", "div_"], _divided),
    **dict.fromkeys(["add", "add_", "sub", "sub_", "rsub"], _added),
    **dict.fromkeys(["sum", "mean"], _reduced),
    "native_layer_norm": partial(_normed, weight=2),
    "_fused_rms_norm": partial(_normed, weight=2),
    "native_batch_norm": partial(_normed, weight=1, axis=1),
    "_native_batch_norm_legit_no_training": partial(_normed, weight=1, axis=1),
}
