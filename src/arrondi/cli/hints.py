"""Sentences for commands and options that do not exist, also for those that other tools have.

Owns: `usage_sentence`. Typer brings its own copy of click from some version on, so its errors are known by what they have, not by
their class.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Final

from arrondi.cli.other_tools import meaning_of

_ALIKE: Final = 0.75
"""How like a known option an unknown one must be spelt to be taken for it: --force is no --ignore."""


def usage_sentence(error: Exception, arguments: Sequence[str]) -> str | None:
    """What a usage error of the command line says, in one sentence; None for any other exception."""
    message = getattr(error, "format_message", None)
    if message is None or not hasattr(error, "exit_code"):
        return None
    context = getattr(error, "ctx", None)
    command = next((a for a in arguments if not a.startswith("-")), "")
    help_ = f"See {context.command_path if context else f'arrondi {command}'.strip()} --help."
    option = getattr(error, "option_name", None)
    if isinstance(option, str) and hasattr(error, "possibilities"):
        return f"No such option: {option}. {_option_hint(option, context) or help_}"
    text = " ".join(str(message()).split()).rstrip(".")
    if text.startswith("No such command"):
        return f"No such command: {command}. {_command_hint(command, context) or help_}"
    return f"{text}. {help_}"


def _option_hint(option: str, context: Any) -> str:
    key = option.lower().replace("_", "-")
    known = [] if context is None else [o for p in context.command.params for o in getattr(p, "opts", [])]
    if key in known:
        return f"Did you mean {key}?"
    elsewhere = meaning_of(option, known)
    if elsewhere:
        return elsewhere
    near = difflib.get_close_matches(key, [o for o in known if o.startswith("--")], n=1, cutoff=_ALIKE)
    return f"Did you mean {near[0]}?" if near else ""


def _command_hint(word: str, context: Any) -> str:
    known = sorted(getattr(context.command, "commands", {})) if context is not None else []
    near = difflib.get_close_matches(word, known, n=1)
    said = f"Did you mean {near[0]}? " if near else ""
    return f"{said}Commands: {', '.join(known)}."
