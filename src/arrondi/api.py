"""What a user calls: `quantize`, `plan`, `evaluate`, `compare`, `save`, `load`, `dequantize`, `inspect`, `verify`.

A model is a directory, the name of one on the Hub, or a module in memory. A scheme is a word ("W4A16", the grammar) or a value; data
are a path, texts, token ids, or batches of them.
"""

from __future__ import annotations

import inspect as inspect_module
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.adapters.register import when_imported
from arrondi.arguments import check_arguments
from arrondi.errors import SchemeError
from arrondi.formats import LayerScheme, Scheme
from arrondi.graph import is_graph_file
from arrondi.measure.compare import compare_models
from arrondi.measure.data import Data
from arrondi.measure.limits import Limits
from arrondi.model import OnDisk
from arrondi.pipeline import (
    TextOptions,
    dequantize_model,
    inspect_model,
    make_plan,
    preset_recipe,
    quantize_model,
)
from arrondi.pipeline.module import quantize_module
from arrondi.pipeline.network import NetworkData, quantize_network
from arrondi.pipeline.network_plan import plan_network
from arrondi.pipeline.recipe import Recipe
from arrondi.pipeline.texts import read_data
from arrondi.runtime.load import load as load_model
from arrondi.runtime.modules import load_into, save
from arrondi.search import compare_methods
from arrondi.search.mixed import quantize_mixed
from arrondi.verification import verify_model

AnyScheme = str | Scheme | LayerScheme
_OF_DIRECTORIES: Final = (
    "out", "kv", "observer", "evaluation", "limits", "to", "template", "device", "overwrite", "shard_bytes", "samples", "seq_len", "eval_samples", "seed", "column", "imatrix", "images",
)  # fmt: skip
"""Arguments of `quantize` that are for model directories alone."""

Progress = Callable[[int, int, str], None]


