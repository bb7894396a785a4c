"""A consumer asked in a process of its own: `ask`. Arrays go there and come back as files; nothing of it can take this process along.

It ends with this process, however that ends: `scripts/child.py` watches its standard input.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from arrondi.verification.interpreters import SCRIPTS, Interpreter

_SAID: Final = 300
"""Characters of a consumer's last words that are told."""


@dataclass(frozen=True)
class Answer:
    """What a consumer gave.

    Attributes:
        values: arrays by name; none where it failed.
        about: what else it told.
        failure: why there are no values, as the end of a sentence; "" if there are.
    """

    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""


def ask(
    interpreter: Interpreter,
    script: str,
    request: Mapping[str, Any],
    inputs: Mapping[str, np.ndarray],
    seconds: float,
) -> Answer:
    """Let a script of another interpreter answer a request.

    Args:
        interpreter: which.
        script: a file in `scripts`.
        request: plain data; where inputs lie and answers are to be put is added.
        inputs: arrays by name.
        seconds: after which it is ended.
    """
    with tempfile.TemporaryDirectory(prefix="arrondi-verify-") as folder:
        room = Path(folder)
        np.savez(room / "inputs.npz", **inputs)  # type: ignore[arg-type]
        places = {"inputs": "inputs.npz", "out": "out.npz", "about": "about.json"}
        asked = {**request, **{key: str(room / name) for key, name in places.items()}}
        (room / "request.json").write_text(json.dumps(asked), encoding="utf-8")
        command = [interpreter.python, str(SCRIPTS / "child.py"), str(SCRIPTS / script), str(room / "request.json")]
        failure = _run(command, interpreter.environment, room / "said.txt", seconds)
        if failure:
            return Answer(failure=failure)
        try:
            with np.load(room / "out.npz", allow_pickle=False) as held:
                values = {name: held[name] for name in held.files}
            return Answer(values, json.loads((room / "about.json").read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            return Answer(failure=f"it ended without an answer ({error})")


def _run(command: list[str], environment: Mapping[str, str], said: Path, seconds: float) -> str:
    """Run a command to its end; "" or why it failed."""
    with said.open("wb") as words:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=words, stderr=words, env=environment, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"it gave no answer within {seconds:g} s (--timeout)"
        finally:
            if process.poll() is None:
                _end(process)
            if process.stdin is not None:
                process.stdin.close()  # only now: it ends when this is closed
    if not status:
        return ""
    lines = [line.strip() for line in said.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1][:_SAID] if lines else "it said nothing"
    return f"it was ended by signal {-status}: {last}" if status < 0 else last


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):  # no groups on this system, or it has just gone
        process.kill()
    process.wait()
