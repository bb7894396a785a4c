"""The commands: options in, one call of the library, a table or JSON out. Heavy imports happen inside."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from arrondi.errors import ArrondiError, SchemeError

app = typer.Typer(
    name="arrondi",
    help="Quantize a trained neural network, measure what it cost, and run it in few bits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

MISSED = 3
"""Exit status when a quality limit that the user set was missed."""

Model = Annotated[Path, typer.Argument(help="Model directory: config.json and safetensors files.", show_default=False)]
Out = Annotated[Path, typer.Option("--output", "-o", help="Directory to write; new or empty.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, messages on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
SchemeName = Annotated[str, typer.Option(help="Preset (W4A16, W8A8, NF4, MXFP4A16, …) or grammar (w=int3/g64/asym).")]
MethodName = Annotated[str, typer.Option(help="rtn, hqq or gptq.")]
GroupSize = Annotated[
    int | None, typer.Option(help="Weights that share a scale; -1: a whole row. Default: the scheme's.")
]
Targets = Annotated[
    list[str] | None, typer.Option(help="Modules to quantize: class, exact name or re:PATTERN. Repeatable.")
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(help="Modules to leave alone, same selectors; '' for none. Default: the output head."),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", help="Option of the method as NAME=VALUE, e.g. damping=0.02. Repeatable."),
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="JSON file of rules, instead of scheme, method and targets.")
]
LayoutName = Annotated[
    str | None, typer.Option("--layout", help="compressed-tensors or arrondi. Default: the most widely read that fits.")
]
KeepMisfits = Annotated[bool, typer.Option("--keep-misfits", help="Leave layers whose shape does not fit as they are.")]
Calibration = Annotated[Path | None, typer.Option(help="UTF-8 text to calibrate on.")]
Samples = Annotated[int, typer.Option(help="Windows of calibration text.", min=1)]
SeqLen = Annotated[int, typer.Option(help="Tokens in a window.", min=2)]
EvalText = Annotated[
    Path | None, typer.Option(help="Text to measure on. Default: the last tenth of the calibration text, held back.")
]
Activations = Annotated[
    str | None,
    typer.Option(
        help="Round the inputs of weight-only linears too, for speed: int8/g128, int8/token. Those of fused experts stay."
    ),
]
Seed = Annotated[int, typer.Option(help="Chooses the calibration windows.", min=0, max=2**63 - 1)]
MaxKl = Annotated[float | None, typer.Option(help="Exit with status 3 if the mean KL divergence is larger.")]
MaxPpl = Annotated[
    float | None, typer.Option(help="Exit with status 3 if perplexity rises by more than this fraction (0.05: 5 %).")
]


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


@app.command()
def plan(
    model: Model,
    scheme: SchemeName = "W4A16",
    method: MethodName = "rtn",
    group_size: GroupSize = None,
    targets: Targets = None,
    ignore: Ignore = None,
    option: Options = None,
    recipe: RecipeFile = None,
    layout: LayoutName = None,
    keep_misfits: KeepMisfits = False,
    samples: Samples = 128,
    seq_len: SeqLen = 512,
    json_: Json = False,
) -> None:
    """Print what `quantize` would do: every tensor, bytes, peak memory, rough time, shapes that do not fit and the fix."""
    resolved = _recipe(scheme, method, group_size, targets, ignore, option, recipe)
    _show_plan(_make_plan(model, resolved, layout, keep_misfits, samples, seq_len), json_)


@app.command()
def quantize(
    model: Model,
    output: Out,
    scheme: SchemeName = "W4A16",
    method: MethodName = "rtn",
    calibration: Calibration = None,
    samples: Samples = 128,
    seq_len: SeqLen = 512,
    eval_text: EvalText = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not measure the result.")] = False,
    eval_samples: Annotated[int, typer.Option(help="Windows to measure on at most.", min=1)] = 32,
    group_size: GroupSize = None,
    targets: Targets = None,
    ignore: Ignore = None,
    option: Options = None,
    recipe: RecipeFile = None,
    layout: LayoutName = None,
    keep_misfits: KeepMisfits = False,
    shard_size: Annotated[str, typer.Option(help="Largest output file: 500MB, 5GB.")] = "5GB",
    seed: Seed = 0,
    max_kl: MaxKl = None,
    max_ppl_increase: MaxPpl = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished model that arrondi wrote.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a model, block by block from disk, and measure the result on text that calibration did not see."""
    resolved = _recipe(scheme, method, group_size, targets, ignore, option, recipe)
    if dry_run:
        _show_plan(_make_plan(model, resolved, layout, keep_misfits, samples if calibration else 0, seq_len), json_)
        return
    _need_measurement(max_kl, max_ppl_increase, measured=not no_eval and (calibration or eval_text) is not None)
    from arrondi.pipeline import TextOptions, quantize_model
    from arrondi.report import print_report, progress_bar

    text = TextOptions(calibration, samples, seq_len, eval_text, not no_eval, eval_samples, seed)
    with progress_bar("quantizing", quiet) as progress:
        report = quantize_model(
            model,
            output,
            resolved,
            text,
            layout=layout,
            keep_misfits=keep_misfits,
            shard_bytes=_bytes(shard_size),
            overwrite=overwrite,
            progress=progress,
        )
    _answer(report, json_, print_report)
    _hold_to(report["evaluation"] or {}, max_kl, max_ppl_increase)


