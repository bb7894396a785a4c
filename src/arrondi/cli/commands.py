"""The commands: options in, one call of the library, a table or JSON out. Heavy imports happen inside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arrondi.cli import networks, searching
from arrondi.cli import options as opt
from arrondi.cli.answers import answer as _answer
from arrondi.cli.answers import note as _note
from arrondi.cli.answers import print_json as _print_json
from arrondi.cli.parsing import (
    byte_count,
    recipe_from,
    scheme_names,
    set_by_user,
    sizes,
)
from arrondi.cli.strict import Strict
from arrondi.errors import SchemeError

if TYPE_CHECKING:
    from arrondi.measure.limits import Limits
    from arrondi.pipeline import Plan

app = typer.Typer(
    name="arrondi",
    help="Quantize a trained neural network, measure what it cost, and run it in few bits.",
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)

MISSED = 3
"""Exit status when a quality limit that the user set was missed."""


def _version(wanted: bool) -> None:
    if wanted:
        from arrondi import __version__

        typer.echo(f"arrondi {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command(cls=Strict)
def plan(
    model: opt.Model,
    scheme: opt.SchemeName = None,
    method: opt.MethodName = None,
    preset: opt.PresetName = None,
    rewrite: opt.Rewrites = None,
    repair: opt.Repairs = None,
    group_size: opt.GroupSize = None,
    targets: opt.Targets = None,
    ignore: opt.Ignore = None,
    embeddings: opt.Embeddings = None,
    option: opt.Options = None,
    recipe: opt.RecipeFile = None,
    layout: opt.LayoutName = None,
    keep_misfits: opt.KeepMisfits = False,
    samples: opt.Samples = 128,
    seq_len: opt.SeqLen = 512,
    json_: opt.Json = False,
) -> None:
    """Print what `quantize` would do: every tensor, bytes, peak memory, rough time, readers, shapes that do not fit and the fix."""
    resolved = recipe_from(
        scheme,
        method,
        group_size,
        targets,
        ignore,
        option,
        recipe,
        rewrite,
        repair,
        preset=preset,
        embeddings=embeddings,
    )
    from arrondi.checkpoint import Checkpoint
    from arrondi.measure.text import fit_length, positions_of
    from arrondi.model import OnDisk
    from arrondi.pipeline import make_plan

    checkpoint = Checkpoint.open(model)
    if checkpoint.quantized:
        raise SchemeError(f"{model} is already quantized. Plan for the original model.")
    source = OnDisk(checkpoint)
    planned = make_plan(source, resolved, layout=layout, keep_misfits=keep_misfits)
    seq_len, note = fit_length(seq_len, positions_of(source.model))
    tokens, eval_tokens = (samples * seq_len, 32 * seq_len) if planned.calibrated else (0, 0)
    _show_plan(model, planned, tokens, eval_tokens, seq_len, [note] if note and planned.calibrated else [], json_)


@app.command(cls=Strict)
def quantize(
    context: typer.Context,
    model: opt.Model,
    output: opt.Out,
    scheme: opt.SchemeName = None,
    method: opt.MethodName = None,
    preset: opt.PresetName = None,
    rewrite: opt.Rewrites = None,
    repair: opt.Repairs = None,
    calibration: opt.Calibration = None,
    column: opt.Column = None,
    imatrix: opt.Imatrix = None,
    calibration_images: opt.CalibrationImages = None,
    all_experts: opt.AllExperts = False,
    samples: opt.Samples = 128,
    seq_len: opt.SeqLen = 512,
    eval_text: opt.EvalText = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not measure the result.")] = False,
    eval_samples: Annotated[int, typer.Option(help="Windows to measure on at most.", min=1)] = 32,
    group_size: opt.GroupSize = None,
    targets: opt.Targets = None,
    ignore: opt.Ignore = None,
    embeddings: opt.Embeddings = None,
    option: opt.Options = None,
    recipe: opt.RecipeFile = None,
    layout: opt.LayoutName = None,
    keep_misfits: opt.KeepMisfits = False,
    shard_size: Annotated[str, typer.Option(help="Largest output file: 500MB, 5GB.")] = "5GB",
    device: opt.Device = "cpu",
    seed: opt.Seed = 0,
    max_kl: opt.MaxKl = None,
    max_ppl_increase: opt.MaxPpl = None,
    budget: opt.Budget = None,
    data: opt.NetworkData = None,
    observer: opt.ObserverName = "mse",
    ends: opt.Ends = "8",
    mean: opt.Mean = None,
    std: opt.Std = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished model that arrondi wrote.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Quantize a model, block by block from disk, and measure the result on text that calibration did not see."""
    resolved = recipe_from(
        scheme, method, group_size, targets, ignore, option, recipe, rewrite, repair, all_experts, preset, embeddings
    )
    from arrondi.graph import is_graph_file

    if is_graph_file(model):
        networks.refuse_text_options({
            "--eval-text": eval_text, "--column": column, "--imatrix": imatrix, "--calibration-images": calibration_images,
            "--layout": layout, "--embeddings": embeddings, "--max-kl": max_kl, "--max-ppl-increase": max_ppl_increase, "--dry-run": dry_run,
        })  # fmt: skip
        networks.quantize_graph(
            model, output, resolved, budget=budget, calibration=calibration, data=data, samples=samples, seed=seed, observer=observer, ends=ends, mean=mean,
            std=std, overwrite=overwrite, json_=json_, quiet=quiet,
        )  # fmt: skip
        return
    networks.refuse_network_options(
        {
            "--budget": budget,
            "--data": data,
            "--mean": mean,
            "--std": std,
            "--observer": observer != "mse",
            "--ends": ends != "8",
        }
    )
    if no_eval and eval_text is not None:
        raise SchemeError(f"--no-eval and --eval-text {eval_text} contradict each other. Leave one out.")
    limits = _limits(max_kl, max_ppl_increase)
    measured = not no_eval and (calibration or eval_text or calibration_images) is not None
    if limits and not measured:
        raise SchemeError(
            "--max-kl and --max-ppl-increase need a measurement. Give --eval-text FILE (or --calibration FILE), and drop --no-eval."
        )
    if calibration is None and calibration_images is None:
        _useless(context, "calibration text", "samples", "seed", *([] if measured else ["seq_len"]))
    if not measured:
        _useless(context, "a measurement", "eval_samples")
    shard_bytes = byte_count(shard_size)
    from arrondi.model import device_named
    from arrondi.pipeline import TextOptions, quantize_model, rehearse
    from arrondi.report import print_report, progress_bar, sole_reader

    device_named(device)
    text = TextOptions(
        calibration,
        samples,
        seq_len,
        eval_text,
        not no_eval,
        eval_samples,
        seed,
        limits,
        column,
        imatrix,
        calibration_images,
    )
    if dry_run:
        planned, texts = rehearse(model, output, resolved, text, layout=layout, keep_misfits=keep_misfits)
        both = texts.calibration, texts.evaluation
        tokens, eval_tokens = (0 if windows is None else windows.ids.numel() for windows in both)
        seq_len = max((windows.seq_len for windows in both if windows is not None), default=seq_len)
        _show_plan(model, planned, tokens, eval_tokens, seq_len, texts.notes, json_)
        return
    with progress_bar("quantizing", quiet) as progress:
        report = quantize_model(
            model,
            output,
            resolved,
            text,
            layout=layout,
            keep_misfits=keep_misfits,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            planned=lambda plan: _note(sole_reader(plan)),
            progress=progress,
            device=device,
        )
    _answer(report, json_, print_report)
    _hold_to(report["evaluation"] or {}, limits, f"The files are in {output}.")


