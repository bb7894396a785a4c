"""The commands that carry a model across and lay two side by side: `convert` and `diff`. Registered in `arrondi.cli.commands`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arrondi.cli import options as opt
from arrondi.cli.answers import answer
from arrondi.cli.verifying import chosen, written


def convert(
    model: opt.Model,
    output: opt.Out,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="gguf (a file), onnx, onnx-qdq (a file or a directory), or a layout: gptq, awq, compressed-tensors, …",
            show_default=False,
        ),
    ],
    scheme: Annotated[
        str | None, typer.Option(help="What tensors become that the target cannot hold as they are.")
    ] = None,
    exact_only: Annotated[bool, typer.Option("--exact-only", help="Refuse if a value would change.")] = False,
    template: Annotated[
        Path | None,
        typer.Option(
            help="A file of the same model: a GGUF, whose header is taken (--to gguf), or a graph, whose weights are replaced (--to onnx)."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    verify: opt.Verify = False,
    python: opt.Pythons = None,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write a model in another layout, bit for bit where its grid holds the values, and say what became of every tensor."""
    pythons = chosen(verify, python)
    from arrondi.pipeline.convert import convert_model
    from arrondi.report import print_conversion, progress_bar

    with progress_bar("converting", quiet) as progress:
        result = convert_model(
            model, output, to, scheme=scheme, exact_only=exact_only, template=template, overwrite=overwrite, progress=progress
        )  # fmt: skip
    written(result, print_conversion, output, pythons, json_, quiet)


def diff(
    first: Annotated[str, typer.Argument(help="Model directory, GGUF or ONNX file.", show_default=False)],
    second: Annotated[str, typer.Argument(help="Another, in any layout.", show_default=False)],
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Compare two models tensor by tensor, across layouts: same codes, same values, or how far apart."""
    from arrondi.pipeline.diff import diff_models
    from arrondi.report import print_difference, progress_bar

    with progress_bar("comparing", quiet) as progress:
        result = diff_models(first, second, progress=progress)
    answer(result, json_, print_difference)
