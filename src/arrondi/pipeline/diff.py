"""Two models tensor by tensor, in whatever layouts they are: `diff_models`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.arguments import check_arguments
from arrondi.checkpoint import Checkpoint
from arrondi.tensor.distance import distance
from arrondi.tensor.qtensor import QTensor

VERDICTS: Final = ("same codes", "same values", "different", "other shape", "only in the first", "only in the second")


def diff_models(
    one: str | Path, two: str | Path, *, progress: Callable[[int, int, str], None] | None = None
) -> dict[str, Any]:
    """What differs between two models.

    Args:
        one, two: model directories or GGUF files, quantized or plain; their tensors go by the names of the unquantized model.

    Returns:
        `tensors`, each with `name`, `verdict` (one of `VERDICTS`), `first` and `second` (their schemes or element types) and, where values
        differ, `max_error` and `sqnr_db` of the second to the first; and how many there are of each verdict, under its words with underscores.

    Raises:
        FileFormatError: one of them is no model, or a layout that is not known.
    """
    check_arguments(diff_models, locals())
    models = Checkpoint.open(one), Checkpoint.open(two)
    names = list(dict.fromkeys([*models[0].names, *models[1].names]))
    rows = []
    for i, name in enumerate(names):
        if progress:
            progress(i, len(names), name)
        rows.append(_row(name, *models))
    return {"tensors": rows, **{v.replace(" ", "_"): sum(r["verdict"] == v for r in rows) for v in VERDICTS}}


def _row(name: str, one: Checkpoint, two: Checkpoint) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "verdict": "", "first": _kind(one, name), "second": _kind(two, name)}
    if name not in two.names or name not in one.names:
        return row | {"verdict": "only in the first" if name in one.names else "only in the second"}
    if one.names[name] != two.names[name]:
        return row | {"verdict": "other shape"}
    if _same_codes(one.read(name), two.read(name)):
        return row | {"verdict": "same codes"}
    a, b = (c.dense(name) for c in (one, two))
    if torch.equal(a, b):
        return row | {"verdict": "same values"}
    found = distance(a, b)
    sqnr = found.sqnr_db
    return row | {
        "verdict": "different",
        "max_error": found.largest,
        "sqnr_db": round(sqnr, 2) if math.isfinite(sqnr) else None,
    }


def _kind(checkpoint: Checkpoint, name: str) -> str | None:
    if name in checkpoint.placed:
        return str(checkpoint.placed[name].scheme)
    entry = checkpoint.folder.entries.get(name)
    return None if entry is None else entry.dtype


def _same_codes(a: torch.Tensor | QTensor, b: torch.Tensor | QTensor) -> bool:
    """Whether both are stored alike: the same type, the same bits."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    parts = zip(
        (a.codes, a.real_scale, a.zero_point, a.real_offset),
        (b.codes, b.real_scale, b.zero_point, b.real_offset),
        strict=True,
    )
    same = ((x is None and y is None) or (x is not None and y is not None and torch.equal(x, y)) for x, y in parts)
    return a.scheme == b.scheme and all(same) and torch.equal(a.dequantize(), b.dequantize())
