"""The command line: words for people, one JSON document for programs.

Owns: the entry point `main` and how errors are shown. Exit statuses: 0 done, 2 the input or the usage is wrong, 3 a quality limit was
missed, 1 a defect, 130 stopped by Ctrl-C. Commands are in `arrondi.cli.commands`.
"""

from __future__ import annotations

import os
import sys

from arrondi.waiting import wait_passively


def main() -> None:
    """Run the command line; every error that a user can set right becomes one sentence on stderr."""
    from arrondi.errors import DEFECT, say

    wait_passively()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        status = _run(sys.argv[1:] or ["--help"])
    except BrokenPipeError:
        # Who read the output has gone; what Python would still flush goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (Exception, KeyboardInterrupt) as error:
        sentence, status = say(error)
        if status == DEFECT:
            import traceback

            traceback.print_exc()
        print(f"arrondi: {sentence}", file=sys.stderr)
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    """One command, without the framework's own way to show errors: it would box sentences and swallow Ctrl-C."""
    from typer.main import get_command

    from arrondi.cli.commands import app
    from arrondi.cli.hints import usage_sentence

    try:
        with get_command(app).make_context("arrondi", list(arguments)) as context:
            context.command.invoke(context)
        return 0
    except Exception as error:
        if type(error).__name__ == "Exit":  # of --help, and of a limit that was missed
            return int(getattr(error, "exit_code", 0))
        sentence = usage_sentence(error, arguments)
        if sentence is None:
            raise
        print(f"arrondi: {sentence}", file=sys.stderr)
        return 2
