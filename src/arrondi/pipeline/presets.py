"""Recipes that have a name: `PRESETS` and `preset_recipe`.

Owns: which methods, rewrites and repairs go together. A preset is data; what is published under a name is as published, and `best` is what has
the least divergence of all that was measured here (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

from arrondi.errors import unknown
from arrondi.formats import LayerScheme, Scheme
from arrondi.pipeline.mixes import base_scheme, mix_of
from arrondi.pipeline.recipe import Recipe
from arrondi.rounding.yaqa import refuse_yaqa
from arrondi.tensor.checks import layer_scheme_of


@dataclass(frozen=True)
class Preset:
    """What is done, and in what order.

    Attributes:
        about: in one line, with the source.
        method: how codes are chosen.
        rewrites, repairs: names of steps.
        options: of all steps, as `Recipe.simple` takes them.
        scheme: where the user names none.
        embeddings: what tables of embeddings become, None if they stay.
    """

    about: str
    method: str
    rewrites: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    scheme: str = "W4A16"
    embeddings: str | None = None


_WEIGHTS: Final = Preset(
    "GPTAQ in several sweeps, refined, then scales and norms learned unit by unit and, where the model fits in memory, end to end",
    "gptaq",
    repairs=("tune", "e2e"),
    options={"sweeps": 5, "refine": 2, "damping": 0.05},
)
_FED_BACK: Final = Preset(
    "YAQA with GPTAQ's correction, refined, then scales and norms learned end to end where the model fits in memory",
    "yaqa",
    repairs=("e2e",),
    options={"refine": 2},
)
_TRELLIS: Final = Preset(
    "trellis codes fed back by columns and, where they are squares, by rows, then scales and norms learned end to end where the model fits in memory",
    "trellis-yaqa",
    repairs=("e2e",),
)
_TABLES: Final = Preset(
    "learned tables with GPTAQ's correction, refined, then scales and norms learned unit by unit and end to end",
    "any4",
    repairs=("tune", "e2e"),
    options={"rows": 64, "refine": 2, "damping": 0.05},
)
_FEW_BIT_INPUTS: Final = Preset(
    "the same after rotations, folded and online: inputs of 4 bits need a basis without outliers",
    "gptaq",
    rewrites=("rotate",),
    options={"refine": 2, "damping": 0.05, "rotate.online": True},
)


def _best(scheme: LayerScheme) -> Preset:
    """The best that is known for a scheme."""
    inputs = scheme.inputs
    few = inputs is not None and inputs.scheme.format.kind == "integer" and inputs.scheme.format.bits <= 4
    if scheme.weights.table is not None:
        return replace(_TABLES, options={**_TABLES.options, "rows": scheme.weights.table.rows})
    if few:
        return _FEW_BIT_INPUTS
    if scheme.weights.format.trellis is not None:
        return _TRELLIS
    return _WEIGHTS if refuse_yaqa(scheme.weights, {}) else _FED_BACK


PRESETS: Final[Mapping[str, Callable[[LayerScheme], Preset]]] = MappingProxyType({
    "best": _best,
    "q8bert": lambda scheme: Preset(
        "int8 weights, inputs and embeddings, one scale each (Zafrir et al. 2019, arXiv:1910.06188)", "rtn",
        scheme="w=int8/tensor,a=int8/tensor/static", embeddings="w=int8/tensor",
    ),
    "zeroquant": lambda scheme: Preset(
        "weights by group, inputs by token, layer-by-layer distillation (Yao et al. 2022, arXiv:2206.01861)", "rtn",
        repairs=("lkd",), scheme="w=int4/g128,a=int8/token",
    ),
})  # fmt: skip
"""Name → scheme of the user's (or the default) → what is done."""

DEFAULTS: Final = LayerScheme(layer_scheme_of("W4A16").weights)


def preset_recipe(
    name: str,
    scheme: str | Scheme | LayerScheme | None = None,
    *,
    group_size: int | None = None,
    targets: Iterable[str] = ("Linear",),
    ignore: Iterable[str] | None = None,
    options: Mapping[str, Any] | None = None,
    all_experts: bool = False,
    embeddings: str | None = None,
) -> Recipe:
    """The recipe of a preset.

    Args:
        name: of `PRESETS`.
        scheme: another than the preset's own.
        group_size, targets, ignore, all_experts, embeddings: see `Recipe.simple`.
        options: beside and before those of the preset.

    Raises:
        SchemeError: there is no such preset, or the steps cannot make the scheme.
    """
    if name.lower() not in PRESETS:
        raise unknown("preset", name, PRESETS)
    mix = mix_of(scheme)
    asked = base_scheme(mix) if mix else DEFAULTS if scheme is None else layer_scheme_of(scheme)
    preset = PRESETS[name.lower()](asked)
    return Recipe.simple(
        preset.scheme if scheme is None else scheme,
        preset.method,
        group_size=group_size,
        targets=targets,
        ignore=ignore,
        options={**preset.options, **(options or {})},
        rewrites=preset.rewrites,
        repairs=preset.repairs,
        all_experts=all_experts,
        embeddings=preset.embeddings if embeddings is None else embeddings,
    )
