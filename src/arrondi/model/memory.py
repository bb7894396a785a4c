"""Memory that was freed goes back to the system: `release`.

The C library keeps freed pieces of up to 32 MB for later; between blocks of a large model that adds up to hundreds of megabytes
of resident memory that nobody uses.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def release() -> None:
    """Hand unused pages back, where the C library can (glibc); elsewhere do nothing."""
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], object]:
    try:
        found: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda pad: None
    return found
