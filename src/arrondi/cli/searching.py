"""The commands that look for a method: `compare` and `methods`. Registered in `arrondi.cli.commands`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arrondi.cli import options as opt
from arrondi.cli.answers import answer
from arrondi.cli.parsing import method_options, scheme_names, words
from arrondi.errors import SchemeError


def compare(
    model: opt.Model,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Methods with commas between: gptq, rotate+gptq (rewrites and repairs with +), gptq:damping=0.05, a recipe file.",
            show_default="rtn,gptq",
        ),
    ] = None,
    presets: Annotated[
        list[str] | None,
        typer.Option(help="Presets with commas between (best,zeroquant): beside the methods, or instead of them."),
    ] = None,
    rewrites: Annotated[
        list[str] | None,
        typer.Option(
            help="Each put before every method, with commas between: none,rotate,smoothquant; several at once with +.",
            show_default="none",
        ),
    ] = None,
    embeddings: Annotated[
        list[str] | None,
        typer.Option(
            help="What the table of words becomes, each with every method: none,int8/row,int4/g64.", show_default="none"
        ),
    ] = None,
    schemes: Annotated[
        list[str] | None,
        typer.Option(help="Schemes (presets or grammar) with ; or commas between.", show_default="W4A16"),
    ] = None,
    calibration: opt.Calibration = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text to measure on. Default: the last tenth of the calibration text, held back."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Directory of the comparison; the same call goes on there.",
            show_default="arrondi-compare-MODEL",
        ),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep every quantized model, not only its numbers.")] = False,
    samples: opt.Samples = 128,
    seq_len: opt.SeqLen = 512,
    eval_samples: Annotated[int, typer.Option(help="Windows to measure on at most.", min=1)] = 32,
    group_size: opt.GroupSize = None,
    targets: opt.Targets = None,
    ignore: opt.Ignore = None,
    option: opt.Options = None,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Quantize a model by several methods, measure each alike, and say which to take."""
    ready = _named("--presets", words(presets)) if presets else []
    default = [] if ready else ["rtn", "gptq"]
    wanted = _named("--methods", words(methods)) if methods else default
    before = _named("--rewrites", words(rewrites)) if rewrites else ["none"]
    tables = _named("--embeddings", scheme_names(embeddings)) if embeddings else ["none"]
    named = _named("--schemes", scheme_names(schemes)) if schemes else None
    from arrondi.pipeline import TextOptions
    from arrondi.report import print_comparison, progress_bar
    from arrondi.search import compare_methods

    with progress_bar("comparing", quiet) as progress:
        result = compare_methods(
            model,
            named,
            wanted,
            TextOptions(calibration, samples, seq_len, text, True, eval_samples, seed),
            out=output,
            keep=keep,
            presets=ready,
            rewrites=before,
            embeddings=tables,
            group_size=group_size,
            targets=targets or ["Linear"],
            ignore=None if ignore is None else [s for s in ignore if s],
            options=method_options(option or []),
            device=device,
            progress=progress,
        )
    answer(result, json_, print_comparison)


def methods(json_: opt.Json = False) -> None:
    """Print all methods, rewrites and repairs: what each needs, brings along, its options with their defaults, and its source."""
    from arrondi.pipeline.steps import describe_steps
    from arrondi.report import print_methods

    answer({"steps": describe_steps()}, json_, print_methods)


def _named(option: str, names: list[str]) -> list[str]:
    if not names:
        raise SchemeError(
            f"{option} names nothing. Example: --schemes W4A16,W3A16 --methods rtn,gptq --presets best --embeddings none,int8/row."
        )
    return names
