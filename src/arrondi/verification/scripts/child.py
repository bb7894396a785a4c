"""Runs another script of this folder for as long as whoever started it lives. Knows nothing of arrondi.

    python child.py SCRIPT REQUEST.json

The one who started it holds the other end of its standard input. When that is closed, by whatever death, this process ends and takes what it has
started along.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import threading


def watch() -> None:
    """Ends everything when nobody is left who could read an answer."""
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)  # the group is this process's own
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=watch, daemon=True).start()
    script, request = sys.argv[1:]
    sys.argv = [script, request]
    runpy.run_path(script, run_name="__main__")
