"""In which interpreter a consumer is, and what is installed there: `Interpreter`.

Consumers have conflicting needs, so each may live in an environment of its own: named by the user, by an environment variable, or else
this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from arrondi.errors import SchemeError

SCRIPTS: Final = Path(__file__).with_name("scripts")
_MODULES: Final[Mapping[str, str]] = {"llama-cpp-python": "llama_cpp"}
"""Packages whose module has another name than theirs with underscores."""
_PROBE_SECONDS: Final = 60


@dataclass(frozen=True)
class Interpreter:
    """A Python that may have a consumer.

    Attributes:
        python: its path.
        chosen: the user named it.
    """

    python: str
    chosen: bool

    @classmethod
    def of(cls, consumer: str, given: Mapping[str, str]) -> Interpreter:
        """The interpreter of a consumer.

        Args:
            given: consumer → path, as the user said it.
        """
        path = given.get(consumer) or os.environ.get(variable(consumer), "").split(os.pathsep)[0]
        return cls(path, True) if path else cls(sys.executable, False)

    @property
    def environment(self) -> dict[str, str]:
        """Its environment variables: paths of modules of this interpreter are no other's."""
        here = dict(os.environ)
        if self.chosen:
            here.pop("PYTHONPATH", None)
            here.pop("PYTHONHOME", None)
        return here

    def versions(self, packages: Iterable[str]) -> dict[str, str | None]:
        """Package → its version there, None where it is not installed.

        Raises:
            SchemeError: it is no Python.
        """
        pairs = [f"{package}={_MODULES.get(package, package.replace('-', '_'))}" for package in packages]
        command = [self.python, str(SCRIPTS / "probe.py"), *pairs]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=self.environment, timeout=_PROBE_SECONDS, check=False
            )
            found: dict[str, str | None] = json.loads(done.stdout)
            return found
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            raise SchemeError(
                f"{self.python} is no Python interpreter that answers ({type(error).__name__}). Give the path of one, such as /path/to/venv/bin/python."
            ) from error


def variable(consumer: str) -> str:
    """The environment variable that names the interpreter of a consumer.

    >>> variable("llama.cpp")
    'ARRONDI_LLAMA_CPP'
    """
    return f"ARRONDI_{consumer.upper().replace('.', '_')}"
