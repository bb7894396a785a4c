"""`kv_cache.arrondi`: what calibration knows of the keys and values of a model, as tensors beside its weights.

Owns: the name of the file, `write_states` and `read_states`. The content is that of a safetensors file; it has another ending, so that
programs that take every `.safetensors` of a directory for weights leave it alone. Which kind of cache it is for stands in config.json
under `KIND`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.errors import FileFormatError
from arrondi.tensor.spectrum import Basis, Turn

STATES: Final = "kv_cache.arrondi"
KIND: Final = "arrondi_kv_cache"
"""The key of config.json that names the kind of cache."""
_SIDES: Final = ("keys", "values")
Known = Mapping[int, tuple[float | Basis, float | Basis]]


def write_states(path: Path, known: Known) -> None:
    """Write it; it is on the disk afterwards."""
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    for layer, sides in known.items():
        for side, one in zip(_SIDES, sides, strict=True):
            tensors |= {f"{layer}.{side}.{name}": x.detach().clone().contiguous() for name, x in _tensors(one).items()}
    with path.open("wb") as file:
        file.write(save(tensors))
        file.flush()
        os.fsync(file.fileno())


def _tensors(one: float | Basis) -> dict[str, torch.Tensor]:
    if isinstance(one, float):
        return {"clip": torch.tensor(one, dtype=torch.float64)}
    found = {"mean": one.mean, "rows": one.rows, "scale": one.scale, "counts": torch.tensor(one.counts)}
    if one.weight is not None:
        found["weight"] = one.weight
    if one.turn is not None:
        turn = one.turn
        found |= {"turn": turn.frequencies, "pairs": torch.tensor([int(turn.neighbours), int(turn.last)])}
    return found


def read_states(path: Path) -> dict[int, tuple[float | Basis, float | Basis]]:
    """Read it back.

    Raises:
        FileFormatError: it is not there, or no such file.
    """
    from safetensors.torch import load

    try:
        tensors = load(path.read_bytes())
        layers = sorted({int(name.split(".")[0]) for name in tensors})
        found = {}
        for layer in layers:
            keys, values = (
                {n.split(".")[2]: x for n, x in tensors.items() if n.startswith(f"{layer}.{side}.")} for side in _SIDES
            )
            found[layer] = (_one(keys), _one(values))
    except OSError as error:
        raise FileFormatError(
            f"{path}: is missing, and the model's key/value cache needs it. Copy it from the original place, or run with --kv none."
        ) from error
    except Exception as error:
        raise FileFormatError(
            f"{path}: holds no calibration of keys and values (error: {error}). Quantize again, or run with --kv none."
        ) from error
    return found


def _one(tensors: Mapping[str, torch.Tensor]) -> float | Basis:
    if "clip" in tensors:
        return float(tensors["clip"])
    eight, four, two = (int(n) for n in tensors["counts"])
    mean, rows, scale = (tensors[name] for name in ("mean", "rows", "scale"))
    n = eight + four + two
    sound = min(eight, four, two) >= 0 and not four % 2 and not two % 4
    if not sound or rows.shape != (len(mean), n, mean.shape[1]) or scale.shape != (len(mean), n):
        raise ValueError("shapes that do not go together")
    weight = tensors.get("weight")
    if weight is not None and weight.shape != mean.shape:
        raise ValueError("shapes that do not go together")
    positive = [scale] if weight is None else [scale, weight]
    if not all(bool(torch.isfinite(x).all()) for x in (mean, rows, *positive)) or not all(
        bool((x > 0).all()) for x in positive
    ):
        raise ValueError("numbers that are not finite")
    turn = None
    if "turn" in tensors:
        neighbours, last = (bool(n) for n in tensors["pairs"])
        turn = Turn(tensors["turn"], neighbours, last)
        if 2 * len(turn.frequencies) > mean.shape[1]:
            raise ValueError("shapes that do not go together")
    return Basis(mean, rows, scale, (eight, four, two), turn, weight)


def stored_states(folder: Path, config: Mapping[str, Any]) -> tuple[str, dict[int, tuple[float | Basis, float | Basis]]] | None:  # fmt: skip
    """The kind of cache that a model directory asks for, and what is known for it; None where it asks for none.

    Raises:
        FileFormatError: the file is missing or broken, or the config names no kind.
        SchemeError: there is no such kind.
    """
    from arrondi.formats.kv import parse_kv

    kind = config.get(KIND)
    if kind is None:
        return None
    if not isinstance(kind, str):
        raise FileFormatError(f"{folder}: {KIND} of config.json is a word such as 'int8', got {kind!r}.")
    default, others = parse_kv(kind)
    needed = any(s is not None and s.static for s in (default, *others.values()))
    return kind, read_states(folder / STATES) if needed else {}
