"""Model in, quantized model out: `quantize_model`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from arrondi.errors import SchemeError
from arrondi.model import OnDisk, device_named
from arrondi.pipeline.convert import GGUF, ONNX
from arrondi.pipeline.file_runs import quantize_gguf, quantize_onnx
from arrondi.pipeline.foreseen import largest_inputs
from arrondi.pipeline.gguf_out import check_gguf
from arrondi.pipeline.plan import Plan, make_plan
from arrondi.pipeline.recipe import Recipe
from arrondi.pipeline.run import Progress
from arrondi.pipeline.task import Opened, Task, check_calibration, original
from arrondi.pipeline.texts import TextOptions, Texts, read_texts


def quantize_model(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    text: TextOptions | None = None,
    *,
    layout: str | None = None,
    keep_misfits: bool = False,
    template: str | Path | None = None,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    device: str = "cpu",
    planned: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize a model directory into another.

    Args:
        model: directory with config.json and safetensors files.
        out: directory to write; new, empty, or the unfinished (or finished) output of the same call. With the layout "gguf" a
            file, with "onnx" and "onnx-qdq" a file or a directory.
        recipe: what becomes what.
        text: calibration and evaluation text.
        layout: storage layout; None takes the most widely read one that holds everything.
        keep_misfits: keep weights whose shape does not fit instead of taking other groups.
        template: with the layout "gguf", a GGUF file of the same architecture, whose header is taken.
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
    text, out = text or TextOptions(), Path(out)
    device_named(device)
    _check_template(template, layout)
    opened = Opened.read(original(model, out), text, device, recipe)
    task = Task.of(opened, recipe, layout=layout, keep_misfits=keep_misfits, shard_bytes=shard_bytes)
    if planned is not None:
        planned(task.plan.to_dict())
    if task.plan.layout.name == GGUF:
        return quantize_gguf(task, out, template=template, overwrite=overwrite, progress=progress)
    if task.plan.layout.name in ONNX:
        return quantize_onnx(task, out, overwrite=overwrite, progress=progress)
    return task.run(out, overwrite=overwrite, progress=progress)


def rehearse(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    text: TextOptions,
    *,
    layout: str | None = None,
    keep_misfits: bool = False,
    template: str | Path | None = None,
) -> tuple[Plan, Texts]:
    """The plan and the windows of a run that is not started; what `quantize_model` refuses before its work is refused here, too.

    The problems of a plan are its own: they are left for the reader.
    """
    _check_template(template, layout)
    source = OnDisk(original(model, Path(out)))
    texts = read_texts(source, text, recipe)
    largest = largest_inputs(source, recipe, texts.calibration_batches)
    plan = make_plan(
        source, recipe, layout=layout, keep_misfits=keep_misfits, images=texts.images is not None, largest=largest
    )
    check_calibration(plan, texts)
    if plan.layout.name == GGUF:
        check_gguf(source, plan.tensors, template)
    return plan, texts


def _check_template(template: str | Path | None, layout: str | None) -> None:
    if template is not None and layout != GGUF:
        raise SchemeError("A template is a GGUF file of the same model and goes with --to gguf. Leave it out.")