app.command(cls=Strict)(searching.compare)
app.command(cls=Strict)(searching.methods)


@app.command("eval", cls=Strict)
def evaluate(
    model: opt.Model,
    against: Annotated[str, typer.Option(help="Directory or Hub name of the original model.", show_default=False)],
    text: Annotated[
        Path | None,
        typer.Option(help="Text that calibration has not seen: UTF-8, .jsonl, .json or .parquet.", show_default=False),
    ] = None,
    data: opt.NetworkData = None,
    column: opt.Column = None,
    seq_len: opt.SeqLen = 256,
    samples: Annotated[int | None, typer.Option(help="Windows at most. Default: all.", min=1)] = None,
    activations: opt.Activations = None,
    kv: opt.KV = None,
    device: opt.Device = "cpu",
    max_kl: opt.MaxKl = None,
    max_ppl_increase: opt.MaxPpl = None,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Perplexity, KL divergence to the original and top-1 agreement, each with a 95 % interval.

    With --kv both models are in memory, and the text is read in short pieces through the rounded cache.
    """
    from arrondi.graph import is_graph_file

    if is_graph_file(model):
        networks.refuse_text_options({"--text": text, "--kv": kv, "--activations": activations, "--column": column})
        networks.evaluate_graph(model, against, data, json_)
        return
    networks.refuse_network_options({"--data": data})
    if text is None:
        raise SchemeError("Language models are measured on text that calibration has not seen. Give --text FILE.")
    limits = _limits(max_kl, max_ppl_increase)
    if kv is not None:
        _evaluate_with_cache(model, against, text, kv, seq_len, samples, activations, device, limits, json_, quiet)
        return
    from arrondi.measure.compare import compare_models
    from arrondi.report import print_evaluation, progress_bar

    with progress_bar("measuring", quiet) as progress:
        result = compare_models(
            model,
            against,
            text,
            seq_len=seq_len,
            samples=samples,
            column=column,
            activations=activations,
            limits=limits,
            progress=progress,
            device=device,
        )
    _answer(result, json_, print_evaluation)
    _hold_to(result, limits, "")


def _evaluate_with_cache(
    model: str,
    against: str,
    text: Path,
    kv: str,
    seq_len: int,
    samples: int | None,
    activations: str | None,
    device: str,
    limits: Limits,
    json_: bool,
    quiet: bool,
) -> None:
    if device != "cpu":
        raise SchemeError(f"With --kv models are run on the CPU, got --device {device}. Leave it out.")
    from arrondi.report import print_evaluation, progress_bar
    from arrondi.runtime.kv.measure import compare_with_cache

    with progress_bar("measuring", quiet) as progress:
        result = compare_with_cache(
            model, against, text, kv, seq_len=seq_len, samples=samples, activations=activations, limits=limits, progress=progress
        )  # fmt: skip
    _answer(result, json_, print_evaluation)
    _hold_to(result, limits, "")


@app.command(cls=Strict)
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
    json_: opt.Json = False,
) -> None:
    """Print the tensors of a model, their formats and bits per weight (all stored bits counted), and the totals."""
    from arrondi.pipeline import inspect_folds, inspect_model
    from arrondi.report import print_folds, print_inspection

    if outliers is not (calibration is not None) or (outliers and folds):
        raise SchemeError("inspect takes --folds alone, or --outliers with --calibration FILE, a text to look at.")
    if outliers and calibration is not None:
        from arrondi.pipeline.outliers import inspect_outliers
        from arrondi.report import print_outliers

        document = inspect_outliers(model, calibration)
        for sentence in document["notes"]:
            _note(sentence)
        _answer(document, json_, print_outliers)
    elif folds:
        _answer(inspect_folds(model), json_, print_folds)
    else:
        _answer(inspect_model(model), json_, print_inspection)


@app.command(cls=Strict)
def dequantize(
    model: opt.Model,
    output: opt.Out,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished model that arrondi wrote.")
    ] = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Restore ordinary weights that any tool loads."""
    from arrondi.pipeline import dequantize_model
    from arrondi.report import print_facts, progress_bar

    with progress_bar("dequantizing", quiet) as progress:
        result = dequantize_model(model, output, dtype, overwrite=overwrite, progress=progress)
    _answer(result, json_, print_facts)


@app.command(cls=Strict)
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
        _note(sentence)
    _answer(result, json_, print_facts)


@app.command(cls=Strict)
def run(
    context: typer.Context,
    model: opt.Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 60,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token every time.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed when temperature is above 0.", min=0, max=2**63 - 1)] = 0,
    dtype: Annotated[str, typer.Option(help="Type of activations: float32, bfloat16, float16, or auto.")] = "auto",
    activations: opt.Activations = None,
    kv: opt.KV = None,
    json_: opt.Json = False,
) -> None:
    """Continue a prompt on this machine, printing as it goes."""
    if not temperature < float("inf"):
        raise SchemeError(f"--temperature takes a number such as 0.8, got {temperature}.")
    if temperature == 0:
        _useless(context, "--temperature above 0", "seed")
    from arrondi.runtime.generate import generate

    result = generate(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        dtype=dtype,
        activations=activations,
        kv=kv,
        stream=None if json_ else sys.stdout,
    )
    if json_:
        _print_json(result)


@app.command(cls=Strict)
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the results.")] = Path("arrondi-demo"),
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Quantize the sample model that ships with arrondi, compare methods, write the files and generate a few words."""
    from arrondi.pipeline.demo import run_demo
    from arrondi.report import print_demo, progress_bar

    with progress_bar("demo", quiet) as progress:
        result = run_demo(output, progress)
    _answer(result, json_, print_demo)


@app.command(cls=Strict)
def bench(
    shapes: Annotated[str, typer.Option(help="Shapes of weights, OUTxIN, with commas between.")] = "4096x4096",
    m: Annotated[str, typer.Option("--m", help="Numbers of tokens, with commas between.")] = "1,16,512",
    schemes: Annotated[
        list[str] | None,
        typer.Option(
            help="A scheme (preset or grammar), hadamard, quantize or signs. Repeatable; or several with ; or commas between. "
            "Default: a line of each kind."
        ),
    ] = None,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure this machine, and how close products with quantized weights come to what it can do."""
    from arrondi.measure.roofline import bench as measure
    from arrondi.report import print_bench, progress_bar

    wanted = [sizes("--shapes", shape, "x", 2) for shape in shapes.split(",")]
    tokens = sizes("--m", m, ",")
    names = scheme_names(schemes or [])
    if schemes and not names:
        raise SchemeError(f"--schemes names nothing, got {schemes[0]!r}. Example: --schemes 'W4A16;w=int8,a=int8'.")
    with progress_bar("measuring", quiet) as progress:
        result = measure([(n, k) for n, k in wanted], tokens, names, progress=progress)
    _answer(result, json_, print_bench)


def _useless(context: typer.Context, without: str, *names: str) -> None:
    """Say which options of the user have no effect."""
    given = set_by_user(context, *names)
    if given:
        _note(f"{' and '.join(given)} changes nothing here: there is no {without.removeprefix('a ')}.")


def _show_plan(
    model: str, plan: Plan, tokens: int, eval_tokens: int, seq_len: int, notes: list[str], json_: bool
) -> None:
    from arrondi.pipeline.estimate import estimate
    from arrondi.report import print_plan

    cost = estimate(plan, tokens, eval_tokens, seq_len)
    document = {
        "model": model,
        **plan.to_dict(),
        "peak_memory_bytes": cost.bytes,
        "peak_moment": cost.moment,
        "seconds": round(cost.seconds, 1),
    }
    document["notes"] = [*document["notes"], *notes]
    _answer(document, json_, print_plan)


def _limits(max_kl: float | None, max_ppl_increase: float | None) -> Limits:
    from arrondi.measure.limits import Limits

    return Limits(max_kl, max_ppl_increase)


def _hold_to(result: dict[str, Any], limits: Limits, written: str) -> None:
    """Exit with status 3 when a limit was missed."""
    missed = limits.missed(result)
    if missed:
        _note(" ".join(filter(None, [*missed, written, "Use more bits, smaller groups or a better method."])))
        raise typer.Exit(MISSED)
