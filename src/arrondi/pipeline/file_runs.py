"""A run whose output is a file of another kind: `quantize_gguf` and `quantize_onnx`.

The run goes into a hidden directory beside the file, with packed weights in safetensors, so that it is journalled and goes on after a kill as
any other; what it wrote is then put into the file as it is.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from arrondi.checkpoint import write_json
from arrondi.checkpoint.containers.gguf.header import is_gguf
from arrondi.checkpoint.containers.hub import title_of
from arrondi.checkpoint.containers.onnx.view import SUFFIX
from arrondi.errors import SchemeError
from arrondi.pipeline.convert import convert_model
from arrondi.pipeline.gguf_out import Named, check_file, check_gguf
from arrondi.pipeline.manifest import finished_key
from arrondi.pipeline.onnx_export import check_exportable, stored_names
from arrondi.pipeline.onnx_out import check_out
from arrondi.pipeline.run import Progress
from arrondi.pipeline.task import Task


def quantize_gguf(
    task: Task,
    out: Path,
    *,
    template: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a task whose layout is "gguf", and make one file of what it wrote; its report lies beside it, as `NAME.report.json`.

    Args:
        template: a GGUF file of the same architecture, whose header is taken; None: the source, if it is one.

    Raises:
        SchemeError: GGUF has no words for the model.
        FileFormatError: the template is no GGUF file.
        OutputError: the name is no file's, something is there, or the disk is full.
    """
    check_file(out, overwrite)
    source = task.opened.source
    if template is None and is_gguf(source.where):
        template = source.where
    check_gguf(source, task.plan.tensors, template)
    folder, report = _run_beside(task, out, progress)
    called = Named(title_of(source.where), _mix_of(task))
    result = convert_model(folder, out, "gguf", exact_only=True, template=template, called=called, overwrite=overwrite)
    notes = [*report["notes"], *result["notes"]]
    report = {**report, "notes": notes, "container": "gguf", "file_bytes": result["bytes"]}
    write_json(out.with_name(f"{out.stem}.report.json"), report)
    shutil.rmtree(folder)
    return report


def _run_beside(task: Task, out: Path, progress: Progress | None) -> tuple[Path, dict[str, Any]]:
    """Run a task into the hidden directory beside its file.

    What another command finished there, and was killed before its file was made, is replaced: nobody has seen it.
    """
    folder = out.with_name(f".{out.name}.run")
    stale = finished_key(folder) not in (None, task.key)
    return folder, task.run(folder, overwrite=stale, progress=progress)


def _mix_of(task: Task) -> str:
    """The mix by which most weights get their types; "": that is none."""
    weights: Counter[str] = Counter()
    for tensor in task.plan.quantized:
        weights[tensor.rule.mix if tensor.rule else ""] += tensor.weights
    return max(weights, key=lambda mix: weights[mix], default="")


def quantize_onnx(
    task: Task, out: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Run a task whose layout is "onnx" or "onnx-qdq", and make a graph of what it wrote.

    Its report lies beside a file, as `NAME.report.json`, and in a directory as `report.json`.

    Raises:
        SchemeError: the model is not exported here, or a quantized tensor is no matrix of its graph.
        OutputError: something is there, or the disk is full.
    """
    check_out(out, overwrite)
    source = task.opened.source
    check_exportable(source.model)
    whole = set(stored_names(source).values())
    parts = [t.name for t in task.plan.quantized if t.name not in whole]
    if parts:
        raise SchemeError(
            f"{parts[0]} is not one matrix of the model's graph (transformers makes its parameters of several tensors, or several of it). Leave it out: --ignore {parts[0].removesuffix('.weight')}."
        )
    folder, report = _run_beside(task, out, progress)
    result = convert_model(folder, out, task.plan.layout.name, exact_only=True, overwrite=overwrite)
    report = {**report, "container": "onnx", "file_bytes": result["bytes"]}
    alone = out.suffix.lower() == SUFFIX
    write_json(out.with_name(f"{out.stem}.report.json") if alone else out / "report.json", report)
    shutil.rmtree(folder)
    return report
