"""The command `verify`, and `--verify` of those that write. Registered in `arrondi.cli.commands`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from arrondi.cli import options as opt
from arrondi.cli.answers import answer
from arrondi.cli.parsing import words
from arrondi.errors import ArrondiError, SchemeError

MISMATCH = 1
"""Exit status when a consumer computes something else."""


def verify(
    model: Annotated[str, typer.Argument(help="Model directory, GGUF file or ONNX file.", show_default=False)],
    consumers: opt.Consumers = None,
    python: opt.Pythons = None,
    data: opt.NetworkData = None,
    timeout: Annotated[float, typer.Option(help="Seconds that a consumer may take.", min=1)] = 600,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Open an output in the programs that it is for, and compare what they compute with what its codes mean. Exit status 1: something else."""
    from arrondi.report import print_verification, progress_bar
    from arrondi.verification import verify_model

    names, pythons = words(consumers or []) or None, interpreters(python or [])
    with progress_bar("verifying", quiet) as progress:
        result = verify_model(model, names, pythons=pythons, data=data, timeout=timeout, progress=progress)
    answer(result, json_, print_verification)
    hold(result)


def chosen(verifies: bool, python: list[str] | None) -> dict[str, str] | None:
    """The interpreters to verify with, before the work; None where nothing is verified.

    Raises:
        SchemeError: there are interpreters, and nothing is verified.
    """
    if python and not verifies:
        raise SchemeError("--python names an interpreter to verify with. Add --verify, or leave it out.")
    return interpreters(python or []) if verifies else None


def written(
    result: dict[str, Any],
    show: Callable[[dict[str, Any]], None],
    output: Path,
    pythons: dict[str, str] | None,
    json_: bool,
    quiet: bool,
    data: Path | None = None,
) -> None:
    """Answer with the result of a command that has written, and with what consumers make of that if it is asked for."""
    if pythons is None:
        answer(result, json_, show)
        return
    from arrondi.report import print_verification, progress_bar
    from arrondi.verification import verify_model

    try:
        with progress_bar("verifying", quiet) as progress:
            found = verify_model(output, pythons=pythons, data=data, progress=progress)
    except ArrondiError:
        answer(result, json_, show)
        raise
    answer({**result, "verification": found}, json_, show)
    if not json_:
        print_verification(found)
    hold(found)


def hold(result: dict[str, Any]) -> None:
    """Exit with status 1 when a consumer computes something else."""
    if not result["ok"]:
        raise typer.Exit(MISMATCH)


def interpreters(items: list[str]) -> dict[str, str]:
    """CONSUMER=PATH of a repeatable option."""
    found: dict[str, str] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not equals or not name or not path:
            raise SchemeError(
                f"--python takes CONSUMER=PATH, got {item!r}. Example: --python llama.cpp=venv/bin/python."
            )
        if name in found:
            raise SchemeError(f"--python {name} is there twice, with {found[name]} and {path}. Leave one out.")
        found[name] = path
    return found
