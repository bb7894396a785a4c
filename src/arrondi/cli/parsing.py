"""Values of options from what the user wrote. Every refusal names the option and gives an example."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from arrondi.errors import SchemeError

if TYPE_CHECKING:
    from arrondi.pipeline import Recipe


def recipe_from(
    scheme: str | None,
    method: str | None,
    group_size: int | None,
    targets: list[str] | None,
    ignore: list[str] | None,
    options: list[str] | None,
    file: Path | None,
    rewrite: list[str] | None = None,
    repair: list[str] | None = None,
    all_experts: bool = False,
    preset: str | None = None,
    embeddings: str | None = None,
) -> Recipe:
    """The recipe of a file, of a preset, or of one method and what goes with it; of one of them alone.

    Raises:
        SchemeError: `--recipe` or `--preset` stands beside an option that it would overrule, or a value makes no sense.
    """
    from arrondi.pipeline import Recipe, preset_recipe

    steps = {"--method": method, "--rewrite": rewrite, "--repair": repair}
    named = [option for option, value in steps.items() if value is not None]
    if preset is not None and named:
        raise SchemeError(
            f"--preset {preset} says what is done, and so does {' and '.join(named)}. Leave one of them out."
        )
    if preset is not None and file is None:
        return preset_recipe(
            preset,
            scheme,
            group_size=group_size,
            targets=targets or ["Linear"],
            ignore=None if ignore is None else [s for s in ignore if s],
            options=method_options(options or []),
            all_experts=all_experts,
            embeddings=embeddings,
        )
    if file is None:
        return Recipe.simple(
            "W4A16" if scheme is None else scheme,
            method,
            group_size=group_size,
            targets=targets or ["Linear"],
            ignore=None if ignore is None else [s for s in ignore if s],
            options=method_options(options or []),
            rewrites=words(rewrite or []),
            repairs=words(repair or []),
            all_experts=all_experts,
            embeddings=embeddings,
        )
    given = {
        "--scheme": scheme, **steps, "--preset": preset, "--group-size": group_size,
        "--targets": targets, "--ignore": ignore, "--option": options,
        "--all-experts": all_experts or None, "--embeddings": embeddings,
    }  # fmt: skip
    beside = [option for option, value in given.items() if value is not None]
    if beside:
        raise SchemeError(
            f"--recipe and {' and '.join(beside)} say the same thing twice. Write it into {file}, or leave --recipe out."
        )
    return Recipe.read(file)


def words(texts: Sequence[str]) -> list[str]:
    """Words of a repeatable option, with commas between them."""
    return [word for text in texts for word in map(str.strip, text.split(",")) if word]


def method_options(items: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value that is JSON (a number, true) is read as such, else it is a word."""
    parsed: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise SchemeError(f"--option takes NAME=VALUE, got {item!r}. Example: --option damping=0.02.")
        if name in parsed:
            raise SchemeError(f"--option {name} is there twice, with {parsed[name]!r} and {value!r}. Leave one out.")
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = value
    return parsed


def byte_count(text: str) -> int:
    """`500MB`, `5GB`: powers of 1000."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "": 1}
    number = text.upper().rstrip("KMGTB")
    try:
        size = int(float(number) * units[text.upper()[len(number) :]])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise SchemeError(f"--shard-size takes a size such as 500MB or 5GB, got {text!r}.")
    return size


def sizes(option: str, text: str, separator: str, count: int | None = None) -> list[int]:
    """`4096x4096` or `1,16`: positive numbers, `count` of them if that is given."""
    parts = text.lower().strip().split(separator)
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts) or count not in (None, len(parts)):
        example = "4096x4096,11008x4096" if count else "1,16,512"
        raise SchemeError(f"{option} takes positive numbers such as {example}, got {text!r}.")
    return [int(part) for part in parts]


def scheme_names(texts: Sequence[str]) -> list[str]:
    """Schemes of a repeatable option, with `;` or commas between them.

    The grammar has commas of its own (`w=int8,a=int8`): a part with `=` belongs to the scheme before it as long as that has no
    part of the same name. `;` always ends a scheme.

    >>> scheme_names(["W4A16,NF4,w=int8,a=int8,W8A8", "w=int4;w=int3,a=int8"])
    ['W4A16', 'NF4', 'w=int8,a=int8', 'W8A8', 'w=int4', 'w=int3,a=int8']
    """
    found: list[str] = []
    for text in ";".join(texts).split(";"):
        keys: set[str] = set()  # of the scheme that is being put together
        for part in filter(None, (part.strip() for part in text.split(","))):
            key, equals, _ = part.partition("=")
            if equals and keys and key not in keys:
                found[-1] += f",{part}"
            else:
                found.append(part)
                keys.clear()
            if equals:
                keys.add(key)
    return found


def set_by_user(context: typer.Context, *names: str) -> list[str]:
    """Those of these parameters that stand on the command line, as options."""
    found = []
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            found.append(f"--{name.replace('_', '-')}")
    return found
