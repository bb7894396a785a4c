"""JSON documents on disk that any parser reads, written whole or not at all.

Owns: `write_json` and `read_report` for our own documents, whose numbers that are none `arrondi.documents` writes, and `write_config` for
config.json, where they are what transformers makes of them: `{"__float__": "Infinity"}`.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from arrondi.checkpoint.containers.disk import guard_disk, sync_folder
from arrondi.documents import finite
from arrondi.errors import OutputError


def write_json(path: Path, document: Any) -> None:
    """Write a document so that a reader sees the old file or the new one, never a half, and never NaN or Infinity."""
    _write(path, finite(document))


def write_config(path: Path, config: Any) -> None:
    """The same for config.json."""
    _write(path, _tagged(config))


def read_report(path: Path) -> dict[str, Any]:
    """A document that `write_json` wrote.

    Raises:
        OutputError: it is not there, or it is no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{path}: cannot be read ({error}). Delete {path.parent} and run again.") from error
    return found


def _write(path: Path, document: Any) -> None:
    temporary = path.with_name(path.name + ".partial")
    with guard_disk(path.parent):
        # Names of files may hold bytes that are no characters; as escapes they are JSON all the same.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            json.dump(document, file, indent=2, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)


def _tagged(value: Any) -> Any:
    """A config with every number that is none as transformers writes it."""
    if isinstance(value, dict):
        return {k: _tagged(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_tagged(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value
