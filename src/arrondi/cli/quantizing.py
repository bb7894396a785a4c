"""The commands that write a quantized model, or say what would be written: `plan` and `quantize`. Registered in `arrondi.cli.commands`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arrondi.cli import networks
from arrondi.cli import options as opt
from arrondi.cli.answers import answer, note, useless
from arrondi.cli.limits import hold_to, limits_of
from arrondi.cli.parsing import byte_count, recipe_from, set_by_user
from arrondi.cli.verifying import chosen, written
from arrondi.errors import SchemeError

if TYPE_CHECKING:
    from arrondi.pipeline import Plan


def plan(
    context: typer.Context,
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
    to: opt.LayoutName = None,
    keep_misfits: opt.KeepMisfits = False,
    calibration_images: opt.CalibrationImages = None,
    samples: opt.Samples = 128,
    seq_len: opt.SeqLen = 512,
    ends: opt.Ends = "8",
    rounded: opt.Rounded = None,
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
    from arrondi.graph import is_graph_file

    if is_graph_file(model):
        networks.refuse_text_options({
            "--to": to, "--embeddings": embeddings, "--calibration-images": calibration_images, "--keep-misfits": keep_misfits,
            **dict.fromkeys(set_by_user(context, "samples", "seq_len"), True),
        })  # fmt: skip
        networks.plan_graph(model, resolved, ends, rounded, json_)
        return
    networks.refuse_network_options({"--ends": ends != "8", "--rounded": rounded})
    from arrondi.checkpoint import Checkpoint
    from arrondi.measure.text import fit_length, positions_of
    from arrondi.model import OnDisk
    from arrondi.pipeline import TextOptions, make_plan
    from arrondi.pipeline.texts import read_data

    checkpoint = Checkpoint.open(model)
    if checkpoint.quantized:
        raise SchemeError(f"{model} is already quantized. Plan for the original model.")
    source = OnDisk(checkpoint)
    texts = read_data(source, TextOptions(samples=samples, seq_len=seq_len, images=calibration_images))
    images, measured = texts.images, texts.eval_images
    planned = make_plan(source, resolved, layout=to, keep_misfits=keep_misfits, images=images is not None)
    seq_len, note = fit_length(seq_len, positions_of(source.model))
    tokens, eval_tokens = (samples * seq_len, 32 * seq_len) if planned.calibrated else (0, 0)
    if images is not None and measured is not None:  # the same call without text
        tokens, eval_tokens, note = images.tokens, measured.tokens, None
        seq_len = max(batch["input_ids"].shape[1] for batch in (*images.batches, *measured.batches))
    _show_plan(model, planned, tokens, eval_tokens, seq_len, [note] if note and planned.calibrated else [], json_)


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
    kv: opt.KV = None,
    option: opt.Options = None,
    recipe: opt.RecipeFile = None,
    to: opt.LayoutName = None,
    template: Annotated[
        Path | None, typer.Option(help="With --to gguf: a GGUF file of the same model, whose header is taken.")
    ] = None,
    keep_misfits: opt.KeepMisfits = False,
    shard_size: Annotated[str, typer.Option(help="Largest output file: 500MB, 5GB.")] = "5GB",
    device: opt.Device = "cpu",
    seed: opt.Seed = 0,
    max_kl: opt.MaxKl = None,
    max_ppl_increase: opt.MaxPpl = None,
    budget: opt.Budget = None,
    budget_by: opt.BudgetBy = "loss",
    data: opt.NetworkData = None,
    observer: opt.ObserverName = "mse",
    ends: opt.Ends = "8",
    faint: opt.Faint = "16",
    int32_bias: opt.Int32Bias = False,
    rounded: opt.Rounded = None,
    grids: opt.Grids = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished model that arrondi wrote.")
    ] = False,
    verify: opt.Verify = False,
    python: opt.Pythons = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Quantize a model, block by block from disk, and measure the result on text that calibration did not see."""
    pythons = chosen(verify, python)
    if verify and dry_run:
        raise SchemeError("--dry-run writes nothing that could be verified. Leave --verify or --dry-run out.")
    resolved = recipe_from(
        scheme, method, group_size, targets, ignore, option, recipe, rewrite, repair, all_experts, preset, embeddings
    )
    from arrondi.graph import is_graph_file

    if is_graph_file(model):
        networks.refuse_text_options({
            "--eval-text": eval_text, "--column": column, "--imatrix": imatrix, "--calibration-images": calibration_images,
            "--to": to, "--template": template, "--embeddings": embeddings, "--kv": kv, "--max-kl": max_kl, "--max-ppl-increase": max_ppl_increase,
            "--all-experts": all_experts, "--keep-misfits": keep_misfits, "--device": device != "cpu",
            **dict.fromkeys(set_by_user(context, "seq_len", "eval_samples", "shard_size"), True),
        })  # fmt: skip
        if dry_run:
            networks.plan_graph(model, resolved, ends, rounded, json_)
            return
        networks.quantize_graph(
            model, output, resolved, budget=budget, budget_by=budget_by, calibration=calibration, data=data, samples=samples, seed=seed, observer=observer, ends=ends,
            faint=faint, int32_bias=int32_bias, rounded=rounded, grids=grids, mean=mean, std=std, overwrite=overwrite, json_=json_, quiet=quiet,
            evaluate=not no_eval, pythons=pythons,
        )  # fmt: skip
        return
    networks.refuse_network_options(
        {
            "--budget": budget,
            "--budget-by": budget_by != "loss",
            "--data": data,
            "--mean": mean,
            "--std": std,
            "--observer": observer != "mse",
            "--ends": ends != "8",
            "--faint": faint != "16",
            "--int32-bias": int32_bias,
            "--rounded": rounded,
            "--grids": grids,
        }
    )
    if kv is not None:
        resolved = resolved.with_kv(kv)
    if no_eval and eval_text is not None:
        raise SchemeError(f"--no-eval and --eval-text {eval_text} contradict each other. Leave one out.")
    limits = limits_of(max_kl, max_ppl_increase)
    measured = not no_eval and (calibration or eval_text or calibration_images) is not None
    if limits and not measured:
        raise SchemeError(
            "--max-kl and --max-ppl-increase need a measurement. Give --eval-text FILE (or --calibration FILE), and drop --no-eval."
        )
    if calibration is None and calibration_images is None:
        useless(context, "calibration text", "samples", "seed", *([] if measured else ["seq_len"]))
    if not measured:
        useless(context, "a measurement", "eval_samples")
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
        planned, texts = rehearse(
            model, output, resolved, text, layout=to, keep_misfits=keep_misfits, template=template
        )
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
            layout=to,
            template=template,
            keep_misfits=keep_misfits,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            planned=lambda plan: note(sole_reader(plan)),
            progress=progress,
            device=device,
        )
    written(report, print_report, output, pythons, json_, quiet)
    hold_to(report["evaluation"] or {}, limits, f"The files are in {output}.")


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
    answer(document, json_, print_plan)
