"""An adapter and its quantized base as one model again: `merge_adapter`, and what that cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.adapters.files import Adapter, Delta
from arrondi.adapters.origin import ORIGIN, digest
from arrondi.adapters.places import Place, places, published, rewritten, scratch
from arrondi.checkpoint import Checkpoint
from arrondi.errors import DataError, FileFormatError, ShapeError
from arrondi.measure.compare import compare_models, is_causal
from arrondi.measure.data import Data
from arrondi.model import DTYPES, OnDisk
from arrondi.pipeline import Recipe, Rule, TextOptions, quantize_model
from arrondi.pipeline.manifest import check_apart

DENSE: Final[Mapping[str, str]] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", **{n: n for n in DTYPES}}
"""Words for ordinary numbers → the type."""


def merge_adapter(
    adapter: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    scheme: str | None = None,
    method: str = "rtn",
    text: TextOptions | None = None,
    measured_on: Data | None = None,
    otherwise: Data | None = None,
    measured_windows: int = 32,
    seq_len: int = 256,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write W + B A of every adapted layer, rounded again, as an ordinary model.

    Args:
        adapter: directory that peft's `save_pretrained` or `adapt init` wrote.
        base: directory of the model under it.
        out: directory to write.
        scheme: what weights become; None: what they are in the base. `bf16`, `fp16` and `fp32` leave them in ordinary numbers.
        method: how codes are chosen.
        text: calibration data of methods and static scales that need them.
        measured_on: text on which the result is compared with base and adapter.
        otherwise: text in its place for language models that can read it; None, and where it cannot be read: only weights are compared.
        measured_windows, seq_len: windows at most, tokens of each.
        overwrite: a finished output of arrondi may be replaced.

    Returns:
        `sqnr_db` of all adapted weights together and `layers` with that of each; `kl_mean`, `perplexity` and `reference_perplexity` where it was
        measured, the reference being base and adapter in float32, whose inputs are not rounded.

    Raises:
        FileFormatError: the adapter is no LoRA, or was made for another base.
        ShapeError: it does not fit the base's layers.
        SchemeError, DataError, OutputError: see their sentences.
    """
    found, checkpoint, out = Adapter.read(adapter), Checkpoint.open(base), Path(out)
    check_apart(checkpoint.folder.path, out)
    check_apart(Path(adapter), out)
    source = OnDisk(checkpoint)
    there = places(source)
    _check_fits(found, source, there, checkpoint, Path(adapter))
    at = [there[name] for name in found.deltas]
    dense = DENSE.get(scheme.lower()) if scheme is not None else None if checkpoint.layout is not None else ""
    with scratch(out) as folder:
        whole = folder / "together"
        rewritten(checkpoint, whole, found.deltas, at, torch.float32)
        if dense is None:
            recipe = _as_before(checkpoint, method) if scheme is None else Recipe.simple(scheme, method)
            options = replace(text or TextOptions(), evaluate=False)
            layout = checkpoint.layout.name if scheme is None and checkpoint.layout is not None else None
            quantize_model(whole, out, recipe, options, layout=layout, overwrite=overwrite)
        else:
            published(checkpoint, out, found.deltas, at, DTYPES[dense] if dense else None, overwrite=overwrite)
        rows = list(_rows(found.deltas, there, checkpoint, Checkpoint.open(out)))
        result: dict[str, Any] = {
            "merged": len(rows),
            "scheme": scheme or "as the base",
            "sqnr_db": _sqnr(rows),
            "layers": rows,
        }
        on = measured_on if measured_on is not None else otherwise if is_causal(source.model) else None
        try:
            said = {} if on is None else compare_models(out, whole, on, seq_len=seq_len, samples=measured_windows)
        except (DataError, FileFormatError) as error:
            if measured_on is not None:
                raise
            said = {}  # merged all the same, of a model without a tokenizer
            result["not_measured"] = str(error).replace(str(whole), str(checkpoint.folder.path))
        result |= {k: said[k] for k in ("kl_mean", "perplexity", "reference_perplexity", "protocol") if k in said}
    for row in rows:
        row["sqnr_db"] = _sqnr([row])
        del row["signal"], row["noise"]
    return result


def _check_fits(
    found: Adapter, source: OnDisk, there: Mapping[str, Place], checkpoint: Checkpoint, folder: Path
) -> None:
    """Refuse an adapter of another model."""
    for name, delta in found.deltas.items():
        if name not in there and any(name in site.modules for site in source.sites):
            raise FileFormatError(
                f"{folder}: adapts {name}, which shares its weight with another layer of {checkpoint.folder.path} or is no linear layer. Merge it with peft, over the dequantized model."
            )
        if name not in there:
            raise FileFormatError(
                f"{folder}: adapts {name}, which is no linear layer of {checkpoint.folder.path}. Name the base that it was trained on."
            )
        shape, rank = there[name].site.matrix_shape, delta.factors.a.shape[0]
        if delta.shape != shape:
            raise ShapeError(
                f"{folder}: {name} is {shape[0]} × {shape[1]} in {checkpoint.folder.path}, the adapter is for {delta.shape[0]} × {delta.shape[1]}. Name the base that it was trained on."
            )
        if rank > min(shape) and there[name].stored in checkpoint.placed:  # which over plain weights peft allows
            raise ShapeError(
                f"{folder}: {name} has a rank of {rank}, more than a matrix of {shape[0]} × {shape[1]} has. It is no adapter of this layer."
            )
    for name, copy in found.copies.items():
        if name not in there or not torch.equal(there[name].weight(checkpoint).to(copy.dtype), copy):
            raise FileFormatError(
                f"{folder}: brings another {name} along than {checkpoint.folder.path} holds. Name the base that it was trained on, or merge it with peft, over the dequantized model."
            )
    for name, wanted in found.origin.items():
        if name not in there:
            continue
        packed = there[name].stored in checkpoint.placed
        held = there[name].codes(checkpoint) if packed else there[name].weight(checkpoint)
        if digest(held) != wanted:
            raise FileFormatError(
                f"{folder}: was trained on other {'codes' if packed else 'weights'} than {checkpoint.folder.path} holds ({name} differs). Name the base that it was trained on, or take {ORIGIN} out of the adapter to merge all the same."
            )


def _as_before(checkpoint: Checkpoint, method: str) -> Recipe:
    """Every tensor becomes what it is in the base."""
    schemes: dict[str, list[str]] = {}
    for name, placed in checkpoint.placed.items():
        schemes.setdefault(str(placed.scheme), []).append(name)
    first = {str(p.scheme): p.scheme for p in checkpoint.placed.values()}
    return Recipe(tuple(Rule(first[s], method, targets=tuple(names)) for s, names in schemes.items()), ignore=())


def _rows(deltas: Mapping[str, Delta], there: Mapping[str, Place], base: Checkpoint, merged: Checkpoint) -> Any:
    for name, delta in deltas.items():
        wanted = delta(there[name].weight(base))
        written = there[name].weight(merged)
        yield {"name": name, "signal": float(wanted.square().sum()), "noise": float((written - wanted).square().sum())}


def _sqnr(rows: list[dict[str, Any]]) -> float | None:
    """Signal to noise in dB; None where there is no noise."""
    signal, noise = (sum(r[k] for r in rows) for k in ("signal", "noise"))
    return 10 * math.log10(signal / noise) if noise and signal else None
