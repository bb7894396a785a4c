"""Every error that Arrondi raises on purpose.

    ArrondiError
    ├── ShapeError(ValueError)        a tensor's shape does not fit what was asked of it
    ├── SchemeError(ValueError)       a format, scheme, method or selector that does not exist or cannot be combined
    ├── DataError(ValueError)         NaN weights, a calibration text that is too short, ...
    ├── FileFormatError(ValueError)   a file that is truncated, inconsistent or of another kind
    ├── OutputError(OSError)          the output cannot be written: something else is there, the disk is full
    └── MissingExtraError(ImportError)  an optional package is needed; says which

A message has three parts, in this order: what was wrong, what was found, what to do. The command line prints it as it is
and exits with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ArrondiError(Exception):
    """Base of all errors below; catching it catches whatever a user can set right."""


class ShapeError(ArrondiError, ValueError):
    """A tensor's shape does not fit what was asked of it."""


class SchemeError(ArrondiError, ValueError):
    """A format, scheme, method or selector that does not exist or cannot be combined."""


class DataError(ArrondiError, ValueError):
    """The numbers or the text cannot be used: NaN weights, a calibration text that is too short."""


class FileFormatError(ArrondiError, ValueError):
    """A file is truncated, contradicts itself, or is of another kind."""


class OutputError(ArrondiError, OSError):
    """The output cannot be written."""


class MissingExtraError(ArrondiError, ImportError):
    """An optional package is needed; the message says how to install it."""


def unknown(kind: str, name: str, known: Iterable[str], error: type[ArrondiError] = SchemeError) -> ArrondiError:
    """The error for a name that is not in a table, with the nearest known names.

    >>> str(unknown("method", "gptqq", ["rtn", "gptq"]))
    "Unknown method 'gptqq'. Did you mean 'gptq'? Known: gptq, rtn."
    """
    names = sorted(known)
    folded = {n.lower(): n for n in names}
    near = [folded[n] for n in difflib.get_close_matches(name.lower(), folded, n=1)]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return error(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")
