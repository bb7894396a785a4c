"""A model that was read, and what is to be done to it: `Opened` and `Task`.

Owns: what `quantize_model` does, in two parts, so that several recipes on one model and the same data share the first: the model
without its weights, its windows, how it is run, and (`followed`) the way of the original through the evaluation data.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from arrondi.checkpoint import Checkpoint, read_report
from arrondi.checkpoint.states_file import KIND, STATES
from arrondi.documents import finite
from arrondi.errors import OutputError, SchemeError
from arrondi.model import Budget, OnDisk, Stream, device_named, settle, walk
from arrondi.pipeline.coverage import coverage
from arrondi.pipeline.foreseen import largest_inputs
from arrondi.pipeline.journal import Journal
from arrondi.pipeline.ledger import Ledger, recorded, travelling
from arrondi.pipeline.manifest import check_apart, finished
from arrondi.pipeline.plan import Plan, check, make_plan
from arrondi.pipeline.publish import planned_files, publish
from arrondi.pipeline.recipe import Recipe
from arrondi.pipeline.record import facts_of, kept_of, machine, manifest_of, quantize_key
from arrondi.pipeline.run import HIDDEN_LIMIT, Progress, Run
from arrondi.pipeline.select import merged
from arrondi.pipeline.steps import STEPS, get_step
from arrondi.pipeline.texts import TextOptions, Texts, check_needed, overlap, read_data


@dataclass(frozen=True)
class Opened:
    """A model and its data, read and settled once.

    Attributes:
        source: the model; what is read through it is noted in `ledger`.
        ledger: digests of what was read.
        asked: which data, as the user asked for them.
        texts: the windows, with what is to be said of them whatever the recipe.
        device: where units are run.
        reference: the original after its last unit on the evaluation data, see `followed`; None lets every run follow it anew.
        largest: what the calibration data give the layers of the original at most, once a recipe has asked; see `largest_inputs`.
    """

    source: OnDisk
    ledger: Ledger
    asked: TextOptions
    texts: Texts
    device: str
    reference: Stream | None = None
    largest: dict[bool, Mapping[str, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def read(cls, checkpoint: Checkpoint, asked: TextOptions, device: str, recipe: Recipe | None = None) -> Opened:
        """Read the data and make sure that the model is run as it runs itself, on the first of what it will see.

        Args:
            checkpoint: see `original`.
            recipe: refused before anything is read where it lacks data.
        """
        if recipe is not None:
            check_needed(asked, recipe)
        checkpoint, ledger = recorded(checkpoint)
        source = OnDisk(checkpoint)
        texts = read_data(source, asked)
        texts.notes += _settled(source, texts)
        return cls(source, ledger, asked, texts, device)


@dataclass(frozen=True)
class Task:
    """A recipe on an opened model, planned and not begun.

    Attributes:
        key: of the run: same key, same bytes.
    """

    opened: Opened
    recipe: Recipe
    plan: Plan
    texts: Texts
    shard_bytes: int
    key: str

    @classmethod
    def of(
        cls,
        opened: Opened,
        recipe: Recipe,
        *,
        layout: str | None = None,
        keep_misfits: bool = False,
        shard_bytes: int = 5_000_000_000,
    ) -> Task:
        """Plan a run; arguments as of `quantize_model`.

        Raises:
            SchemeError, DataError: it cannot be done.
        """
        asked = opened.asked
        check_needed(asked, recipe)
        texts = replace(opened.texts, notes=[*opened.texts.notes, *overlap(opened.texts, recipe)])
        images = texts.images is not None
        largest = largest_inputs(opened.source, recipe, texts.calibration_batches, opened.device, opened.largest)
        plan = make_plan(
            opened.source, recipe, layout=layout, keep_misfits=keep_misfits, images=images, largest=largest
        )
        check(plan)
        check_calibration(plan, texts)
        checkpoint = opened.source.checkpoint
        key = quantize_key(checkpoint, opened.ledger, plan, recipe, asked, texts, shard_bytes, opened.device)
        return cls(opened, recipe, plan, texts, shard_bytes, key)

    def run(self, out: Path, *, overwrite: bool = False, progress: Progress | None = None) -> dict[str, Any]:
        """Do it, or what is left of it, or read the report of what is finished."""
        opened, ledger, checkpoint = self.opened, self.opened.ledger, self.opened.source.checkpoint
        if not overwrite and finished(out, self.key, ledger):
            return read_report(out / "report.json")
        side_files = travelling(checkpoint.folder)
        files = planned_files(self.plan.shards(self.shard_bytes), side_files, ["report.json", STATES])
        with Journal(out, self.key, files, machine(), overwrite=overwrite) as journal:
            _check_space(out, self.plan, bool(journal.steps))
            say, where = progress or (lambda done, total, what: None), device_named(opened.device)
            run = Run(self.plan, self.texts, journal, ledger, self.shard_bytes, say, where, opened.reference)
            run.execute()
            facts = facts_of(checkpoint, self.plan, self.recipe, opened.asked, self.texts)
            return _publish(run, side_files, facts, self.key)


@contextmanager
@torch.no_grad()
def followed(opened: Opened, folder: Path, progress: Progress | None = None) -> Iterator[Opened]:
    """The same, with the original's way through the evaluation data gone once for all runs inside.

    What is kept of it is what leaves its last unit, in memory or in an unnamed file in `folder`.
    """
    units = opened.source.units_of(opened.source.instance(device=device_named(opened.device)))
    with Stream(units, opened.texts.evaluation_batches, Budget(HIDDEN_LIMIT), folder) as reference:
        reference.begin()
        for i in walk([[reference]]):
            if progress is not None:
                progress(i, len(units), f"original: block {i + 1} of {len(units)}")
        yield replace(opened, reference=reference)


def original(model: str | Path, out: Path) -> Checkpoint:
    """The model, which is not quantized and lies apart from the output."""
    checkpoint = Checkpoint.open(model)
    if checkpoint.quantized:
        raise SchemeError(
            f"{checkpoint.folder.path} is already quantized. Restore it first: arrondi dequantize {checkpoint.folder.path} -o PLAIN."
        )
    check_apart(checkpoint.folder.path, out)
    return checkpoint


def check_calibration(plan: Plan, texts: Texts) -> None:
    """Refuse static scales of inputs without calibration data, and an importance matrix that means nothing here."""
    takes = any("importance" in step.needs for step in plan.steps())
    if texts.importance is not None and not takes:
        raise SchemeError(
            f"The importance matrix changes nothing: no method here takes one. {_takers()} Or leave it out."
        )
    changing = [one.step.name for one in plan.selected if one.step.kind == "rewrite" and one.groups]
    if texts.importance is not None and changing:
        raise SchemeError(
            f"The importance matrix is of the model as it is, and {changing[0]} changes what its layers are given. Leave one of them out."
        )
    if texts.importance is not None and not plan.needs_text({"importance"}):
        return
    if plan.calibrated and not texts.calibrates:
        raise SchemeError(
            "Static scales of inputs need calibration text. Add --calibration FILE, or choose a scheme without them: W8A8, FP8_DYNAMIC."
        )


def _learning(plan: Plan) -> set[str]:
    """Tensors whose method learns from second moments of inputs."""
    moments = {"moment", "float moment", "cross moment"}
    return {t.name for t in plan.quantized if t.rule and get_step(t.rule.method).needs & moments}


def _takers() -> str:
    names = sorted(step.name for step in STEPS.values() if "importance" in step.needs)
    return f"Use --method {' or '.join(names)}." if names else "No method does."


def _settled(source: OnDisk, texts: Texts) -> list[str]:
    """Make sure that the model is run as it runs itself, on the first of what it will see."""
    batches = texts.evaluation_batches or texts.calibration_batches
    if not batches:
        return []
    if texts.images is not None and texts.eval_images is None and not source.whole:
        notes = settle(source, texts.images.batches[0])  # text, which is looked at next, says nothing of images
        if source.whole:
            return notes
    first = batches[0]
    return settle(source, first if isinstance(first, dict) or texts.measures else first[:1])


def _publish(run: Run, side_files: Mapping[str, Path], facts: dict[str, Any], key: str) -> dict[str, Any]:
    """The files get their names; config.json comes last."""
    done = run.journal.steps["measured"]
    learned = coverage(run.plan.quantized, done["rows"], _learning(run.plan))
    report: dict[str, Any] = finite(
        {
            **facts,
            "calibration": facts["calibration"] and {**facts["calibration"], **learned},
            "seconds": done["seconds"],
            "evaluation": done["measured"],
            **({"kv": run.plan.kv} if run.plan.kv else {}),
            "layers": done["rows"],
            **({"whole_model": done["whole"]} if done["whole"] else {}),
            "kept": kept_of(run.plan),
        }
    )
    described = run.plan.layout.described(run.plan.config())
    config = {**merged(run.source.config, run.overlay.config), **described}
    if run.plan.kv is not None:
        config[KIND] = run.plan.kv
    if part := run.source.config_key:  # transformers looks for it where the model's own config is
        config[part] = {**config[part], **described}
    manifest = manifest_of(key, run.ledger, facts)
    states = run.journal.work / STATES
    made = {STATES: states} if states.is_file() else {}
    publish(run.journal, run.written.writer, side_files, config, manifest, {"report.json": report}, made)
    return report


def _check_space(out: Path, plan: Plan, resumed: bool) -> None:
    free, need = shutil.disk_usage(out).free, plan.output_bytes
    if not resumed and free < need:
        raise OutputError(
            f"{out}: the output needs {need / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB free. Free some space or choose another disk."
        )
