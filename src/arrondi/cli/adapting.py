"""The commands `adapt init` and `adapt merge`. Registered in `arrondi.cli.commands`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arrondi.cli import options as opt
from arrondi.cli.answers import answer
from arrondi.cli.opening import opens
from arrondi.cli.parsing import recipe_from
from arrondi.cli.strict import Strict

adapt = typer.Typer(
    name="adapt",
    help="Adapters (LoRA) over quantized weights: where they start, and merging them.",
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
)

Text = Annotated[Path | None, typer.Option("--text", help="Text to measure on.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished model that arrondi wrote.")]
Windows = Annotated[int, typer.Option("--eval-samples", help="Windows to measure on at most.", min=1)]


def init(
    model: opt.Model,
    output: opt.Out,
    scheme: Annotated[
        str | None,
        typer.Option(help="What the base becomes; without it, ordinary numbers (pissa).", show_default=False),
    ] = None,
    start: Annotated[str, typer.Option("--init", help="lora, pissa, qpissa, loftq or eora.")] = "lora",
    rank: Annotated[int, typer.Option(help="Of the adapter.", min=1)] = 16,
    alpha: Annotated[float | None, typer.Option(help="B A counts α / rank.", show_default="the rank")] = None,
    steps: Annotated[int, typer.Option(help="How often qpissa and loftq fit their factors.", min=1)] = 5,
    fast: Annotated[
        int | None,
        typer.Option(
            "--fast", help="Fast decompositions of so many iterations, such as 4.", min=0, show_default="exact"
        ),
    ] = None,
    method: opt.MethodName = None,
    group_size: opt.GroupSize = None,
    targets: opt.Targets = None,
    ignore: opt.Ignore = None,
    option: opt.Options = None,
    calibration: opt.Calibration = None,
    samples: opt.Samples = 128,
    seq_len: opt.SeqLen = 512,
    text: Text = None,
    eval_samples: Windows = 32,
    seed: opt.Seed = 0,
    overwrite: Overwrite = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Quantize a model so that an adapter starts on it: the base goes to OUT, the adapter to OUT/adapter, which peft loads."""
    from arrondi.adapters.initial import Init, initialize
    from arrondi.pipeline import TextOptions
    from arrondi.report import print_start, progress_bar

    recipe = None if scheme is None else recipe_from(scheme, method, group_size, targets, ignore, option, None)
    begun = Init(start, rank, alpha, steps, fast, seed)
    asked = TextOptions(calibration, samples, seq_len, evaluate=False, seed=seed)
    with progress_bar("adapters", quiet) as progress:
        result = initialize(
            model, output, begun, recipe, text=asked, measured_on=text, measured_windows=eval_samples, overwrite=overwrite, progress=progress
        )  # fmt: skip
    answer(result, json_, print_start)


def merge(
    adapter: Annotated[Path, typer.Argument(help="Directory of the adapter, as peft saves it.", show_default=False)],
    base: Annotated[str, typer.Option("--base", help="Model that it was trained on.", show_default=False)],
    output: opt.Out,
    scheme: Annotated[
        str | None,
        typer.Option(help="What weights become; bf16, fp16 or fp32: ordinary numbers.", show_default="what they are"),
    ] = None,
    method: Annotated[str, typer.Option(help="How codes are chosen; `arrondi methods` lists all.")] = "rtn",
    calibration: opt.Calibration = None,
    samples: opt.Samples = 128,
    seq_len: opt.SeqLen = 512,
    text: Annotated[
        Path | None, typer.Option("--text", help="Text to measure on.", show_default="the sample's, of language models")
    ] = None,
    eval_samples: Windows = 32,
    overwrite: Overwrite = False,
    json_: opt.Json = False,
) -> None:
    """Add an adapter to its base, round the sum again, and say what that cost against base and adapter."""
    from arrondi.adapters.merge import merge_adapter
    from arrondi.pipeline import TextOptions
    from arrondi.report import print_merge
    from arrondi.sample import sample_path

    asked = TextOptions(calibration, samples, seq_len, evaluate=False)
    result = merge_adapter(
        adapter, base, output, scheme=scheme, method=method, text=asked, measured_on=text, otherwise=sample_path() / "heldout.txt",
        measured_windows=eval_samples, overwrite=overwrite,
    )  # fmt: skip
    answer(result, json_, print_merge)


adapt.command("init", cls=Strict)(opens(init))
adapt.command("merge", cls=Strict)(opens(merge))
