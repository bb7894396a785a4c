"""What is compared: every scheme by every method, and recipes as they are.

Owns: `Candidate`, `candidates`, and the grammar of a method with what goes with it:

    gptq                        one step that rounds
    rotate+gptq                 rewrites before it, repairs after it, in any order of writing
    gptq:damping=0.05           options of a step, each after a colon
    rotate+gptq+tune:passes=2   they belong to the step that they stand behind,
    awq:awq-scale.grid=10       or to one that comes with it
    recipe.json                 a recipe file, which says its own schemes

What is misspelt is refused here, before any work. What a method cannot make is a candidate with the reason.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arrondi.arguments import said
from arrondi.errors import SchemeError
from arrondi.formats import LayerScheme, Scheme
from arrondi.pipeline.recipe import Recipe
from arrondi.pipeline.step import Step
from arrondi.pipeline.steps import check_step, get_step, options_of_step
from arrondi.tensor.checks import layer_scheme_of


@dataclass(frozen=True)
class Candidate:
    """One row of the comparison.

    Attributes:
        scheme, method: as the user wrote them; the schemes of a recipe file are those of its rules.
        recipe: what is done; None where the method cannot make the scheme.
        reason: why it cannot.
        options: with which `arrondi quantize` does the same.
    """

    scheme: str
    method: str
    recipe: Recipe | None
    reason: str = ""
    options: str = ""


@dataclass(frozen=True)
class _Way:
    """A method of the grammar, taken apart."""

    text: str
    method: str
    rewrites: tuple[str, ...]
    repairs: tuple[str, ...]
    options: dict[str, Any]  # STEP.NAME → value


def candidates(
    schemes: Sequence[str | Scheme | LayerScheme] | None,
    methods: Sequence[str],
    *,
    group_size: int | None = None,
    targets: Iterable[str] = ("Linear",),
    ignore: Iterable[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Candidate]:
    """All candidates, scheme by scheme, recipe files last.

    Args:
        schemes: words or values; None is W4A16, or nothing where all methods are recipe files.
        methods: see above.
        group_size, targets, ignore: as of `Recipe.simple`, for all but recipe files, which say them themselves.
        options: STEP.NAME → value, given to every candidate with that step; NAME → value, to every method that has it.

    Raises:
        SchemeError: an empty or repeated entry, a name that does not exist, an option that nobody has.
        FileFormatError: a recipe file that is none.
    """
    files = [m for m in methods if isinstance(m, str) and m.lower().endswith(".json")]
    ways = [_way(m) for m in methods if m not in files]
    _refuse_repeated("method", [w.text for w in ways] + files)
    if schemes is None:
        schemes = ["W4A16"] if ways else []
    if not ways and not files:
        raise SchemeError("There is no method to compare. Name some: rtn, gptq, rotate+gptq.")
    if ways and not schemes:
        raise SchemeError("There is no scheme to compare methods at. Name some: W4A16, W3A16.")
    if not ways and schemes:
        raise SchemeError("Recipe files say their schemes themselves. Leave the schemes out, or name a method.")
    layers = [layer_scheme_of(scheme) for scheme in schemes]
    words = [s if isinstance(s, str) else str(layer) for s, layer in zip(schemes, layers, strict=True)]
    _refuse_repeated("scheme", words, layers)
    if group_size is not None:
        layers = [layer.with_group_size(group_size) for layer in layers]
    ways = _with_options(ways, options or {})
    picked = tuple(targets)
    kept = None if ignore is None else tuple(ignore)
    beside = _words({"group-size": group_size, "targets": () if picked == ("Linear",) else picked, "ignore": kept})
    found = []
    for word, layer in zip(words, layers, strict=True):
        found += [_candidate(word, layer, way, picked, kept, beside) for way in ways]
    return found + [_of_file(file) for file in files]


def _candidate(
    word: str,
    layer: LayerScheme,
    way: _Way,
    targets: tuple[str, ...],
    ignore: tuple[str, ...] | None,
    beside: list[str],
) -> Candidate:
    try:
        recipe = Recipe.simple(
            layer, way.method, targets=targets, ignore=ignore, options=way.options, rewrites=way.rewrites, repairs=way.repairs
        )  # fmt: skip
    except SchemeError as error:  # names are known to exist: it is this scheme that does not go with this method
        return Candidate(word, way.text, None, str(error))
    steps = {"rewrite": ",".join(way.rewrites) or None, "repair": ",".join(way.repairs) or None}
    options = tuple(f"{n}={v if isinstance(v, str) else json.dumps(v)}" for n, v in way.options.items())
    same = _words({"scheme": word, "method": way.method, **steps, "option": options})
    return Candidate(word, way.text, recipe, options=shlex.join(same + beside))


def _words(options: Mapping[str, Any]) -> list[str]:
    """Options as the command line takes them: None is left out, of several each stands alone, and an empty --ignore is an empty word."""
    found = []
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, tuple) else (value,)
            found += [word for one in values for word in (f"--{name}", str(one))]
            found += ["--ignore", ""] if name == "ignore" and not values else []
    return found


def _of_file(file: str) -> Candidate:
    recipe = Recipe.read(Path(file))
    schemes = dict.fromkeys(str(rule.scheme) for rule in recipe.rules if rule.scheme is not None)
    return Candidate(" + ".join(schemes) or "none", file, recipe, options=shlex.join(["--recipe", file]))


def _way(text: str) -> _Way:
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
        step = get_step(name)
        pairs = [_option(text, step, item) for item in given]
        _refuse_repeated("option", [option for option, _ in pairs])
        names[step.kind].append(step.name)
        options |= dict(pairs)
    _refuse_repeated("step", [n for kind in names.values() for n in kind])
    if len(names["round"]) != 1:
        found = " and ".join(names["round"])
        fix = f"got {found}. Leave one out" if found else f"got none. Write, for example, {text.strip()}+rtn"
        raise SchemeError(f"{text}: one step of a method rounds, {fix}.")
    return _Way(text.strip(), names["round"][0], tuple(names["rewrite"]), tuple(names["repair"]), options)


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


def _with_options(ways: list[_Way], options: Mapping[str, Any]) -> list[_Way]:
    """The ways with options for all of them; what stands in a way itself comes first.

    Raises:
        SchemeError: nobody has such an option, or its value makes no sense.
    """
    found = []
    used: set[str] = set()
    for way in ways:
        steps = _all_steps(way)
        more: dict[str, Any] = {}
        for option, value in options.items():
            step, _, name = option.rpartition(".")
            wanted = get_step(step).name if step else way.method
            if wanted in steps and (step or name in options_of_step(wanted)):
                check_step(wanted, {name: value})
                more[f"{wanted}.{name}"] = value
                used.add(option)
        found.append(_Way(way.text, way.method, way.rewrites, way.repairs, {**more, **way.options}))
    for option in options:
        if option not in used:
            raise SchemeError(
                f"No method that is compared has the option {option}. `arrondi methods` lists the options of all."
            )
    return found


def _all_steps(way: _Way) -> set[str]:
    step = get_step(way.method)
    return {way.method, *way.rewrites, *way.repairs, *step.before, *step.after}


def _refuse_repeated(kind: str, words: Sequence[str], values: Sequence[object] | None = None) -> None:
    """Refuse an entry that is there twice, also in other words."""
    seen: dict[object, str] = {}
    for word, value in zip(words, words if values is None else values, strict=True):
        key = value.lower() if isinstance(value, str) else str(value)
        if key in seen:
            same = f"{word} is there twice" if seen[key] == word else f"{seen[key]} and {word} are the same"
            raise SchemeError(f"Every {kind} is named once, and {same}. Leave one out.")
        seen[key] = word
