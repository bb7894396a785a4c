"""JSON documents that any parser reads, written whole or not at all.

Owns: `plain_json` and its inverse `read_report`, `write_json`, and `write_config` for config.json. JSON has no infinity and no NaN, though
Python writes both. In our documents (reports, `--json`) NaN is `null`, and infinities are the words "inf" and "-inf", which
`float` reads. In config.json they are transformers' `{"__float__": "Infinity"}`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arrondi.checkpoint.containers.disk import guard_disk, sync_folder
from arrondi.errors import OutputError

_WORDS = {"inf": math.inf, "-inf": -math.inf}
_TAGS = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}


def plain_json(document: Any) -> Any:
    """The same document with NaN as None and infinities as the words "inf" and "-inf".

    >>> plain_json({"kl": float("inf"), "rows": [float("nan"), 1.5]})
    {'kl': 'inf', 'rows': [None, 1.5]}
    """
    return _floats(document, lambda special: None if math.isnan(special) else str(float(special)))


def read_report(path: Path) -> Any:
    """A document that `write_json` wrote, with its infinities as numbers again.

    Raises:
        OutputError: it is not there, or it is no JSON.
    """
    try:
        return _numbers(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{path}: cannot be read ({error}). Delete {path.parent} and run again.") from error


def write_json(path: Path, document: Any) -> None:
    """Write a document so that a reader sees the old file or the new one, never a half, and never NaN or Infinity."""
    _write(path, plain_json(document))


def write_config(path: Path, config: Any) -> None:
    """The same for config.json, with infinities and NaN as transformers writes them."""
    _write(path, _floats(config, lambda special: {"__float__": _TAGS[str(float(special))]}))


def _write(path: Path, document: Any) -> None:
    temporary = path.with_name(path.name + ".partial")
    with guard_disk(path.parent):
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(document, file, indent=2, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)


def _floats(value: Any, special: Callable[[float], Any]) -> Any:
    """A tree of dicts and lists with every float that is not finite replaced, and words that UTF-8 can hold."""
    if isinstance(value, dict):
        return {_floats(k, special): _floats(v, special) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_floats(v, special) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return special(value)
    if isinstance(value, str):  # names of files may hold bytes that are no characters
        return value.encode("utf-8", "backslashreplace").decode()
    return value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return _WORDS.get(value, value) if isinstance(value, str) else value
