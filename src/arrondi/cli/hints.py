"""Sentences for commands and options that do not exist, also for those that other tools have.

Owns: `usage_sentence`. Typer brings its own copy of click from some version on, so its errors are known by what they have, not by
their class.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Final

_ELSEWHERE: Final = {
    "--bits": "The scheme says the bits: --scheme W4A16 is 4 bits for weights, --scheme w=int3/g64 is 3 in groups of 64.",
    "--out": "The output is named with -o DIR.",
    "--gguf": "No GGUF files are written yet. `arrondi plan` says what is written and who reads it.",
    "--dataset": "Calibration text is a file: --calibration FILE.",
    "--nsamples": "Windows of calibration text are --samples N.",
    "--model": "The model is an argument without an option: arrondi COMMAND MODEL.",
    "--sym": "The scheme says it: --scheme W4A16 is symmetric, W4A16_ASYM is not.",
    "--desc-act": "Act-order is --option order=static (or none).",
    "--damp": "Damping is --option damping=0.01 with --method gptq.",
    "--dtype": "This command has no --dtype: `dequantize` and `run` do.",
    "--gpu": "A GPU is named with --device cuda:0.",
}
"""Options of other tools, each with what says the same here."""

_SAME: Final = {
    "--wbits": "--bits", "--w-bits": "--bits", "--weight-bits": "--bits", "--num-bits": "--bits", "--bit": "--bits", "-b": "--bits",
    "--output-dir": "--out", "--out-dir": "--out", "--save-dir": "--out", "--save": "--out", "--output-path": "--out",
    "--outtype": "--gguf", "--data": "--dataset", "--calib": "--dataset", "--calibration-data": "--dataset",
    "--calib-data": "--dataset", "--calibration-dataset": "--dataset", "--num-samples": "--nsamples", "--n-samples": "--nsamples",
    "--num-calibration-samples": "--nsamples", "--model-path": "--model", "--model-id": "--model", "-m": "--model",
    "--asym": "--sym", "--symmetric": "--sym", "--zero-point": "--sym", "--act-order": "--desc-act", "--actorder": "--desc-act",
    "--damping": "--damp", "--damp-percent": "--damp", "--percdamp": "--damp", "--cuda": "--gpu",
}  # fmt: skip


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
    elsewhere = _ELSEWHERE.get(_SAME.get(key, key))
    if elsewhere:
        return elsewhere
    near = difflib.get_close_matches(key, [o for o in known if o.startswith("--")], n=1)
    return f"Did you mean {near[0]}?" if near else ""


def _command_hint(word: str, context: Any) -> str:
    known = sorted(getattr(context.command, "commands", {})) if context is not None else []
    near = difflib.get_close_matches(word, known, n=1)
    said = f"Did you mean {near[0]}? " if near else ""
    return f"{said}Commands: {', '.join(known)}."
