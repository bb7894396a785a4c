"""In which basis every axis of every tensor is written: `Basis`, `Axis` and `Value`, and how they are made one.

A basis is an unknown orthogonal matrix R of the size of an axis, or of a factor of it: the axis of a turned model holds x R where
that of the model holds x. Tensors that are added must be written in the same basis, so their bases are unified; an operation that
does not commute with every R fixes the basis (R = 1), and keeps why. What is still free when the whole model has been followed
can be turned without changing what it computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


class Basis:
    """A basis of some channels.

    Attributes:
        size: how many.
        parts: what it is made of, if it was split: factors of a product, the outermost first, or pieces below each other.
        pieces: whether the parts are pieces.
        fixed: why it cannot be turned, "" if it can.
        ones: (…, 1, 1, 1, …) must be its own image, as where the mean over the channels is taken.
    """

    def __init__(self, size: int, fixed: str = "") -> None:
        self.size, self.fixed = size, fixed
        self.parts: tuple[Basis, ...] = ()
        self.pieces = self.ones = False
        self._same: Basis | None = None

    @property
    def root(self) -> Basis:
        """The one that stands for all that were unified with it."""
        basis = self
        while basis._same is not None:
            basis = basis._same
        return basis

    @property
    def factors(self) -> list[Basis]:
        """The factors of which it is a product, none of which is one again."""
        root = self.root
        if root.parts and not root.pieces:
            return [f for part in root.parts for f in part.factors]
        return [root]

    def fix(self, why: str) -> None:
        """From now on it cannot be turned."""
        root = self.root
        root.fixed = root.fixed or why
        for part in root.parts:
            part.fix(why)

    def keep_ones(self) -> None:
        """From now on turns must keep the vector of ones."""
        root = self.root
        root.ones = True
        for part in root.parts:
            part.keep_ones()

    def split(self, sizes: Sequence[int], pieces: bool) -> None:
        """Make it of parts; it must not have any."""
        self.parts, self.pieces = tuple(Basis(n, self.fixed) for n in sizes), pieces
        if self.ones:
            self.keep_ones()

    def be(self, other: Basis) -> None:
        """Unify two of the same size, neither of which is a product."""
        one, two = self.root, other.root
        if one is two:
            return
        if one.parts and not two.parts:
            one, two = two, one
        if one.parts:
            _align(one, two)
        if one.fixed or two.fixed:
            one.fix(two.fixed)
            two.fix(one.fixed)
        if one.ones or two.ones:
            one.keep_ones()
            two.keep_ones()
        if one.parts and two.parts:
            for a, b in zip(one.parts, two.parts, strict=True):
                unify((a,), (b,), "its parts lie otherwise elsewhere")
        one._same = two


def _align(one: Basis, two: Basis) -> None:
    """Cut the pieces of both where those of the other end."""
    ends = [{*_ends(b)} for b in (one, two)]
    if ends[0] == ends[1]:
        return
    for basis, missing in ((one, ends[1] - ends[0]), (two, ends[0] - ends[1])):
        for end in missing:
            cut(basis, end)


def _ends(basis: Basis) -> list[int]:
    total, found = 0, []
    for part in basis.parts:
        total += part.size
        found.append(total)
    return found


def cut(basis: Basis, at: int) -> None:
    """Let one piece of a basis end after `at` channels."""
    root = basis.root
    if at in (0, root.size) or at in _ends(root):
        return
    if not root.parts:
        root.split((at, root.size - at), True)
        return
    start = 0
    parts: list[Basis] = []
    for part in root.parts:
        own = part.root
        if start < at < start + own.size:
            if own.parts:  # a product, cut across
                own.fix("it is cut across its factors")
                fresh = [Basis(at - start, own.fixed), Basis(start + own.size - at, own.fixed)]
            else:
                own.split((at - start, own.size - (at - start)), True)
                fresh = list(own.parts)
            parts += fresh
        else:
            parts.append(part)
        start += own.size
    root.parts = tuple(parts)


@dataclass(frozen=True)
class Gain:
    """What a tensor was multiplied by channel by channel: a parameter that consumers can take over.

    Attributes:
        weight: name of the parameter γ.
        offset: the factor is offset + γ.
        bias: name of a parameter β that was added afterwards.
    """

    weight: str
    offset: float = 0.0
    bias: str | None = None


@dataclass(frozen=True)
class Axis:
    """The bases of one axis, from the outermost factor in; none where it has size 1.

    Attributes:
        bases: factors.
        gain: what its channels were multiplied by, and what has not been taken over yet.
        of: which axis of a parameter it is, if it is a whole one.
    """

    bases: tuple[Basis, ...] = ()
    gain: Gain | None = None
    of: int | None = None

    @classmethod
    def new(cls, size: int, fixed: str = "") -> Axis:
        return cls((Basis(size, fixed),) if size > 1 else ())

    @property
    def size(self) -> int:
        return math.prod(b.size for b in self.bases)

    @property
    def factors(self) -> list[Basis]:
        return [f for b in self.bases for f in b.factors]

    @property
    def free(self) -> bool:
        """Whether some of it can be turned."""
        return any(_free(f) for f in self.factors)

    def fix(self, why: str) -> None:
        """It cannot be turned; a gain that somebody was to take over is what keeps it from that."""
        for basis in self.bases:
            basis.fix(f"{self.gain.weight} scales its channels before {why}" if self.gain else why)

    def keep_ones(self, why: str) -> None:
        """Only turns that keep the vector of ones are left; none, where a gain was to be taken over."""
        if self.gain:
            self.fix(why)
        for basis in self.bases:
            basis.keep_ones()

    def be(self, other: Axis, why: str) -> Axis:
        """Unify with another of the same size."""
        if self.gain != other.gain:
            gain = self.gain or other.gain
            for basis in (*self.bases, *other.bases):
                basis.fix(f"{gain.weight} scales its channels before {why}" if gain else why)
        unify(self.bases, other.bases, why)
        return Axis(self.bases, self.gain if self.gain == other.gain else None)

    def plain(self) -> Axis:
        return replace(self, gain=None)


def _free(basis: Basis) -> bool:
    return any(_free(p.root) for p in basis.parts) if basis.parts else not basis.fixed


def unify(one: Sequence[Basis], two: Sequence[Basis], why: str) -> None:
    """Unify two lists of factors of the same product."""
    left, right = ([f for b in side for f in b.factors] for side in (one, two))
    while left and right:
        a, b = left.pop(0).root, right.pop(0).root
        if a.size == b.size:
            a.be(b)
            continue
        large, small, rest = (a, b, left) if a.size > b.size else (b, a, right)
        if large.parts or large.size % small.size:
            for basis in (a, b, *left, *right):
                basis.fix(why)
            return
        large.split((small.size, large.size // small.size), False)
        outer, inner = large.parts
        outer.be(small)
        rest.insert(0, inner)


def regroup(axes: Iterable[Axis], shape: Sequence[int], why: str) -> list[Axis]:
    """The axes of a view of the same numbers, row by row, in another shape."""
    sources = [axis for axis in axes if axis.bases]
    queue = [f for axis in sources for f in axis.factors]
    whole = {id(axis.factors[0].root): axis for axis in sources if axis.gain or axis.of is not None}
    found = []
    for size in shape:
        mine: list[Basis] = []
        left = size
        while left > 1:
            basis = queue.pop(0).root
            if left % basis.size == 0:
                mine.append(basis)
                left //= basis.size
                continue
            if basis.size % left or basis.parts:
                for other in (basis, *queue, *mine):
                    other.fix(why)
                return _fixed_axes(sources, shape, why)
            basis.split((left, basis.size // left), False)
            mine.append(basis.parts[0])
            queue.insert(0, basis.parts[1])
            left = 1
        found.append(Axis(tuple(mine)))
    return _as_they_were(found, whole, why)


def _fixed_axes(sources: Iterable[Axis], shape: Sequence[int], why: str) -> list[Axis]:
    for axis in sources:
        axis.fix(why)
    return [Axis.new(n, why) for n in shape]


def _as_they_were(found: list[Axis], whole: dict[int, Axis], why: str) -> list[Axis]:
    """Axes that are whole in the view are what they were; of others a gain is lost."""
    result = []
    for axis in found:
        own = whole.get(id(axis.bases[0].root)) if axis.bases else None
        if own is not None and own.size == axis.size:
            del whole[id(axis.bases[0].root)]
            axis = replace(axis, gain=own.gain, of=own.of)
        result.append(axis)
    for lost in whole.values():
        if lost.gain:
            lost.fix(why)
    return result


@dataclass(frozen=True)
class Value:
    """What is known of a tensor.

    Attributes:
        axes: one for each axis.
        param: the parameter whose numbers these are, in another view, or those of a part of it.
        offset: it is offset + that parameter.
        square: every number is the square of one.
    """

    axes: tuple[Axis, ...]
    param: str | None = None
    offset: float = 0.0
    square: bool = False

    @classmethod
    def fixed(cls, shape: Sequence[int], why: str) -> Value:
        return cls(tuple(Axis.new(n, why) for n in shape))

    @property
    def shape(self) -> list[int]:
        return [axis.size for axis in self.axes]

    def fix(self, why: str) -> None:
        for axis in self.axes:
            axis.fix(why)
