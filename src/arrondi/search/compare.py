"""Several ways to quantize one model, each measured alike: `compare_methods`.

Every candidate is a run of `quantize_model`, bit for bit: what it would write and measure is what stands in its row. What all have in
common is done once: the model is opened, probed and settled, the data are read, and the original goes through the evaluation data. One
model is on the disk at a time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from arrondi.errors import DataError, FileFormatError, SchemeError
from arrondi.formats import LayerScheme, Scheme
from arrondi.model import device_named
from arrondi.model.memory import release
from arrondi.pipeline.record import run_key
from arrondi.pipeline.task import Opened, Task, followed, original
from arrondi.pipeline.texts import TextOptions, check_needed
from arrondi.runtime.pace import pace
from arrondi.search.candidates import Candidate, candidates
from arrondi.search.front import answer, judge, named, sizes
from arrondi.search.rows import RowStore

Progress = Callable[[int, int, str], None]

_NUMBERS: Final = ("bits_per_weight", "model_bits_per_weight", "output_bytes", "seconds")
_STEPS: Final = 1000
"""Of a candidate, as progress counts them."""
_SHARE: Final = 0.4
"""Of the machine's memory, that a model which is loaded to be timed may take."""


def compare_methods(
    model: str | Path,
    schemes: Sequence[str | Scheme | LayerScheme] | None,
    methods: Sequence[str],
    text: TextOptions,
    *,
    out: str | Path | None = None,
    keep: bool = False,
    presets: Sequence[str] = (),
    rewrites: Sequence[str] = ("none",),
    embeddings: Sequence[str] = ("none",),
    group_size: int | None = None,
    targets: Iterable[str] = ("Linear",),
    ignore: Iterable[str] | None = None,
    options: Mapping[str, Any] | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize a model in several ways and measure each.

    Args:
        model: model directory or Hub name.
        schemes, methods, presets, rewrites, embeddings, group_size, targets, ignore, options: see `arrondi.search.candidates`.
        text: what to calibrate and to measure on.
        out: directory of the comparison, `arrondi-compare-MODEL` if none is given; rows that are there already are taken over.
        keep: leave the quantized models there; otherwise each is removed when its row is known.
        device: where units are run, as torch names devices.
        progress: called with (done, of how much, what).

    Returns:
        `rows` by size, then by loss; `answer`, a sentence; `original`; where and how it was measured. A row has `scheme`, `method`,
        `preset`, `rewrites`, `embeddings`, `options` (those of `arrondi quantize` that do the same),
        `status` ("done", "refused" where the method cannot make the scheme, "failed" where it could not with these data, both with a
        `reason` and null for every number), what `evaluate` gives (`kl_mean` with its interval, perplexity, agreement),
        `bits_per_weight` of what is quantized, `model_bits_per_weight` and `output_bytes` of the whole, `seconds` of the run
        without what all share, `ms_per_token` in decoding on this machine, and whether it is on the front of size and loss.

    Raises:
        SchemeError, DataError, FileFormatError, OutputError: before any work, where something is misspelt or missing; afterwards,
            where no candidate could be done.
    """
    found = candidates(
        schemes, methods, presets=presets, rewrites=rewrites, embeddings=embeddings, group_size=group_size,
        targets=targets, ignore=ignore, options=options,
    )  # fmt: skip
    device_named(device)
    if text.calibration is None and text.eval_text is None:
        raise DataError("There is nothing to measure on. Give --text FILE, which calibration does not see.")
    for one in found:
        if one.recipe is not None:
            check_needed(text, one.recipe)
    folder = Path(out) if out is not None else Path(f"arrondi-compare-{_name_of(model)}")
    checkpoint = original(model, folder)
    say = progress or (lambda done, total, what: None)
    RowStore.refuse(folder)
    opened = Opened.read(checkpoint, text, device)
    if opened.texts.evaluation is None:
        raise DataError("The calibration text has one window, which leaves none to measure on. Give --text FILE.")
    with RowStore(folder) as store, ExitStack() as stack:
        work = _Work(store, opened, stack, keep, say, len(found) + 1)
        rows = [work.row(i, one) for i, one in enumerate(found)]
        done = [row for row in rows if row["status"] == "done"]
        if not done:
            raise SchemeError(f"Nothing could be compared. {named(rows[0])}: {rows[0]['reason']}")
        say(len(found) * _STEPS, (len(found) + 1) * _STEPS, "original")
        return _document(work, rows, done)


class _Work:
    """The state that the rows of one comparison share."""

    def __init__(
        self, store: RowStore, opened: Opened, stack: ExitStack, keep: bool, say: Progress, total: int
    ) -> None:
        self.store, self.opened, self.stack, self.keep, self.say, self.total = store, opened, stack, keep, say, total

    def row(self, i: int, one: Candidate) -> dict[str, Any]:
        """The row of a candidate: taken over, or found."""
        names = one.names

        def said(done: int, of: int, what: str) -> None:
            step = i * _STEPS + _STEPS * done // max(of, 1)
            self.say(step, self.total * _STEPS, f"{named(names)}: {what}")

        if one.recipe is None:
            return {**names, "status": "refused", "reason": one.reason, **_nothing()}
        try:
            task = Task.of(self.opened, one.recipe)
        except (SchemeError, DataError) as error:
            return {**names, "status": "refused", "reason": str(error), **_nothing()}
        place = self.store.place(task.key, _slug(f"{one.scheme}-{one.method}"))
        known = self.store.rows.get(task.key)
        if known is not None and not known["kept"]:
            self.store.remove(place)  # a kill may have come before that
        if known is None or (self.keep and not (place / "config.json").is_file()):
            try:
                known = self._found(task, place, said)
            except (SchemeError, DataError) as error:
                self.store.remove(place)
                return {**names, "status": "failed", "reason": str(error), **_nothing()}
        path = str(place) if (place / "config.json").is_file() else None
        found = {name: value for name, value in known.items() if name != "kept"}
        return {**names, "status": "done", "reason": None, **found, "run": task.key, "path": path}

    def _found(self, task: Task, place: Path, said: Progress) -> dict[str, Any]:
        """Quantize, measure, time, note, and remove the model."""
        if self.opened.reference is None:
            self.opened = self.stack.enter_context(followed(self.opened, self.store.folder, said))
        report = replace(task, opened=self.opened).run(place, progress=said)
        evaluation = report["evaluation"]
        measured = {k: v for k, v in evaluation.items() if k not in ("text", "windows", "protocol")}
        row = {
            **measured,
            **{name: report[name] for name in _NUMBERS},
            "ms_per_token": self.pace_of(place, report["output_bytes"]),
            "layout": report["layout"],
            "kept": self.keep,
            "notes": [note for note in report["notes"] if note not in self.opened.texts.notes],
        }
        known = self.store.record(task.key, row)
        if not self.keep:
            self.store.remove(place)
        return known

    def pace_of(self, place: Path, nbytes: int) -> float | None:
        """Milliseconds a token; None where it is not to be had."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert self.opened.texts.evaluation is not None
        if 2 * nbytes > _SHARE * memory:  # twice: packed anew, or in float32
            return None
        try:
            return pace(place, self.opened.texts.evaluation.ids[0].tolist())
        except (SchemeError, FileFormatError, DataError):
            return None
        finally:
            release()


def _document(work: _Work, rows: list[dict[str, Any]], done: list[dict[str, Any]]) -> dict[str, Any]:
    opened, folder = work.opened, work.opened.source.checkpoint.folder
    key = run_key(
        "original", opened.ledger, folder.fingerprint(), opened.texts.evaluation and opened.texts.evaluation.text_hash
    )
    known = work.store.rows.get(key)
    if known is None:
        known = work.store.record(key, {"ms_per_token": work.pace_of(folder.path, folder.nbytes)})
    texts, first = opened.texts, done[0]
    parameters = sum(p.numel() for p in opened.source.model.parameters())
    judged = judge(rows)
    numbered = [row for row in judged if row["status"] == "done"]
    ordered = [row for group in sizes(numbered) for row in group] + [r for r in judged if r["status"] != "done"]
    assert texts.evaluation is not None
    return {
        "model": str(folder.path),
        "folder": str(work.store.folder),
        "answer": answer(numbered),
        "rows": ordered,
        "original": {
            "output_bytes": folder.nbytes,
            "model_bits_per_weight": round(8 * folder.nbytes / max(parameters, 1), 4),
            **{k.removeprefix("reference_"): v for k, v in first.items() if k.startswith("reference_")},
            **known,
        },
        "text": texts.evaluation_source,
        "windows": len(texts.evaluation),
        "tokens": first.get("tokens"),
        "protocol": texts.protocol,
        "calibration": None if texts.calibration is None else texts.calibration.source,
        "notes": texts.notes,
    }


def _nothing() -> dict[str, Any]:
    """The numbers of a row that has none."""
    return dict.fromkeys(("kl_mean", "kl_mean_interval", "perplexity", "top1_agreement", *_NUMBERS, "ms_per_token"))


def _slug(name: str) -> str:
    """A name for a folder."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")[:60]


def _name_of(model: str | Path) -> str:
    """The name of a directory, or the last part of a name on the Hub."""
    path = Path(model).resolve() if Path(model).is_dir() else Path(model)
    return _slug(path.name) or "model"
