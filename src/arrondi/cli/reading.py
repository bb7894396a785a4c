"""The commands that read a model: `inspect`, `imatrix` and `dequantize`. Registered in `arrondi.cli.commands`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arrondi.cli import options as opt
from arrondi.cli.answers import answer, note
from arrondi.cli.parsing import set_by_user
from arrondi.errors import SchemeError


def inspect(
    model: opt.Model,
    folds: Annotated[
        bool,
        typer.Option(
            "--folds",
            help="Print instead which layers read the same activation, what makes it, and whether scales fold into that.",
        ),
    ] = False,
    outliers: Annotated[
        bool,
        typer.Option(
            "--outliers",
            help="Print instead how large inputs of layers become on a text, and what int8 would cost them.",
        ),
    ] = False,
    calibration: opt.Calibration = None,
    device: opt.Device = "cpu",
    json_: opt.Json = False,
) -> None:
    """Print the tensors of a model, their formats and bits per weight (all stored bits counted), and the totals."""
    from arrondi.pipeline import inspect_folds, inspect_model
    from arrondi.report import print_contents, print_folds, print_inspection

    if outliers is not (calibration is not None) or (outliers and folds):
        raise SchemeError("inspect takes --folds alone, or --outliers with --calibration FILE, a text to look at.")
    if device != "cpu" and not outliers:
        raise SchemeError(f"inspect runs a model only with --outliers, got --device {device}. Leave it out.")
    if outliers and calibration is not None:
        from arrondi.pipeline.outliers import inspect_outliers
        from arrondi.report import print_outliers

        document = inspect_outliers(model, calibration, device=device)
        for sentence in document["notes"]:
            note(sentence)
        answer(document, json_, print_outliers)
    elif folds:
        answer(inspect_folds(model), json_, print_folds)
    else:
        document = inspect_model(model)
        answer(document, json_, print_contents if "layers" in document else print_inspection)


def dequantize(
    context: typer.Context,
    model: opt.Model,
    output: opt.Out,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished model that arrondi wrote.")
    ] = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Restore ordinary weights that any tool loads: a directory of safetensors, or of an ONNX file also one of floats (-o NAME.onnx)."""
    from arrondi.pipeline import dequantize_model
    from arrondi.pipeline.onnx_out import both_graphs, dequantize_to_onnx
    from arrondi.report import print_facts, progress_bar

    with progress_bar("dequantizing", quiet) as progress:
        if both_graphs(model, output):
            if set_by_user(context, "dtype"):
                raise SchemeError("A graph keeps the type of its floats, so it takes no --dtype. Leave it out.")
            result = dequantize_to_onnx(Path(model), output, overwrite=overwrite, progress=progress)
        else:
            result = dequantize_model(model, output, dtype, overwrite=overwrite, progress=progress)
    answer(result, json_, print_facts)


def imatrix(
    model: opt.Model,
    calibration: Annotated[Path, typer.Option(help="Text to read, as for quantize.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="File to write: .gguf, or .dat for the legacy format.", show_default=False),
    ],
    samples: opt.Samples = 128,
    seq_len: opt.SeqLen = 512,
    column: opt.Column = None,
    seed: opt.Seed = 0,
    head: Annotated[bool, typer.Option("--process-output", help="The output head, too.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    device: opt.Device = "cpu",
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write llama.cpp's importance matrix of a model: how large the inputs of every linear layer are on a text."""
    from arrondi.pipeline.importance import make_imatrix
    from arrondi.report import print_facts, progress_bar

    with progress_bar("reading", quiet) as progress:
        result = make_imatrix(
            model, calibration, output, samples=samples, seq_len=seq_len, seed=seed, column=column, head=head,
            overwrite=overwrite, device=device, progress=progress,
        )  # fmt: skip
    for sentence in result.pop("notes"):
        note(sentence)
    answer(result, json_, print_facts)
