"""JSON documents beside the weights: read strictly, and written whole or not at all.

Owns: `read_json`, and `parse_json`, which refuses an object that has a key twice (the plain decoder keeps the last in silence);
`write_json`, `written` and `read_report` for our own documents, whose numbers that are none `arrondi.documents` writes; and `write_config` for
config.json, where they are what transformers makes of them: `{"__float__": "Infinity"}`.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from arrondi.checkpoint.containers.descriptors import reraise_exhaustion
from arrondi.checkpoint.containers.disk import guard_disk, sync_folder
from arrondi.documents import finite
from arrondi.errors import FileFormatError, OutputError


def parse_json(text: str | bytes) -> Any:
    """Any JSON document.

    Raises:
        ValueError: not JSON, or an object has a key twice.
        RecursionError: nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_unique)


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """A JSON object from a file; `advice` ends the sentence of a refusal.

    Raises:
        FileFormatError: no such file, not JSON, not an object.
    """
    if not path.exists():
        raise FileFormatError(f"{path}: no such file. {advice}")
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        reraise_exhaustion(error)
        reason = str(error).partition("\n")[0]
        raise FileFormatError(f"{path}: cannot be read as JSON ({reason}). {advice}") from error
    if not isinstance(document, dict):
        raise FileFormatError(f"{path}: holds {type(document).__name__}, not an object. {advice}")
    return document


def write_json(path: Path, document: Any) -> None:
    """Write a document so that a reader sees the old file or the new one, never a half, and never NaN or Infinity."""
    _write(path, document)


def written(document: Any) -> bytes:
    """The bytes that `write_json` makes of a document."""
    # Names of files may hold bytes that are no characters; as escapes they are JSON all the same.
    return (json.dumps(finite(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(
        errors="backslashreplace"
    )


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
        with temporary.open("wb") as file:
            file.write(written(document))
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


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"{twice!r} is in it twice")
    return table
