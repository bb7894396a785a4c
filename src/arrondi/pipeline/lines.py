"""The lines of a journal: JSON objects, each with a checksum that covers the lines before it.

Owns: their form, and `read_lines`, which believes them up to the first that is torn, changed, or none of ours. The first line, the head,
names the run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from arrondi.errors import OutputError
from arrondi.pipeline.manifest import words

VERSION: Final = 2
"""Of this form, in the head; a journal of another form is another run's."""

Digests = Mapping[str, str]


def line_of(step: str, data: Any, wrote: Digests, read: Digests) -> dict[str, Any]:
    """What is said of a finished step."""
    return {"step": step, "data": data, "wrote": wrote, "read": read}


def seal(line: dict[str, Any], before: str) -> tuple[str, str]:
    """The text of a line with its checksum, and that checksum, which covers the one of the line before it."""
    text = json.dumps(line)
    found = hashlib.sha256((before + text).encode()).hexdigest()[:16]
    return json.dumps({**line, "sum": found}) + "\n", found


def read_lines(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The head, or None if there is no journal of ours, and the lines that follow.

    Raises:
        OutputError: there is something that cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None, []
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror}). Delete {path.parent.parent}.") from error
    lines: list[dict[str, Any]] = []
    before = ""
    for text in content.splitlines(keepends=True):
        try:
            line = json.loads(text)
            found = line.pop("sum")
            sealed, before = seal(line, before)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            break
        if found != before or sealed.encode() != text:
            break
        lines.append(line)
    if not lines or lines[0].get("journal") != VERSION or not _whole_head(lines[0]):
        return None, []
    return lines[0], lines[1:]


def _whole_head(head: dict[str, Any]) -> bool:
    return isinstance(head.get("files"), list) and words(head.get("machine")) and isinstance(head.get("run"), str)