@app.command("eval")
def evaluate(
    model: Model,
    against: Annotated[Path, typer.Option(help="Directory of the original model.", show_default=False)],
    text: Annotated[Path, typer.Option(help="UTF-8 text that calibration has not seen.", show_default=False)],
    seq_len: SeqLen = 256,
    samples: Annotated[int | None, typer.Option(help="Windows at most. Default: all.", min=1)] = None,
    activations: Activations = None,
    max_kl: MaxKl = None,
    max_ppl_increase: MaxPpl = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity, KL divergence to the original and top-1 agreement, each with a 95 % interval."""
    from arrondi.evaluate.compare import compare_models
    from arrondi.report import print_evaluation, progress_bar

    with progress_bar("measuring", quiet) as progress:
        result = compare_models(
            model, against, text, seq_len=seq_len, samples=samples, activations=activations, progress=progress
        )
    _answer(result, json_, print_evaluation)
    _hold_to(result, max_kl, max_ppl_increase)


@app.command()
def inspect(model: Model, json_: Json = False) -> None:
    """Print the tensors of a model, their formats and bits per weight (all stored bits counted), and the totals."""
    from arrondi.pipeline import inspect_model
    from arrondi.report import print_inspection

    _answer(inspect_model(model), json_, print_inspection)


@app.command()
def dequantize(
    model: Model,
    output: Out,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished model that arrondi wrote.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Restore ordinary weights that any tool loads."""
    from arrondi.pipeline import dequantize_model
    from arrondi.report import print_facts, progress_bar

    with progress_bar("dequantizing", quiet) as progress:
        result = dequantize_model(model, output, dtype, overwrite=overwrite, progress=progress)
    _answer(result, json_, print_facts)


@app.command()
def run(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 60,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token every time.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed when temperature is above 0.")] = 0,
    dtype: Annotated[str, typer.Option(help="Type of activations: float32, bfloat16, float16, or auto.")] = "auto",
    activations: Activations = None,
    json_: Json = False,
) -> None:
    """Continue a prompt on this machine, printing as it goes."""
    from arrondi.runtime.generate import generate

    result = generate(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        dtype=dtype,
        activations=activations,
        stream=None if json_ else sys.stdout,
    )
    if json_:
        typer.echo(json.dumps(result, ensure_ascii=False))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the results.")] = Path("arrondi-demo"),
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize the sample model that ships with arrondi, compare methods, write the files and generate a few words."""
    from arrondi.pipeline.demo import run_demo
    from arrondi.report import print_demo, progress_bar

    with progress_bar("demo", quiet) as progress:
        result = run_demo(output, progress)
    _answer(result, json_, print_demo)


@app.command()
def bench(
    shapes: Annotated[str, typer.Option(help="Shapes of weights, OUTxIN, with commas between.")] = "4096x4096",
    m: Annotated[str, typer.Option("--m", help="Numbers of tokens, with commas between.")] = "1,16,512",
    schemes: Annotated[
        str | None,
        typer.Option(help="Schemes, hadamard, quantize and signs, with commas between. Default: a line of each kind."),
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure this machine, and how close products with quantized weights come to what it can do."""
    from arrondi.evaluate.roofline import bench as measure
    from arrondi.report import print_bench, progress_bar

    wanted = [_sizes("--shapes", shape, "x", 2) for shape in shapes.split(",")]
    tokens = _sizes("--m", m, ",")
    with progress_bar("measuring", quiet) as progress:
        result = measure([(n, k) for n, k in wanted], tokens, _scheme_names(schemes or ""), progress=progress)
    _answer(result, json_, print_bench)


def _sizes(option: str, text: str, separator: str, count: int | None = None) -> list[int]:
    """`4096x4096` or `1,16`: positive numbers, `count` of them if that is given."""
    parts = text.lower().strip().split(separator)
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts) or count not in (None, len(parts)):
        example = "4096x4096,11008x4096" if count else "1,16,512"
        raise SchemeError(f"{option} takes positive numbers such as {example}, got {text!r}.")
    return [int(part) for part in parts]


