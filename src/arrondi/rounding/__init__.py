"""Rounding methods: which code each weight gets. Pure functions on tensors, listed in one table.

A method is a function `(weight, scheme, moment, *, name, facts, …options) -> QTensor`; `Method.round` calls it and gives what a
report should say beside the codes. One that looks at more than the second moment takes it by the keyword that `STATISTICS` names.
To add one: its file, a line in `METHODS`, its test. The command line, the plan and the contract tests read this table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NamedTuple, get_args, get_type_hints

import torch

from arrondi.arguments import bounds_of
from arrondi.calibration import SecondMoment
from arrondi.errors import SchemeError, unknown
from arrondi.formats import LayerScheme, Scheme
from arrondi.rounding.adaround import adaround, refuse_adaround
from arrondi.rounding.autoround import autoround, refuse_autoround
from arrondi.rounding.awq import awq
from arrondi.rounding.gobo import gobo, make_gobo, refuse_gobo, size_gobo
from arrondi.rounding.gptaq import gptaq
from arrondi.rounding.gptq import gptq, refuse_gptq
from arrondi.rounding.hqq import hqq, refuse_hqq
from arrondi.rounding.imatrix import imatrix, refuse_imatrix
from arrondi.rounding.kmeans import any4, kmeans, make_any4, make_kmeans, refuse_tables
from arrondi.rounding.llm_int8 import foresees_llm_int8, llm_int8, refuse_llm_int8, size_llm_int8
from arrondi.rounding.nearest_first import nearest_first
from arrondi.rounding.qronos import qronos
from arrondi.rounding.rtn import refuse_rtn, rtn
from arrondi.rounding.trellis import refuse_trellis, trellis
from arrondi.rounding.yaqa import refuse_yaqa, yaqa
from arrondi.tensor.qtensor import QTensor

STATISTICS: Final[Mapping[str, str]] = MappingProxyType({
    "moment": "moment", "cross moment": "cross_moment", "float moment": "float_moment", "absmax": "absmax", "sample": "sample",
    "importance": "importance", "output moments": "output_moments",
})  # fmt: skip
"""What a method may need of a layer's inputs → the argument by which it takes it; see `arrondi.pipeline.statistics.Need`."""


class Rounding(NamedTuple):
    """What a method gives.

    Attributes:
        q: the rounded weight.
        facts: what a report should say of this weight, such as {"damping": 0.1} where more was needed than was asked for.
    """

    q: QTensor
    facts: dict[str, Any]


