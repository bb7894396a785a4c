"""Steps: what is done to a model, as data.

Owns: `Step`, the table `STEPS`, and what a step declares. A step rewrites (the function stays the same, the numbers become easier
to round), rounds, or repairs (what rounding did is made up for). What a method computes is a pure function in `rounding/` (later
`rewrite/`, `repair/`); a step says what it needs, where it applies and what it adds to the files. A recipe is an ordered list of
steps for selected sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch

from arrondi.arguments import check_fields
from arrondi.checkpoint import TensorSpec
from arrondi.errors import SchemeError, unknown
from arrondi.formats import LayerScheme, Scheme
from arrondi.model import Site, Source
from arrondi.pipeline.statistics import Need, Seen
from arrondi.rounding import METHODS, Method, Rounding, check_options

Kind = Literal["rewrite", "round", "repair"]

Scope = Literal["site", "reads", "unit", "model"]
"""What is done together or not at all: one site, all sites that read the same input, all that were selected in a unit, or in the
model. A step is never given more than one unit at a time."""


@dataclass(frozen=True)
class Added:
    """A tensor that a step adds.

    Attributes:
        name: under which it is written.
        param: the parameter that it is in the model.
        dtype, shape: as it is written.
        tensor: the tensor that it is added for, and with which it is written.
    """

    name: str
    param: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    tensor: str

    @classmethod
    def beside(cls, site: Site, leaf: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Added:
        """A tensor of the module whose weight a site is, such as its bias."""
        stem = site.tensor.removesuffix(".weight")
        return cls(f"{stem}.{leaf}", f"{site.modules[0]}.{leaf}", dtype, shape, site.tensor)

    @property
    def spec(self) -> TensorSpec:
        return self.name, self.dtype, self.shape


@dataclass(frozen=True)
class Declared:
    """What a step changes besides the weights that it is given, known before it runs.

    Attributes:
        changed: tensors of the file that get other values. Weights of the step's own sites are not listed.
        added: tensors that the file did not have.
        config: edits of config.json; dictionaries in it are merged.
    """

    changed: tuple[str, ...] = ()
    added: tuple[Added, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


def _nothing(source: Source, sites: Sequence[Site], **options: Any) -> Declared:
    return Declared()


Round = Callable[..., Rounding]
"""(weight (out, in), scheme, what was seen of its inputs or None, name=…, **options) → codes and facts."""


@dataclass(frozen=True)
class Step:
    """One row of the table.

    Attributes:
        name: what recipes call it.
        kind: rewrite steps run first in a unit, then round steps, each followed by the repair steps of what it rounded.
        source: where it comes from, for people.
        apply: (work, sites, **options) of rewrites and repairs; the sites are one group of `scope`, within one unit.
        round: the function of round steps.
        needs: what has to be known of the inputs.
        scope: what is done together or not at all.
        refuse: (site, its scheme or None) → None, or why it cannot be done there, as the end of a sentence.
        fallback: the round step that a round step is replaced by where nothing is known of the inputs, unless the rule names
            another.
        declare: (source, all sites, **options) → what it changes and adds, known before it runs.
        cost: rough single-core seconds for 10⁹ weights, without the forward passes.
    """

    name: str
    kind: Kind
    source: str = ""
    apply: Callable[..., None] | None = None
    round: Round | None = None
    needs: frozenset[Need] = frozenset()
    scope: Scope = "site"
    refuse: Callable[[Site, LayerScheme | None], str | None] = lambda site, scheme: None
    fallback: str = ""
    declare: Callable[..., Declared] = _nothing
    cost: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        strange = sorted(self.needs - set(get_args(Need)))
        if strange:
            raise unknown(f"need of the step {self.name}:", strange[0], get_args(Need))
        if (self.round is None) is (self.kind == "round") or (self.apply is None) is not (self.kind == "round"):
            raise SchemeError(f"The step {self.name} needs a function: `round` of a round step, `apply` of all others.")

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration data."""
        return bool(self.needs)


def _round_step(name: str, method: Method) -> Step:
    def run(weight: torch.Tensor, scheme: Scheme, seen: Seen | None, *, name: str, **options: Any) -> Rounding:
        return method.round(weight, scheme, seen.moment if seen else None, name=name, **options)

    needs: frozenset[Need] = frozenset({"moment"}) if method.needs_moment else frozenset()
    fallback = "rtn" if method.needs_moment else ""
    cost = method.seconds_per_gigaweight
    return Step(name, "round", method.source, round=run, needs=needs, fallback=fallback, cost=cost)


STEPS: Mapping[str, Step] = MappingProxyType({name: _round_step(name, method) for name, method in METHODS.items()})
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
    """Refuse options that a step does not have, and values of the wrong kind.

    Raises:
        SchemeError: names the option and lists those that exist, or the value and what it should be.
    """
    step = get_step(name)
    function = METHODS[step.name].run if step.name in METHODS else step.apply or step.round
    assert function is not None
    check_options(step.name, function, options)


def check_scheme(name: str, scheme: LayerScheme, options: Mapping[str, Any]) -> None:
    """Refuse a scheme that a method cannot make of any weight.

    Raises:
        SchemeError: says why, and what to use instead.
    """
    method = METHODS.get(get_step(name).name)
    refusal = method.refuse(scheme.weights, options) if method else None
    if refusal:
        raise SchemeError(refusal)


def check_fallback(method: str, fallback: str) -> None:
    """Refuse a fallback that is none.

    Raises:
        SchemeError: the method needs none, or the fallback needs to know inputs itself.
    """
    step, other = get_step(method), get_step(fallback)
    if not step.fallback:
        raise SchemeError(f"{method} looks at no inputs, so it needs no fallback. Drop fallback={fallback!r}.")
    if other.kind != "round" or other.calibrated:
        simple = ", ".join(sorted(s.name for s in STEPS.values() if s.kind == "round" and not s.calibrated))
        raise SchemeError(
            f"{fallback} cannot stand in where nothing is known of the inputs. Name one of these as the fallback: {simple}."
        )