def _scheme_names(text: str) -> list[str]:
    """Names with commas between; the comma before `a=` belongs to the grammar of schemes."""
    names: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part.startswith("a=") and names:
            names[-1] += f",{part}"
        else:
            names.append(part)
    return names


def _answer(document: dict[str, Any], as_json: bool, show: Any) -> None:
    if as_json:
        typer.echo(json.dumps(document, ensure_ascii=False))
    else:
        show(document)


def _recipe(
    scheme: str,
    method: str,
    group_size: int | None,
    targets: list[str] | None,
    ignore: list[str] | None,
    options: list[str] | None,
    file: Path | None,
) -> Any:
    from arrondi.pipeline.recipe import Recipe

    if file is not None:
        return Recipe.read(file)
    return Recipe.simple(
        scheme,
        method,
        group_size=group_size,
        targets=targets or ["Linear"],
        ignore=None if ignore is None else [s for s in ignore if s],
        options=_parse_options(options or []),
    )


def _parse_options(items: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value that is JSON (a number, true) is read as such, else it is a word."""
    parsed: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise SchemeError(f"--option takes NAME=VALUE, got {item!r}. Example: --option damping=0.02.")
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = value
    return parsed


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "": 1}
    number = text.upper().rstrip("KMGTB")
    try:
        size = int(float(number) * units[text.upper()[len(number) :]])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise SchemeError(f"--shard-size takes a size such as 500MB or 5GB, got {text!r}.")
    return size


def _make_plan(
    model: Path, recipe: Any, layout: str | None, keep_misfits: bool, samples: int, seq_len: int
) -> dict[str, Any]:
    from arrondi.checkpoint import Checkpoint
    from arrondi.model import Skeleton
    from arrondi.pipeline import make_plan

    checkpoint = Checkpoint.open(model)
    if checkpoint.quantized:
        raise SchemeError(f"{model} is already quantized. Plan for the original model.")
    resolved = make_plan(Skeleton(checkpoint), recipe, layout=layout, keep_misfits=keep_misfits)
    from arrondi.rounding import get_method

    calibrated = any(get_method(r.method).needs_moment for r in recipe.rules)
    memory, seconds = resolved.estimate(samples * seq_len if calibrated else 0, 32 * seq_len if calibrated else 0)
    return {"model": str(model), **resolved.to_dict(), "peak_memory_bytes": memory, "seconds": round(seconds, 1)}


def _show_plan(document: dict[str, Any], as_json: bool) -> None:
    from arrondi.report import print_plan

    _answer(document, as_json, print_plan)


def _need_measurement(max_kl: float | None, max_ppl: float | None, *, measured: bool) -> None:
    if (max_kl is not None or max_ppl is not None) and not measured:
        raise SchemeError(
            "--max-kl and --max-ppl-increase need a measurement. Give --eval-text FILE (or --calibration FILE), and drop --no-eval."
        )


def _hold_to(result: dict[str, Any], max_kl: float | None, max_ppl: float | None) -> None:
    """Exit with status 3 when a limit was missed."""
    limits = [("--max-kl", "kl_mean", max_kl), ("--max-ppl-increase", "perplexity_increase", max_ppl)]
    missed = []
    for option, key, limit in limits:
        if limit is None:
            continue
        if result.get(key) is None:
            raise ArrondiError(f"{option} cannot be checked: this kind of model has no {key}.")
        if not result[key] <= limit:  # a result that is no number is a miss, too
            missed.append(f"{option} {limit:g} was missed: {key} is {result[key]:.6g}.")
    if missed:
        typer.echo(
            f"arrondi: {' '.join(missed)} The files are written; use more bits, smaller groups or a better method.",
            err=True,
        )
        raise typer.Exit(MISSED)
