"""How a command answers: a document for programs on stdout, or words for people; what is to be known besides on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

from arrondi.cli.parsing import set_by_user
from arrondi.documents import to_json


def answer(document: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    """The document, or what `show` makes of it."""
    if as_json:
        print_json(document)
    else:
        show(document)


def print_json(document: dict[str, Any]) -> None:
    """Letters as they are where stdout has them, else escaped: nothing may be replaced in a document."""
    text = to_json(document)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = to_json(document, ascii_only=True)
    typer.echo(text)


def note(sentence: str | None) -> None:
    """Something to know, on stderr: it stops nothing and is no part of the answer."""
    if sentence:
        typer.echo(f"arrondi: {sentence}", err=True)


def useless(context: typer.Context, without: str, *names: str) -> None:
    """Say which options of the user have no effect."""
    given = set_by_user(context, *names)
    if given:
        change = "changes" if len(given) == 1 else "change"
        note(f"{' and '.join(given)} {change} nothing here: there is no {without.removeprefix('a ')}.")
