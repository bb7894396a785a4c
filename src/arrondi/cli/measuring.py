"""The commands that measure: `eval` a model, and `bench` this machine. Registered in `arrondi.cli.commands`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arrondi.cli import networks
from arrondi.cli import options as opt
from arrondi.cli.answers import answer
from arrondi.cli.limits import hold_to, limits_of
from arrondi.cli.parsing import scheme_names, set_by_user, sizes
from arrondi.errors import SchemeError

if TYPE_CHECKING:
    from arrondi.measure.limits import Limits


def evaluate(
    context: typer.Context,
    model: opt.Model,
    against: Annotated[str, typer.Option(help="Directory or Hub name of the original model.", show_default=False)],
    text: Annotated[
        Path | None,
        typer.Option(help="Text that calibration has not seen: UTF-8, .jsonl, .json or .parquet.", show_default=False),
    ] = None,
    data: opt.NetworkData = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
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
    from arrondi.checkpoint.containers.onnx.view import is_onnx
    from arrondi.graph import is_graph_file

    as_language = text is not None and data is None and is_onnx(Path(model))
    if is_graph_file(model) and not as_language:
        networks.refuse_text_options({
            "--text": text, "--kv": kv, "--activations": activations, "--column": column, "--samples": samples, "--device": device != "cpu",
            "--max-kl": max_kl, "--max-ppl-increase": max_ppl_increase, **dict.fromkeys(set_by_user(context, "seq_len"), True),
        })  # fmt: skip
        networks.evaluate_graph(model, against, data, mean, std, json_)
        return
    networks.refuse_network_options({"--data": data, "--mean": mean, "--std": std})
    if text is None:
        raise SchemeError("Language models are measured on text that calibration has not seen. Give --text FILE.")
    limits = limits_of(max_kl, max_ppl_increase)
    kv = _stored_cache(model) if kv is None else kv
    if kv is not None and kv.strip().lower() not in ("none", "full"):
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
    answer(result, json_, print_evaluation)
    hold_to(result, limits, "")


def _stored_cache(model: str) -> str | None:
    """What keys and values become in a directory, if it says so."""
    from arrondi.checkpoint import Checkpoint
    from arrondi.checkpoint.states_file import KIND

    kind = Checkpoint.open(model).folder.config.get(KIND) if Path(model).is_dir() else None
    return kind if isinstance(kind, str) else None


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
        raise SchemeError(
            f"With --kv models are run on the CPU, got --device {device}. Leave it out, or give --kv none."
        )
    from arrondi.report import print_evaluation, progress_bar
    from arrondi.runtime.kv.measure import compare_with_cache

    with progress_bar("measuring", quiet) as progress:
        result = compare_with_cache(
            model, against, text, kv, seq_len=seq_len, samples=samples, activations=activations, limits=limits, progress=progress
        )  # fmt: skip
    answer(result, json_, print_evaluation)
    hold_to(result, limits, "")


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
    answer(result, json_, print_bench)
