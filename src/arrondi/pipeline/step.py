"""Steps: what is done to a model, as data.

Owns: `Step` and what a step declares; the table of all is in `steps/`. A step rewrites (the function stays the same, the numbers become easier
to round), rounds, or repairs (what rounding did is made up for). What a method computes is a pure function in `rounding/`,
`rewrite/` or `repair/`; a step says what it needs, where it applies and what it adds to the files. A recipe is an ordered list of
steps for selected sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from arrondi.arguments import check_fields
from arrondi.checkpoint import TensorSpec
from arrondi.errors import SchemeError, unknown
from arrondi.formats import LayerScheme, Scheme
from arrondi.model import Site, Source
from arrondi.pipeline.statistics import OF_ORIGINAL, Need
from arrondi.rounding import Rounding, Sizes

Kind = Literal["rewrite", "round", "repair"]

Scope = Literal["site", "reads", "unit", "model", "fold", "whole"]
"""What is done together or not at all: one site, all sites that read the same input, all that were selected in a unit, or in the
model; or all that reads an activation with what makes it, where scales can be moved from one to the other. A step is never given
more than one unit at a time, but for repairs of the whole model, which come after the last unit."""


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
        notes: sentences for the plan.
    """

    changed: tuple[str, ...] = ()
    added: tuple[Added, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """The sites that a step takes.

    Attributes:
        groups: sites that are done together.
        refusals: why not → sites where it is not done.
    """

    groups: tuple[tuple[Site, ...], ...]
    refusals: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


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
        apply: (work, sites, **options) of rewrites and repairs; the sites are one group of `scope`, within one unit. Steps of the
            scope "fold" get the `Joint`s of the unit in place of sites.
        round: the function of round steps.
        needs: what has to be known of the inputs.
        wants: what else a round step looks at where there is calibration data.
        scope: what is done together or not at all.
        refuse: (site, its scheme or None) → None, or why it cannot be done there, as the end of a sentence.
        fallback: the round step that a round step is replaced by where nothing is known of the inputs, unless the rule names
            another.
        declare: (source, all sites or joints, **options) → what it changes and adds, known before it runs.
        choose: (source, picked sites, **options) → what it takes, of steps that know more of the model than `scope` says.
        unpaired: the round step that a round step is replaced by where the original sends other tokens; "" is the fallback.
        spreads: (source, site, **options) → the blocks in which the site's rounded inputs are spread while the model runs, 0 if
            they are not.
        makes: (scheme of the weights, options) → what a round step makes of a weight for which that was asked.
        sizes, foresees: see `arrondi.rounding.Method`.
        before, after: names of the rewrites and repairs that come with a round step.
        cost: rough single-core seconds for 10⁹ weights, without the forward passes.
    """

    name: str
    kind: Kind
    source: str = ""
    apply: Callable[..., None] | None = None
    round: Round | None = None
    needs: frozenset[Need] = frozenset()
    wants: frozenset[Need] = frozenset()
    scope: Scope = "site"
    refuse: Callable[[Site, LayerScheme | None], str | None] = lambda site, scheme: None
    fallback: str = ""
    declare: Callable[..., Declared] = _nothing
    choose: Callable[..., Choice] | None = None
    unpaired: str = ""
    spreads: Callable[..., int] = lambda source, site, **options: 0
    makes: Callable[[Scheme, Mapping[str, Any]], Scheme] = lambda scheme, options: scheme
    sizes: Sizes | None = None
    foresees: Callable[[LayerScheme, Mapping[str, Any]], bool] = lambda scheme, options: False
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    cost: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        strange = sorted(self.needs - set(get_args(Need)))
        if strange:
            raise unknown(f"need of the step {self.name}:", strange[0], get_args(Need))
        if (self.round is None) is (self.kind == "round") or (self.apply is None) is not (self.kind == "round"):
            raise SchemeError(f"The step {self.name} needs a function: `round` of a round step, `apply` of all others.")

    @property
    def follows_original(self) -> bool:
        """Whether it looks at what the original does on the calibration data."""
        return bool((self.needs | self.wants) & OF_ORIGINAL)

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration data."""
        return bool(self.needs)
