"""The command line: words for people, one JSON document for programs.

Owns: the entry point `main` and how errors are shown. Exit statuses: 0 done, 2 the input or the usage is wrong, 3 a quality limit was
missed, 1 a defect, 130 stopped by Ctrl-C. Commands are in `arrondi.cli.commands`.
"""

from __future__ import annotations

import os
import sys

from arrondi.cli.interrupts import Interrupts, stopped
from arrondi.waiting import wait_passively


def main() -> None:
    """Run the command line; every error that a user can set right becomes one sentence on stderr."""
    from arrondi.errors import DEFECT, STOPPED, say

    _open_streams()
    wait_passively()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    arguments = sys.argv[1:] or ["--help"]
    with Interrupts() as interrupts:
        try:
            status = _run(arguments)
        except BrokenPipeError:
            # Who read the output has gone; what Python would still flush goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 0
        except (Exception, KeyboardInterrupt) as error:
            sentence, status = (stopped(arguments[0]), STOPPED) if interrupts.pressed else say(error)
            if status == DEFECT:
                import traceback

                traceback.print_exc()
            print(f"arrondi: {sentence}", file=sys.stderr)
    sys.exit(status)


def _open_streams() -> None:
    """Output that can be written to whatever was given: a stream that is closed, or one that lacks letters."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell: `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _run(arguments: list[str]) -> int:
    """One command, without the framework's own way to show errors: it would box sentences and swallow Ctrl-C."""
    from typer.main import get_command

    from arrondi.cli.commands import app
    from arrondi.cli.hints import usage_sentence

    try:
        with get_command(app).make_context("arrondi", list(arguments)) as context:
            context.command.invoke(context)
        return 0
    except SystemExit:  # of the framework's console, when the reader of a help text has gone
        raise BrokenPipeError from None
    except Exception as error:
        if type(error).__name__ == "Exit":  # of --help, and of a limit that was missed
            return int(getattr(error, "exit_code", 0))
        sentence = usage_sentence(error, arguments)
        if sentence is None:
            raise
        print(f"arrondi: {sentence}", file=sys.stderr)
        return 2
