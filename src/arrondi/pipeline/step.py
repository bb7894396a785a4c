"""Steps: what is done to a model, as data.

Owns: `Step` and the table `STEPS`. A step rewrites (the function stays the same, the numbers become easier to round), rounds, or
repairs (what rounding did is made up for). What a method computes is a pure function in `rounding/` (later `rewrite/`,
`repair/`); a step says what it needs, where it applies and what it adds to the files. A recipe is an ordered list of steps for
selected sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

from arrondi.checkpoint import TensorSpec
from arrondi.errors import SchemeError, unknown
from arrondi.formats import LayerScheme
from arrondi.model import Site, Source
from arrondi.rounding import METHODS, check_options

if TYPE_CHECKING:
    from arrondi.pipeline.work import Work

Need = Literal["moment", "mean", "range"]
"""What calibration collects of a site's inputs: Σ x xᵀ, Σ x, the least and the largest number."""


@dataclass(frozen=True)
class Declared:
    """What a step changes besides the weights that it is given, known before it runs.

    Attributes:
        changed: tensors of the file that get other values.
        added: tensors that the file did not have.
        config: edits of config.json.
    """

    changed: tuple[str, ...] = ()
    added: tuple[TensorSpec, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


def _nothing(source: Source, sites: Sequence[Site], options: Mapping[str, Any]) -> Declared:
    return Declared()


@dataclass(frozen=True)
class Step:
    """One row of the table.

    Attributes:
        name: what recipes call it.
        kind: rewrite steps run first in a unit, then round steps, then repair steps.
        source: where it comes from, for people.
        apply: (work, sites, options) → None for rewrites, with all sites of a unit, and for repairs, with the sites that were
            just rounded. Round steps are a function of `METHODS` instead.
        needs: what has to be known of the inputs.
        refuse: (site, scheme) → None, or why it cannot be done there, as the end of a sentence.
        fallback: the round step that is taken where nothing is known of the inputs.
        declare: what it changes and adds, known before it runs.
        cost: rough single-core seconds for 10⁹ weights.
    """

    name: str
    kind: Literal["rewrite", "round", "repair"]
    source: str = ""
    apply: Callable[[Work, Sequence[Site], Mapping[str, Any]], None] | None = None
    needs: frozenset[Need] = frozenset()
    refuse: Callable[[Site, LayerScheme | None], str | None] = lambda site, scheme: None
    fallback: str = ""
    declare: Callable[[Source, Sequence[Site], Mapping[str, Any]], Declared] = _nothing
    cost: float = 0.0

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration data."""
        return bool(self.needs)


STEPS: Final[Mapping[str, Step]] = MappingProxyType({
    name: Step(
        name, "round", m.source, needs=frozenset({"moment"} if m.needs_moment else ()),
        fallback="rtn" if m.needs_moment else "", cost=m.seconds_per_gigaweight,
    )
    for name, m in METHODS.items()
})  # fmt: skip
"""Every step by its name."""


def get_step(name: str) -> Step:
    """The step of that name.

    Raises:
        SchemeError: there is none; the message has the nearest name.
    """
    if not isinstance(name, str) or name.lower() not in STEPS:
        raise unknown("method", str(name), STEPS)
    return STEPS[name.lower()]


def check_step(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a step does not have.

    Raises:
        SchemeError: names the option and lists those that exist.
    """
    if get_step(name).kind == "round":
        check_options(name.lower(), options)
    elif options and not all(isinstance(o, str) for o in options):
        raise SchemeError(f"Options of {name} are named by words, got {options!r}.")