Sizes = Callable[[LayerScheme, torch.Tensor, Mapping[str, Any], "torch.Tensor | None"], LayerScheme]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        run: the function.
        needs: what it cannot work without, keys of `STATISTICS`. The second moment is given to every method where there is one.
        source: where it comes from, for people.
        seconds_per_gigaweight: rough single-core cost of the method itself with the compiled kernels, for the plan's estimate.
        refuse: (scheme of the weights, options) → None, or why the method cannot make it, as a sentence.
        makes: (scheme of the weights, options) → the scheme that it makes of a weight for which that was asked.
        wants: what it works better with, and is given where there is calibration data; keys of `STATISTICS`.
        unpaired: the method that is used instead where the original sends other tokens, as it may to an expert.
        rewrites, repairs: steps that come with it, before and after it, by name.
        sizes: (that scheme with its inputs, weight (m, n), options, max |x| of its inputs (matrices, n) or None) → the same for this very
            weight, where its size depends on it (how many outliers there are); None: it does not.
        foresees: (scheme of the layer, options) → whether `sizes` looks at inputs.
    """

    run: Callable[..., QTensor]
    needs: frozenset[str]
    source: str
    seconds_per_gigaweight: float
    refuse: Callable[[Scheme, Mapping[str, Any]], str | None] = lambda scheme, options: None
    makes: Callable[[Scheme, Mapping[str, Any]], Scheme] = lambda scheme, options: scheme
    wants: frozenset[str] = frozenset()
    unpaired: str = ""
    rewrites: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()
    sizes: Sizes | None = None
    foresees: Callable[[LayerScheme, Mapping[str, Any]], bool] = lambda scheme, options: False

    @property
    def options(self) -> dict[str, Any]:
        """Names and defaults of the options that a user may set."""
        return options_of(self.run)

    def round(
        self, weight: torch.Tensor, scheme: Scheme, moment: SecondMoment | None = None, *, name: str, **options: Any
    ) -> Rounding:
        """Round a weight and learn what there is to say of it. `options` hold what else it needs, too."""
        facts: dict[str, Any] = {}
        q = self.run(weight, scheme, moment, name=name, facts=facts, **options)
        return Rounding(q, facts)


NOTHING: Final[frozenset[str]] = frozenset()
MOMENT: Final = frozenset({"moment"})
ABSMAX: Final = frozenset({"absmax"})
IMPORTANCE: Final = frozenset({"importance"})
OUTPUTS: Final = frozenset({"output moments"})
PAIRS: Final = frozenset({"moment", "cross moment"})

METHODS: Final[Mapping[str, Method]] = MappingProxyType({
    "rtn": Method(rtn, NOTHING, "Krishnamoorthi 2018, arXiv:1806.08342", 30.0, refuse_rtn),
    "autoround": Method(
        autoround, NOTHING, "Cheng et al. 2023, arXiv:2309.05516", 10_000.0, refuse_autoround, wants=PAIRS, repairs=("signround",)
    ),
    "adaround": Method(adaround, PAIRS, "Nagel et al. 2020, arXiv:2004.10568", 20_000.0, refuse_adaround, unpaired="gptq"),
    "adaquant": Method(
        adaround, PAIRS, "Hubara et al. 2020, arXiv:2006.10518", 20_000.0, refuse_adaround, unpaired="gptq", repairs=("layer-tune",)
    ),
    "brecq": Method(
        adaround, PAIRS, "Li et al. 2021, arXiv:2102.05426", 50_000.0, refuse_adaround, unpaired="gptq", repairs=("block-sides",)
    ),
    "qdrop": Method(
        adaround, PAIRS, "Wei et al. 2022, arXiv:2203.05740", 50_000.0, refuse_adaround, unpaired="gptq", repairs=("block-drop",)
    ),
    "easyquant": Method(
        nearest_first, NOTHING, "Wu et al. 2020, arXiv:2006.16669", 20_000.0, refuse_autoround, repairs=("scale-search",)
    ),
    "ptq4vit": Method(
        nearest_first, NOTHING, "Yuan et al. 2022, arXiv:2111.12293", 50_000.0, refuse_autoround, repairs=("hessian-search",)
    ),
    "liu": Method(
        nearest_first, NOTHING, "Liu et al. 2021, arXiv:2106.14156", 50_000.0, refuse_autoround, repairs=("similarity-search", "bias-correction")
    ),
    "fima-q": Method(
        nearest_first, NOTHING, "Wu et al. 2025, arXiv:2506.11543", 100_000.0, refuse_autoround, repairs=("hessian-search", "block-fisher")
    ),
    "hqq": Method(hqq, NOTHING, "Badri and Shaji 2023, technical report", 10.0, refuse_hqq),
    "imatrix": Method(imatrix, IMPORTANCE, "importance matrices of llama.cpp", 400.0, refuse_imatrix),
    "awq": Method(awq, MOMENT, "Lin et al. 2023, arXiv:2306.00978", 250.0, refuse_imatrix, rewrites=("awq-scale",)),
    "gptq": Method(gptq, MOMENT, "Frantar et al. 2022, arXiv:2210.17323", 90.0, refuse_gptq),
    "kmeans": Method(kmeans, NOTHING, "Kim et al. 2023, arXiv:2306.07629", 200.0, refuse_tables, make_kmeans, wants=PAIRS),
    "any4": Method(any4, NOTHING, "Elhoushi and Johnson 2025, arXiv:2507.04610", 400.0, refuse_tables, make_any4, wants=PAIRS),
    "gobo": Method(
        gobo, NOTHING, "Zadeh et al. 2020, arXiv:2005.03842", 300.0, refuse_gobo, make_gobo, sizes=size_gobo
    ),
    "gptaq": Method(gptaq, PAIRS, "Li et al. 2025, arXiv:2504.02692", 150.0, refuse_gptq, unpaired="gptq"),
    "yaqa": Method(
        yaqa, PAIRS, "Tseng et al. 2025, arXiv:2505.22988", 600.0, refuse_yaqa, wants=OUTPUTS, unpaired="gptq"
    ),
    "qronos": Method(qronos, PAIRS, "Zhang et al. 2025, arXiv:2505.11695", 150.0, refuse_gptq, unpaired="gptq"),
    "trellis": Method(trellis, NOTHING, "Tseng et al. 2024, arXiv:2406.11235", 500.0, refuse_trellis, wants=PAIRS),
    "trellis-yaqa": Method(trellis, NOTHING, "Tseng et al. 2025, arXiv:2505.22988", 500.0, refuse_trellis, wants=PAIRS | OUTPUTS),
    "llm-int8": Method(
        llm_int8, NOTHING, "Dettmers et al. 2022, arXiv:2208.07339", 30.0, refuse_llm_int8, wants=ABSMAX, sizes=size_llm_int8, foresees=foresees_llm_int8
    ),
})  # fmt: skip


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        SchemeError: there is none; the message has the nearest name.
    """
    if name.lower() not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name.lower()]


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Names and defaults of the options of a function: its keywords, without the name, the facts and the statistics of a weight."""
    parameters = inspect.signature(function).parameters.values()
    given = {"name", "facts", "importance", *STATISTICS.values()}
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in given}


def check_options(method: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse an option that a method's function does not have, a value of the wrong kind, or one that makes no sense.

    Raises:
        SchemeError: names the option and lists those that exist, or the value and what it should be.
    """
    if not options:
        return
    known, hints = options_of(function), get_type_hints(function)
    bounds = {name: bounds_of(hint) for name, hint in get_type_hints(function, include_extras=True).items()}
    for option, value in options.items():
        if option not in known:
            raise unknown(f"option of {method}", option, known)
        words, default = get_args(hints[option]), known[option]
        if words and value not in words:
            raise unknown(f"value of option {option}:", str(value), words)
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds) or isinstance(value, bool) is not isinstance(default, bool):
            raise SchemeError(
                f"Option {option} of {method} takes {_KINDS[type(default)]} such as {default!r}, got {value!r}."
            )
        allowed = bounds[option]
        if allowed is not None and not allowed.low <= value <= allowed.high:
            raise SchemeError(
                f"Option {option} of {method} takes {_KINDS[type(default)]} {allowed}, such as {default!r}, got {value!r}."
            )


_KINDS: Final = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


__all__ = [
    "METHODS",
    "Method",
    "Rounding",
    "adaround",
    "any4",
    "autoround",
    "awq",
    "check_options",
    "get_method",
    "gobo",
    "gptaq",
    "gptq",
    "hqq",
    "imatrix",
    "kmeans",
    "llm_int8",
    "qronos",
    "rtn",
    "trellis",
    "yaqa",
]
