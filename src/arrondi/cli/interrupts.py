"""Ctrl-C, also where a library swallows it.

Owns: `Interrupts`, which remembers that the key was pressed, and `stopped`, what is said then. An import that is interrupted may
come back as "could not import", with the interrupt nowhere in the chain of causes.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Final

_RESUMABLE: Final = ("compare", "quantize", "dequantize")
"""Commands that keep what is finished."""


class Interrupts:
    """While it is open, Ctrl-C raises KeyboardInterrupt as always, and is remembered."""

    def __init__(self) -> None:
        self.pressed = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        # Python ends itself by the signal when an interrupt has ever left a string that is run as code, whatever was
        # made of it; many libraries run such strings while they are imported. One that ends well takes that back.
        eval("None")

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        raise KeyboardInterrupt


def stopped(command: str) -> str:
    """What is said after Ctrl-C."""
    if command in _RESUMABLE:
        return f"stopped. Run the same command again: {command} continues where it stopped."
    return "stopped."
