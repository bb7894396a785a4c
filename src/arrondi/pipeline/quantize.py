"""Model in, quantized model out: `quantize_model`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arrondi.checkpoint import Checkpoint, read_report
from arrondi.documents import finite
from arrondi.errors import OutputError, SchemeError
from arrondi.model import OnDisk, device_named, settle
from arrondi.pipeline.coverage import coverage
from arrondi.pipeline.journal import Journal
from arrondi.pipeline.ledger import recorded, travelling
from arrondi.pipeline.manifest import check_apart, finished
from arrondi.pipeline.plan import Plan, check, make_plan
from arrondi.pipeline.publish import planned_files, publish
from arrondi.pipeline.recipe import Recipe
from arrondi.pipeline.record import facts_of, kept_of, machine, manifest_of, quantize_key
from arrondi.pipeline.run import Progress, Run
from arrondi.pipeline.select import merged
from arrondi.pipeline.steps import STEPS, get_step
from arrondi.pipeline.texts import TextOptions, Texts, read_texts


def quantize_model(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    text: TextOptions | None = None,
    *,
    layout: str | None = None,
    keep_misfits: bool = False,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    device: str = "cpu",
    planned: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize a model directory into another.

    Args:
        model: directory with config.json and safetensors files.
        out: directory to write; new, empty, or the unfinished (or finished) output of the same call.
        recipe: what becomes what.
        text: calibration and evaluation text.
        layout: storage layout; None takes the most widely read one that holds everything.
        keep_misfits: keep weights whose shape does not fit instead of taking other groups.
        shard_bytes: files are split when they would exceed this.
        overwrite: a finished output may be replaced.
        device: where units are run, as torch names devices.
        planned: called once with the plan (`Plan.to_dict`), before anything is written.
        progress: called as the run goes on.

    Returns:
        the report, as written to `report.json`.

    Raises:
        FileFormatError, SchemeError, DataError, OutputError: see their sentences; nothing of the user's is lost.
    """
    text, out, where = text or TextOptions(), Path(out), device_named(device)
    checkpoint, ledger = recorded(_original(model, out))
    source = OnDisk(checkpoint)
    texts = read_texts(source, text, recipe)
    texts.notes += _settled(source, texts)
    plan = make_plan(source, recipe, layout=layout, keep_misfits=keep_misfits, images=texts.images is not None)
    check(plan)
    if planned is not None:
        planned(plan.to_dict())
    _check_calibration(plan, texts)
    key = quantize_key(checkpoint, ledger, plan, recipe, text, texts, shard_bytes, device)
    if not overwrite and finished(out, key, ledger):
        return read_report(out / "report.json")
    side_files = travelling(checkpoint.folder)
    files = planned_files(plan.shards(shard_bytes), side_files, ["report.json"])
    with Journal(out, key, files, machine(), overwrite=overwrite) as journal:
        _check_space(out, plan, bool(journal.steps))
        say = progress or (lambda done, total, what: None)
        run = Run(plan, texts, journal, ledger, shard_bytes, say, where)
        run.execute()
        return _publish(run, side_files, facts_of(checkpoint, plan, recipe, text, texts), key)


def rehearse(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    text: TextOptions,
    *,
    layout: str | None = None,
    keep_misfits: bool = False,
) -> tuple[Plan, Texts]:
    """The plan and the windows of a run that is not started; what `quantize_model` refuses before its work is refused here, too.

    The problems of a plan are its own: they are left for the reader.
    """
    source = OnDisk(_original(model, Path(out)))
    texts = read_texts(source, text, recipe)
    plan = make_plan(source, recipe, layout=layout, keep_misfits=keep_misfits, images=texts.images is not None)
    _check_calibration(plan, texts)
    return plan, texts


def _original(model: str | Path, out: Path) -> Checkpoint:
    """The model, which is not quantized and lies apart from the output."""
    checkpoint = Checkpoint.open(model)
    if checkpoint.quantized:
        raise SchemeError(
            f"{checkpoint.folder.path} is already quantized. Restore it first: arrondi dequantize {checkpoint.folder.path} -o PLAIN."
        )
    check_apart(checkpoint.folder.path, out)
    return checkpoint


def _check_calibration(plan: Plan, texts: Texts) -> None:
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
            "layers": done["rows"],
            "kept": kept_of(run.plan),
        }
    )
    described = {"quantization_config": run.plan.config()}
    config = {**merged(run.source.config, run.overlay.config), **described}
    if part := run.source.config_key:  # transformers looks for it where the model's own config is
        config[part] = {**config[part], **described}
    manifest = manifest_of(key, run.ledger, facts)
    publish(run.journal, run.writer, side_files, config, manifest, {"report.json": report})
    return report


def _check_space(out: Path, plan: Plan, resumed: bool) -> None:
    free, need = shutil.disk_usage(out).free, plan.output_bytes
    if not resumed and free < need:
        raise OutputError(
            f"{out}: the output needs {need / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB free. Free some space or choose another disk."
        )
