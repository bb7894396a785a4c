"""What is compared: every scheme by every method or preset, with every choice for the embeddings, and recipes as they are.

Owns: `Candidate`, `candidates`, and the grammar of a method with what goes with it:

    gptq                        one step that rounds
    rotate+gptq                 rewrites before it, repairs after it, in any order of writing
    gptq:damping=0.05           options of a step, each after a colon
    rotate+gptq+tune:passes=2   they belong to the step that they stand behind,
    awq:awq-scale.grid=10       or to one that comes with it
    recipe.json                 a recipe file, which says its own schemes

Rewrites that are named apart (`none`, `rotate`, `rotate+smoothquant`) are each put before every method. What is misspelt is refused here,
before any work. What a method cannot make is a candidate with the reason.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arrondi.arguments import said
from arrondi.errors import SchemeError
from arrondi.formats import LayerScheme, Scheme
from arrondi.pipeline.recipe import Recipe, table_scheme
from arrondi.pipeline.steps import get_step
from arrondi.search.ways import Way, refuse_repeated, rewritten, way_of, way_of_preset, with_options
from arrondi.tensor.checks import layer_scheme_of


@dataclass(frozen=True)
class Candidate:
    """One row of the comparison.

    Attributes:
        scheme, method: as the user wrote them; the schemes of a recipe file, and of a preset for which none was asked for, are those
            of its rules. The method of a preset is its name.
        recipe: what is done; None where the method cannot make the scheme.
        reason: why it cannot.
        options: with which `arrondi quantize` does the same.
        preset: whether the method is the name of a preset.
        embeddings: as the user wrote it; of a recipe or preset that says something itself, that; None where tables stay.
    """

    scheme: str
    method: str
    recipe: Recipe | None
    reason: str = ""
    options: str = ""
    preset: bool = False
    embeddings: str | None = None

    @property
    def names(self) -> dict[str, Any]:
        """What a row says of itself; `rewrites` are all that are done, those that come with a method too."""
        rules = () if self.recipe is None else self.recipe.rules
        rewrites = list(dict.fromkeys(r.method for r in rules if get_step(r.method).kind == "rewrite"))
        return {
            "scheme": self.scheme,
            "method": self.method,
            "preset": self.method.lower() if self.preset else None,
            "rewrites": rewrites,
            "embeddings": self.embeddings,
            "options": self.options,
        }


def candidates(
    schemes: Sequence[str | Scheme | LayerScheme] | None,
    methods: Sequence[str],
    *,
    presets: Sequence[str] = (),
    rewrites: Sequence[str] = ("none",),
    embeddings: Sequence[str] = ("none",),
    group_size: int | None = None,
    targets: Iterable[str] = ("Linear",),
    ignore: Iterable[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Candidate]:
    """All candidates, scheme by scheme, recipe files last.

    Args:
        schemes: words or values; None is W4A16 for methods and its own scheme for a preset, or nothing where all are recipe files.
        methods: see above.
        presets: names of `arrondi.pipeline.presets.PRESETS`, each tried at every scheme.
        rewrites: `none` or names, each tried with every method; presets and recipe files say theirs themselves.
        embeddings: `none` or what tables of words become, each tried with every method and preset.
        group_size, targets, ignore: as of `Recipe.simple`, for all but recipe files, which say them themselves.
        options: STEP.NAME → value, given to every candidate with that step; NAME → value, to every method that has it.

    Raises:
        SchemeError: an empty or repeated entry, a name that does not exist, an option that nobody has.
        FileFormatError: a recipe file that is none.
    """
    files = [m for m in methods if isinstance(m, str) and m.lower().endswith(".json")]
    ways = [way_of(m) for m in methods if m not in files]
    if not ways and not presets and not files:
        raise SchemeError("There is no method to compare. Name some: rtn, gptq, rotate+gptq.")
    if not ways and list(rewrites) != ["none"]:
        raise SchemeError(
            "Rewrites go before methods, and none is named. Name some: rtn, gptq; or leave the rewrites out."
        )
    if not ways and not presets and list(embeddings) != ["none"]:
        raise SchemeError(
            "Recipe files say what becomes of embeddings themselves. Leave --embeddings out, or name a method."
        )
    ways = [*rewritten(ways, rewrites), *map(way_of_preset, presets)]
    refuse_repeated("method", [w.text for w in ways] + files)
    for table in embeddings:
        if not isinstance(table, str) or not table.strip():
            raise SchemeError(f"What embeddings become is a word such as int8/row, or none, got {said(table)}.")
    tables = [None if table.strip().lower() == "none" else table.strip() for table in embeddings]
    values = ["none" if table is None else table_scheme(table) for table in tables]
    refuse_repeated("choice for embeddings", embeddings, values)
    if schemes is not None and not schemes and ways:
        raise SchemeError("There is no scheme to compare methods at. Name some: W4A16, W3A16.")
    if not ways and schemes:
        raise SchemeError("Recipe files say their schemes themselves. Leave the schemes out, or name a method.")
    layers = [layer_scheme_of(scheme) for scheme in schemes or []]
    words = [s if isinstance(s, str) else str(layer) for s, layer in zip(schemes or [], layers, strict=True)]
    refuse_repeated("scheme", words, layers)
    if group_size is not None:
        layers = [layer.with_group_size(group_size) for layer in layers]
    picked = tuple(targets)
    common = {"group_size": group_size, "targets": picked, "ignore": None if ignore is None else tuple(ignore)}
    ways = with_options(ways, options or {})
    asked: list[tuple[str | None, LayerScheme | None]] = [*zip(words, layers, strict=True)] or [(None, None)]
    found = [_candidate(word, layer, way, table, common) for word, layer in asked for way in ways for table in tables]
    return found + [_of_file(file) for file in files]


def _candidate(
    word: str | None, layer: LayerScheme | None, way: Way, table: str | None, common: Mapping[str, Any]
) -> Candidate:
    """
    Args:
        word, layer: the scheme as `--scheme` takes it, and its value; None is that of the preset, or W4A16.
    """
    scheme = word if word is not None or way.preset else "W4A16"
    picked = common["targets"]
    beside = {**common, "targets": () if picked == ("Linear",) else picked, "embeddings": table}
    options = shlex.join(_words({"scheme": scheme, **way.words(), **beside}))
    try:
        recipe = way.recipe(layer or scheme, embeddings=table, **common)
    except SchemeError as error:  # names are known to exist: it is this scheme that does not go with this method
        return Candidate(scheme or "its own", way.text, None, str(error), preset=way.preset, embeddings=table)
    return Candidate(
        scheme or _schemes(recipe), way.text, recipe, "", options, way.preset, table or _embeddings(recipe)
    )


def _words(options: Mapping[str, Any]) -> list[str]:
    """Options as the command line takes them: None is left out, of several each stands alone, and an empty --ignore is an empty word."""
    found = []
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, tuple) else (value,)
            found += [word for one in values for word in (f"--{name.replace('_', '-')}", str(one))]
            found += ["--ignore", ""] if name == "ignore" and not values else []
    return found


def _of_file(file: str) -> Candidate:
    recipe = Recipe.read(Path(file))
    options = shlex.join(["--recipe", file])
    return Candidate(_schemes(recipe), file, recipe, options=options, embeddings=_embeddings(recipe))


def _schemes(recipe: Recipe) -> str:
    """The schemes of what multiplies."""
    found = dict.fromkeys(str(r.scheme) for r in recipe.rules if r.scheme is not None and r.targets != ("Embedding",))
    return " + ".join(found) or "none"


def _embeddings(recipe: Recipe) -> str | None:
    """What tables become by the rules that are for them alone."""
    found = [str(r.scheme) for r in recipe.rules if r.scheme is not None and r.targets == ("Embedding",)]
    return found[-1] if found else None
