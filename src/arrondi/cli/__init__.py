"""The command line: words for people, one JSON document for programs.

Owns: the entry point `main`, exit statuses (0 done, 2 the input or the usage is wrong, 3 a quality limit was missed, 1 a defect)
and how errors are shown. Commands are in `arrondi.cli.commands`.
"""

from __future__ import annotations

import os
import sys

from arrondi.waiting import wait_passively


def main() -> None:
    """Run the command line; every error that a user can set right becomes one sentence on stderr."""
    wait_passively()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from arrondi.cli.commands import app
    from arrondi.errors import ArrondiError

    try:
        app()
    except ArrondiError as error:
        print(f"arrondi: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):  # as torch says it
            raise
        print(
            "arrondi: out of memory. Use fewer --samples or a smaller --seq-len; `arrondi plan` estimates the need.",
            file=sys.stderr,
        )
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        print(
            f"arrondi: {error.filename or 'a file'}: {error.strerror or error}. Check the path and its permissions.",
            file=sys.stderr,
        )
        sys.exit(2)
