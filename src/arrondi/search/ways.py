"""How a scheme can be reached: the grammar of a method with what goes with it, and presets.

Owns: `Way`, and what turns words into it. The grammar is described in `arrondi.search.candidates`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from arrondi.arguments import said
from arrondi.errors import SchemeError, unknown
from arrondi.formats import LayerScheme, Scheme
from arrondi.pipeline.presets import PRESETS, preset_recipe
from arrondi.pipeline.recipe import Recipe
from arrondi.pipeline.step import Step
from arrondi.pipeline.steps import check_step, get_step, options_of_step, step_of_kind


@dataclass(frozen=True)
class Way:
    """A method of the grammar, taken apart, or a preset.

    Attributes:
        text: as the user wrote it.
        method: the step that rounds; of a preset its name.
        rewrites, repairs: steps around it; none of a preset, which knows them itself.
        options: STEP.NAME → value.
        preset: whether it is one.
    """

    text: str
    method: str
    rewrites: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    preset: bool = False

    def recipe(self, scheme: str | Scheme | LayerScheme | None, **common: Any) -> Recipe:
        """The recipe for a scheme; `common` as of `Recipe.simple`, and a preset has a scheme of its own.

        Raises:
            SchemeError: this way does not lead to this scheme.
        """
        if self.preset:
            return preset_recipe(self.method, scheme, options=self.options, **common)
        assert scheme is not None
        return Recipe.simple(
            scheme, self.method, rewrites=self.rewrites, repairs=self.repairs, options=self.options, **common
        )

    def words(self) -> dict[str, Any]:
        """The same as options of `arrondi quantize`."""
        options = tuple(f"{n}={v if isinstance(v, str) else json.dumps(v)}" for n, v in self.options.items())
        if self.preset:
            return {"preset": self.method, "option": options}
        steps = {"rewrite": ",".join(self.rewrites) or None, "repair": ",".join(self.repairs) or None}
        return {"method": self.method, **steps, "option": options}


def way_of(text: str) -> Way:
    """A method with what goes with it.

    Raises:
        SchemeError: a step or an option that does not exist, no step that rounds, or more than one.
    """
    if not isinstance(text, str) or not text.strip():
        raise SchemeError(f"A method is a word such as gptq or rotate+gptq, got {said(text)}.")
    names: dict[str, list[str]] = {"rewrite": [], "round": [], "repair": []}
    options: dict[str, Any] = {}
    for part in text.split("+"):
        name, *given = part.strip().split(":")
        if name.lower() in PRESETS:
            raise SchemeError(f"{name} is a preset, which is no method. Name it under presets: --presets {name}.")
        step = get_step(name)
        pairs = [_option(text, step, item) for item in given]
        refuse_repeated("option", [option for option, _ in pairs])
        names[step.kind].append(step.name)
        options |= dict(pairs)
    refuse_repeated("step", [n for kind in names.values() for n in kind])
    if len(names["round"]) != 1:
        found = " and ".join(names["round"])
        fix = f"got {found}. Leave one out" if found else f"got none. Write, for example, {text.strip()}+rtn"
        raise SchemeError(f"{text}: one step of a method rounds, {fix}.")
    return Way(text.strip(), names["round"][0], tuple(names["rewrite"]), tuple(names["repair"]), options)


def way_of_preset(name: str) -> Way:
    """A preset.

    Raises:
        SchemeError: there is none of that name.
    """
    if not isinstance(name, str) or name.strip().lower() not in PRESETS:
        raise unknown("preset", str(name), PRESETS)
    return Way(name.strip(), name.strip().lower(), preset=True)


def rewritten(ways: Sequence[Way], rewrites: Sequence[str]) -> list[Way]:
    """Every method after every rewrite: `none`, a name, or several with `+`.

    Raises:
        SchemeError: a rewrite that does not exist, or that a method has already.
    """
    found = []
    for text in rewrites:
        if not isinstance(text, str) or not text.strip():
            raise SchemeError(f"A rewrite is a word such as rotate, or none, got {said(text)}.")
        if text.strip().lower() != "none":
            for part in text.split("+"):
                step_of_kind("rewrite", part.strip().partition(":")[0])
    for way in ways:
        found += [way if text.strip().lower() == "none" else way_of(f"{text.strip()}+{way.text}") for text in rewrites]
    return found


def _option(text: str, step: Step, item: str) -> tuple[str, Any]:
    """STEP.NAME and its value, of what stands behind a step."""
    name, equals, word = item.partition("=")
    if not equals or not name:
        raise SchemeError(f"{text}: an option is NAME=VALUE behind a colon, got {item!r}. Example: gptq:damping=0.05.")
    try:
        value = json.loads(word)
    except ValueError:
        value = word
    other, _, name = name.rpartition(".")
    owner = get_step(other).name if other else step.name
    if owner not in (step.name, *step.before, *step.after):
        raise SchemeError(f"{text}: {owner} does not come with {step.name}. Write its options behind {owner}.")
    check_step(owner, {name: value})
    return f"{owner}.{name}", value


def with_options(ways: Iterable[Way], options: Mapping[str, Any]) -> list[Way]:
    """The ways with options for all of them; what stands in a way itself comes first, and a preset knows its own.

    Raises:
        SchemeError: nobody has such an option, or its value makes no sense.
    """
    found = []
    used: set[str] = set()
    for way in ways:
        steps = set() if way.preset else _all_steps(way)
        more: dict[str, Any] = {}
        for option, value in options.items():
            step, _, name = option.rpartition(".")
            wanted = get_step(step).name if step else way.method
            if wanted in steps and (step or name in options_of_step(wanted)):
                check_step(wanted, {name: value})
                more[f"{wanted}.{name}"] = value
                used.add(option)
        found.append(replace(way, options={**more, **way.options}))
    for option in options:
        if option not in used:
            raise SchemeError(
                f"No method that is compared has the option {option}. `arrondi methods` lists the options of all."
            )
    return found


def _all_steps(way: Way) -> set[str]:
    step = get_step(way.method)
    return {way.method, *way.rewrites, *way.repairs, *step.before, *step.after}


def refuse_repeated(kind: str, words: Sequence[str], values: Sequence[object] | None = None) -> None:
    """Refuse an entry that is there twice, also in other words."""
    seen: dict[object, str] = {}
    for word, value in zip(words, words if values is None else values, strict=True):
        key = value.lower() if isinstance(value, str) else str(value)
        if key in seen:
            same = f"{word} is there twice" if seen[key] == word else f"{seen[key]} and {word} are the same"
            raise SchemeError(f"Every {kind} is named once, and {same}. Leave one out.")
        seen[key] = word