def quantize(
    model: str | Path | torch.nn.Module,
    scheme: AnyScheme | None = None,
    *,
    method: str | None = None,
    calibration: Data | None = None,
    out: str | Path | None = None,
    recipe: Recipe | None = None,
    group_size: int | None = None,
    targets: Iterable[str] = ("Linear",),
    ignore: Iterable[str] | None = None,
    options: Mapping[str, Any] | None = None,
    rewrites: Iterable[str] = (),
    repairs: Iterable[str] = (),
    preset: str | None = None,
    embeddings: str | None = None,
    kv: str | None = None,
    evaluation: Data | None = None,
    evaluate: bool = True,
    samples: int = 128,
    seq_len: int = 512,
    eval_samples: int = 32,
    seed: int = 0,
    column: str | None = None,
    imatrix: str | Path | None = None,
    images: str | Path | None = None,
    limits: Limits | None = None,
    to: str | None = None,
    keep_misfits: bool = False,
    observer: str = "mse",
    ends: int | None = 8,
    faint: bool = True,
    int32_bias: bool = False,
    rounded: str | None = None,
    grids: Mapping[str, str] | None = None,
    budget: str | None = None,
    budget_by: str = "loss",
    template: str | Path | None = None,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Any:
    """Round a model to few bits.

    Args:
        model: a model directory, a Hub name, or a module. A module is changed in place: its layers are replaced by layers that
            hold packed codes.
        scheme: what the weights become, "W4A16" if neither it nor `recipe` is given.
        method: how codes are chosen, a name of `arrondi.STEPS`; None: "rtn", or for a trellis "trellis" or "trellis-yaqa".
        calibration: data for methods and static scales that need them. For a module, batches as it is called: tensors, tuples
            of positional arguments or dicts of keyword arguments.
        out: directory to write; needed for a directory, not for a module (see `save`).
        recipe: rules instead of scheme, method, group_size, targets, options, rewrites, repairs and embeddings.
        group_size, targets, ignore, options, rewrites, repairs, embeddings: see `Recipe.simple`.
        preset: what is done, instead of method, rewrites and repairs: "best", "q8bert" or "zeroquant".
        kv: what keys and values become while the model runs, see `arrondi.KV_KINDS`; stored with a directory.
        evaluation: data to measure on; None takes the last tenth of the calibration data.
        evaluate: False leaves the measurement out.
        samples, seq_len, eval_samples, seed, column, imatrix, images: see `TextOptions`.
        limits: refused before the work where the model cannot be held to them; `Limits.missed` tells afterwards.
        observer: how ranges of what flows are found, for networks of ONNX operators; see `arrondi.calibration.OBSERVERS`.
        rounded, grids: which values of such networks, and those that are not on uniform grids, see `arrondi.pipeline.network.NetworkData`.
        budget, budget_by: of such networks, what all layers may take together, and what is lost: see `arrondi.search.mixed.quantize_mixed`.
        ends: bits of the first and last layers of such networks where weights have at most four; None: as all others.
        faint: whether values of such networks whose quiet samples eight bits drown have sixteen.
        int32_bias: whether biases of such networks are written as int32 codes of scale S_x · S_w.
        to: the layout of the files, a name of `arrondi.checkpoint.LAYOUTS`; None takes the most widely read that holds the scheme.
        template: with `to="gguf"`, a GGUF file of the same model, whose header is taken.
        keep_misfits, shard_bytes, overwrite, device, progress: see `arrondi.pipeline.quantize_model`.

    Returns:
        the report of a directory, as in its `report.json`; the module itself for a module.

    Raises:
        ArrondiError: see its sentence.
    """
    given = dict(locals())
    check_arguments(quantize, given)
    rules = _rules(recipe, scheme, method, group_size, targets, ignore, options, rewrites, repairs, preset, embeddings)
    if is_graph_file(model):
        if out is None:
            raise SchemeError('A network is quantized into a file. Give out="NAME.onnx".')
        data = NetworkData(
            calibration,
            evaluation,
            samples,
            seed,
            observer=observer,
            evaluate=evaluate,
            ends=ends,
            faint=faint,
            int32_bias=int32_bias,
            rounded=rounded,
            grids=grids or {},
        )
        if budget is None:
            return quantize_network(model, out, rules, data, overwrite=overwrite, progress=progress)
        return quantize_mixed(
            model, out, rules, data, budget, measure=budget_by, overwrite=overwrite, progress=progress
        )
    if budget is not None:
        raise SchemeError("A budget is for networks of ONNX operators (.onnx, .pt2). Leave budget out.")
    if kv is not None:
        rules = rules.with_kv(kv)
    if isinstance(model, torch.nn.Module):
        _refuse_unused(given)
        when_imported()
        return quantize_module(model, rules, calibration, keep_misfits=keep_misfits, progress=progress)
    if out is None:
        raise SchemeError('A model directory is quantized into another. Give out="DIRECTORY".')
    text = TextOptions(
        calibration,
        samples,
        seq_len,
        evaluation,
        evaluate,
        eval_samples,
        seed,
        limits or Limits(),
        column,
        imatrix,
        images,
    )
    return quantize_model(
        model, out, rules, text, layout=to, keep_misfits=keep_misfits, template=template, shard_bytes=shard_bytes,
        overwrite=overwrite, device=device, progress=progress,
    )  # fmt: skip


def _refuse_unused(given: Mapping[str, Any]) -> None:
    """Refuse arguments that say nothing of a module in memory."""
    defaults = {name: p.default for name, p in inspect_module.signature(quantize).parameters.items()}
    plain = (int, str, type(None))  # whatever else was given is no default
    kept = {n for n in _OF_DIRECTORIES if isinstance(given[n], plain) and given[n] == defaults[n]}
    used = [name for name in _OF_DIRECTORIES if name not in kept]
    if used:
        raise SchemeError(
            f"A module is changed in place and not measured, so it takes no {', '.join(used)}. Leave that out; arrondi.save writes files."
        )


def plan(
    model: str | Path,
    scheme: AnyScheme | None = None,
    *,
    method: str | None = None,
    recipe: Recipe | None = None,
    group_size: int | None = None,
    targets: Iterable[str] = ("Linear",),
    ignore: Iterable[str] | None = None,
    options: Mapping[str, Any] | None = None,
    rewrites: Iterable[str] = (),
    repairs: Iterable[str] = (),
    preset: str | None = None,
    embeddings: str | None = None,
    to: str | None = None,
    keep_misfits: bool = False,
    images: str | Path | None = None,
) -> Any:
    """What `quantize` would do, before anything is learned.

    Takes the arguments of `quantize`.

    Returns:
        of a model directory the `arrondi.pipeline.Plan`, whose `to_dict()` is plain data; of a network of ONNX operators plain data, see
        `arrondi.pipeline.network_plan.plan_network`.
    """
    check_arguments(plan, locals())
    rules = _rules(recipe, scheme, method, group_size, targets, ignore, options, rewrites, repairs, preset, embeddings)
    if is_graph_file(model):
        return plan_network(model, rules)
    source = OnDisk.open(model)
    read_data(source, TextOptions(images=images))  # refused where they cannot be read
    return make_plan(source, rules, layout=to, keep_misfits=keep_misfits, images=images is not None)


def _rules(
    recipe: Recipe | None,
    scheme: AnyScheme | None,
    method: str | None,
    group_size: int | None,
    targets: Iterable[str],
    ignore: Iterable[str] | None,
    options: Mapping[str, Any] | None,
    rewrites: Iterable[str],
    repairs: Iterable[str],
    preset: str | None,
    embeddings: str | None,
) -> Recipe:
    """The recipe, that of a preset, or one method and what goes with it; one of them alone."""
    if preset is not None and recipe is None:
        if method is not None or tuple(rewrites) or tuple(repairs):
            raise SchemeError(f"The preset {preset} says what is done. Leave method, rewrites and repairs out.")
        return preset_recipe(
            preset,
            scheme,
            group_size=group_size,
            targets=targets,
            ignore=ignore,
            options=options,
            embeddings=embeddings,
        )
    if recipe is None:
        word = "W4A16" if scheme is None else scheme
        return Recipe.simple(
            word, method, group_size=group_size, targets=targets, ignore=ignore, options=options, rewrites=rewrites,
            repairs=repairs, embeddings=embeddings,
        )  # fmt: skip
    given = {
        "scheme": scheme, "method": method, "group_size": group_size,
        "targets": None if tuple(targets) == ("Linear",) else targets, "ignore": ignore, "options": options,
        "rewrites": tuple(rewrites) or None, "repairs": tuple(repairs) or None, "preset": preset,
        "embeddings": embeddings,
    }  # fmt: skip
    beside = [name for name, value in given.items() if value is not None]
    if beside:
        raise SchemeError(
            f"A recipe says {' and '.join(beside)} itself. Write it into its rules, or leave the recipe out."
        )
    return recipe


def load(path: str | Path, *, model: torch.nn.Module | None = None, **options: Any) -> Any:
    """A saved model whose layers hold packed codes. Gradients pass through them, and peft puts adapters over them.

    Args:
        path: directory or Hub name; quantized or plain.
        model: a fresh module of the class that was saved, for models that transformers does not build; it is filled.
        options: dtype, activations, fuse and device of `arrondi.runtime.load.load`.

    Raises:
        ArrondiError: see its sentence.
    """
    check_arguments(load, locals())
    when_imported()
    if model is None:
        return load_model(path, **options)
    if options:
        raise SchemeError(f"A module is filled as it is; leave out {', '.join(sorted(options))}.")
    return load_into(model, path)


def compare(
    model: str | Path,
    *,
    schemes: Iterable[AnyScheme] | None = None,
    methods: Iterable[str] | None = None,
    presets: Iterable[str] = (),
    rewrites: Iterable[str] = ("none",),
    embeddings: Iterable[str] = ("none",),
    calibration: Data | None = None,
    text: Data | None = None,
    out: str | Path | None = None,
    keep: bool = False,
    group_size: int | None = None,
    targets: Iterable[str] = ("Linear",),
    ignore: Iterable[str] | None = None,
    options: Mapping[str, Any] | None = None,
    samples: int = 128,
    seq_len: int = 512,
    eval_samples: int = 32,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize a model directory by several methods, measure each alike, and say which to take.

    Args:
        model: a model directory or a Hub name.
        schemes: words or values, each tried with each method; "W4A16" if none are given.
        methods: "gptq", "rotate+gptq", "gptq:damping=0.05", or a recipe file (".json"), see `arrondi.search.candidates`; "rtn" and
            "gptq" if neither they nor presets are given.
        presets, rewrites, embeddings: more to try, with "none" for nothing, see `arrondi.search.candidates`.
        calibration, samples, seq_len, eval_samples, seed: see `TextOptions`.
        text: what to measure on; None takes the last tenth of the calibration data.
        out, keep, device, progress: see `arrondi.search.compare_methods`.
        group_size, targets, ignore, options: see `Recipe.simple`; for all candidates but recipe files.

    Returns:
        `rows`, `answer` and how it was measured; see `arrondi.search.compare_methods`.

    Raises:
        ArrondiError: see its sentence.
    """
    check_arguments(compare, locals())
    asked = TextOptions(calibration, samples, seq_len, text, True, eval_samples, seed)
    ready = _several(presets)
    wanted = ([] if ready else ["rtn", "gptq"]) if methods is None else _several(methods)
    return compare_methods(
        model, None if schemes is None else _several(schemes), wanted, asked, out=out, keep=keep, presets=ready,
        rewrites=_several(rewrites), embeddings=_several(embeddings), group_size=group_size, targets=targets,
        ignore=ignore, options=options, device=device, progress=progress,
    )  # fmt: skip


def _several(items: Iterable[Any]) -> list[Any]:
    """A list; one word is a list of one."""
    return [items] if isinstance(items, str) else list(items)


evaluate = compare_models
dequantize = dequantize_model
inspect = inspect_model
verify = verify_model

__all__ = ["compare", "dequantize", "evaluate", "inspect", "load", "plan", "quantize", "save", "verify"]
