"""JSON documents beside the weights: read once, strictly, with one sentence for every way in which they can be broken.

Owns: `read_json`, and `parse_json`, which refuses an object that has a key twice (the plain decoder keeps the last in silence).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from arrondi.checkpoint.containers.descriptors import reraise_exhaustion
from arrondi.errors import FileFormatError


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


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"{twice!r} is in it twice")
    return table
