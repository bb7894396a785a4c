"""Every error that Arrondi raises on purpose, and the sentence for those that the system raises.

    ArrondiError
    ├── ShapeError(ValueError)          a tensor's shape does not fit what was asked of it
    ├── SchemeError(ValueError)         a format, scheme, method, option or selector that does not exist or cannot be combined
    ├── DataError(ValueError)           NaN weights, a calibration text that is too short, ...
    ├── FileFormatError(ValueError)     a file that is truncated, inconsistent or of another kind
    ├── OutputError(OSError)            the output cannot be written: something else is there, the disk is full
    └── MissingExtraError(ImportError)  an optional package is needed; says which

A message has three parts, in this order: what was wrong, what was found, what to do. The command line prints it as it is,
so it names things by words that serve there and in Python: "a group size of 32", not a call. `say` gives the sentence and
the exit status of any exception, also of those that the system raises.
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

INPUT, DEFECT, STOPPED = 2, 1, 130
"""Exit statuses: the input or the usage is wrong; Arrondi is; the user pressed Ctrl-C."""


class ArrondiError(Exception):
    """Base of all errors below; catching it catches whatever a user can set right.

    As text it is one line that a terminal prints as it is, whatever names a file put into it.
    """

    def __str__(self) -> str:
        line = " ".join(super().__str__().splitlines())
        return line if line.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


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


_NEAREST: Final = 3
"""Known names that are proposed at most."""


def unknown(
    kind: str, name: str, known: Iterable[str], error: type[ArrondiError] = SchemeError, *, hint: str = ""
) -> ArrondiError:
    """The error for a name that is not in a table, with the nearest known names.

    Names that begin with the unknown one come first: `FP8` stands for FP8A16 or FP8_BLOCK, never for MXFP8.

    Args:
        kind: what the name should be one of.
        name: as the user wrote it.
        known: the table.
        error: class of the error.
        hint: a sentence that says more than the nearest names do, instead of them.

    >>> str(unknown("method", "gptqq", ["rtn", "gptq"]))
    "Unknown method 'gptqq'. Did you mean 'gptq'? Known: gptq, rtn."
    """
    names = sorted(known)
    if not isinstance(name, str):
        return error(f"The {kind} is a word, got {type(name).__name__}. Known: {', '.join(names)}.")
    folded = {n.lower(): n for n in names}
    begun = [folded[n] for n in folded if name and n.startswith(name.lower())][:_NEAREST]
    near = begun or [folded[n] for n in difflib.get_close_matches(name.lower(), folded, n=1)]
    said = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return error(f"Unknown {kind} {name!r}.{f' {hint}' if hint else said} Known: {', '.join(names)}.")


class Said(NamedTuple):
    """What the command line says of an exception, and the status with which it ends."""

    sentence: str
    status: int


_SYSTEM: Final = {
    errno.EMFILE: "too many open files. Raise the limit (ulimit -n 4096) and run the same command again.",
    errno.ENFILE: "the system has too many open files. Close some programs and run the same command again.",
    errno.ENOSPC: "the disk is full. Free some space and run the same command again.",
    errno.EDQUOT: "the disk quota is used up. Free some space and run the same command again.",
    errno.EROFS: "a read-only file system. Choose another output.",
    errno.ENAMETOOLONG: "the name is too long. Choose a shorter one.",
    errno.EIO: "the disk does not answer (input/output error). Check the disk.",
}
_MEMORY: Final = "out of memory. Use fewer --samples or a smaller --seq-len; `arrondi plan` estimates the need."
_TORCH_MEMORY: Final = ("can't allocate memory", "out of memory")
"""As torch says on the CPU and on a GPU that memory is short; both are RuntimeErrors."""


def say(error: BaseException) -> Said:
    """The sentence and the exit status of an exception.

    What stands behind an error counts, too: a shard that could not be opened for want of descriptors says so, whatever was
    made of it on the way. An exception of a kind that is not foreseen here is a defect of Arrondi, with status 1.

    >>> say(SchemeError("Unknown method 'x'. Known: rtn."))
    Said(sentence="Unknown method 'x'. Known: rtn.", status=2)
    """
    if isinstance(error, KeyboardInterrupt):
        return Said("stopped.", STOPPED)
    for cause in _behind(error):
        if isinstance(cause, MemoryError) or (
            isinstance(cause, RuntimeError) and any(words in str(cause) for words in _TORCH_MEMORY)
        ):
            return Said(_MEMORY, INPUT)
        if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
            return Said(_SYSTEM[cause.errno], INPUT)
    if isinstance(error, ArrondiError):
        return Said(" ".join(str(error).split()), INPUT)
    if isinstance(error, OSError):
        place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        reason = f"{error.strerror or error}. Check the path and its permissions."
        return Said(place + _SYSTEM.get(error.errno or 0, reason), INPUT)
    about = " ".join(str(error).split())
    return Said(f"this is a defect of arrondi, not of your input: {type(error).__name__}: {about}", DEFECT)


def _behind(error: BaseException) -> Iterator[BaseException]:
    """An exception and what caused it."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
