"""Every step of the table: the rounding methods of `arrondi.rounding`, and rewrites and repairs, one file each.

Owns: `STEPS`, and what is refused by a step's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, get_args

import torch

from arrondi.errors import SchemeError, unknown
from arrondi.formats import LayerScheme, Scheme
from arrondi.pipeline.statistics import Need, Seen
from arrondi.pipeline.step import Kind, Step
from arrondi.pipeline.steps import awq_scale, bias_correction, e2e, equalize, sinq, smoothquant
from arrondi.pipeline.steps.blocks import BLOCK_DROP, BLOCK_FISHER, BLOCK_SIDES
from arrondi.pipeline.steps.product_search import HESSIAN_SEARCH, SIMILARITY_SEARCH
from arrondi.pipeline.steps.reconstruct import LAYER_TUNE, SIDES
from arrondi.pipeline.steps.rotate import ROTATE
from arrondi.pipeline.steps.scale_search import PARA_NORM, SCALE_SEARCH
from arrondi.pipeline.steps.tune import LKD, SIGNROUND, TUNE
from arrondi.rounding import METHODS, STATISTICS, Method, Rounding, check_options, options_of

REWRITES: Final[tuple[Step, ...]] = (ROTATE, smoothquant.STEP, awq_scale.STEP, equalize.STEP, sinq.STEP)
REPAIRS: Final[tuple[Step, ...]] = (
    TUNE, SIGNROUND, LKD, bias_correction.STEP, e2e.STEP, SIDES, LAYER_TUNE, BLOCK_SIDES, BLOCK_DROP, BLOCK_FISHER, SCALE_SEARCH, PARA_NORM,
    HESSIAN_SEARCH, SIMILARITY_SEARCH,
)  # fmt: skip


def _round_step(name: str, method: Method) -> Step:
    given = method.needs | method.wants

    def run(weight: torch.Tensor, scheme: Scheme, seen: Seen | None, *, name: str, **options: Any) -> Rounding:
        wanted = [need for need in get_args(Need) if need in given and need in STATISTICS]
        known = [need for need in wanted if seen is not None and seen.has([need])]
        more = {STATISTICS[need]: getattr(seen, STATISTICS[need], None) if need in known else None for need in wanted}
        more["moment"] = seen.moment if seen else None
        return method.round(weight, scheme, name=name, **more, **options)

    needs = frozenset(need for need in get_args(Need) if need in method.needs)
    return Step(
        name,
        "round",
        method.source,
        round=run,
        needs=needs,
        fallback="rtn" if needs else "",
        cost=method.seconds_per_gigaweight,
        unpaired=method.unpaired,
        wants=frozenset(need for need in get_args(Need) if need in method.wants),
        makes=method.makes,
        sizes=method.sizes,
        foresees=method.foresees,
        before=method.rewrites,
        after=method.repairs,
    )


STEPS: Mapping[str, Step] = MappingProxyType({
    **{name: _round_step(name, method) for name, method in METHODS.items()},
    **{step.name: step for step in (*REWRITES, *REPAIRS)},
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


def step_of_kind(kind: Kind, name: str) -> str:
    """The name of a step of that kind, as the table spells it.

    Raises:
        SchemeError: there is none; the message has the nearest name.
    """
    known = [step.name for step in STEPS.values() if step.kind == kind]
    if name.lower() not in known:
        other = STEPS.get(name.lower())
        is_one = "" if other is None else f"It is a {'method' if other.kind == 'round' else other.kind}."
        raise unknown(kind, name, known, hint=is_one)
    return name.lower()


def options_of_step(name: str) -> dict[str, Any]:
    """Names and defaults of the options that a user may set."""
    return options_of(_function(get_step(name)))


def _function(step: Step) -> Callable[..., Any]:
    found = METHODS[step.name].run if step.name in METHODS else step.apply or step.round
    assert found is not None
    return found


def check_step(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a step does not have, and values of the wrong kind.

    Raises:
        SchemeError: names the option and lists those that exist, or the value and what it should be.
    """
    step = get_step(name)
    for option in options.keys() - options_of_step(name).keys():
        others = [f"{other}.{option}" for other in STEPS if option in options_of_step(other)]
        if others:
            hint = f"Another step has it: {' or '.join(others)}."
            raise unknown(f"option of {step.name}", option, options_of_step(name), hint=hint)
    check_options(step.name, _function(step), options)


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


def describe_steps() -> list[dict[str, Any]]:
    """Every step as plain data: what it needs, what comes with it, its options with their defaults, where it comes from."""
    return [
        {
            "name": step.name,
            "kind": step.kind,
            "source": step.source,
            "needs": sorted(step.needs),
            "brings": [*step.before, *step.after],
            "fallback": step.fallback,
            "options": options_of_step(step.name),
        }
        for step in STEPS.values()
    ]
