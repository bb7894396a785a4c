"""`quantize` and `eval` for networks that are graphs: ONNX files and torch.export archives. Called by the commands of the same names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arrondi.cli.answers import answer
from arrondi.cli.verifying import written
from arrondi.errors import SchemeError

if TYPE_CHECKING:
    from arrondi.pipeline.recipe import Recipe


def refuse_text_options(given: Mapping[str, Any]) -> None:
    """Options that say something of language models only.

    Args:
        given: option → its value, None or False where it was left out.
    """
    used = [option for option, value in given.items() if value]
    if used:
        raise SchemeError(
            f"A network of ONNX operators takes no {', '.join(used)}. Leave {'it' if len(used) == 1 else 'them'} out."
        )


def refuse_network_options(given: Mapping[str, Any]) -> None:
    """Options that say something of networks of ONNX operators only; see `refuse_text_options`."""
    used = [option for option, value in given.items() if value]
    if used:
        raise SchemeError(
            f"{', '.join(used)}: for .onnx and .pt2 files only. Leave {'it' if len(used) == 1 else 'them'} out."
        )


def quantize_graph(
    model: str,
    output: Path,
    recipe: Recipe,
    *,
    budget: str | None,
    budget_by: str,
    calibration: Path | None,
    data: Path | None,
    samples: int,
    seed: int,
    observer: str,
    ends: str,
    faint: str,
    int32_bias: bool,
    rounded: str | None,
    grids: str | None,
    mean: str | None,
    std: str | None,
    overwrite: bool,
    evaluate: bool,
    pythons: dict[str, str] | None,
    json_: bool,
    quiet: bool,
) -> None:
    """Quantize a network into an ONNX file, and measure it on samples that calibration did not see."""
    from arrondi.pipeline.network import NetworkData, quantize_network
    from arrondi.report import print_network, progress_bar
    from arrondi.search.mixed import quantize_mixed

    given = NetworkData(
        calibration, data, samples, seed, _numbers("--mean", mean), _numbers("--std", std), evaluate=evaluate, observer=observer, ends=_bits(ends),
        faint=_sixteen(faint), int32_bias=int32_bias, rounded=rounded, grids=_pairs(grids),
    )  # fmt: skip
    with progress_bar("quantizing", quiet) as progress:
        if budget is None:
            report = quantize_network(model, output, recipe, given, overwrite=overwrite, progress=progress)
        else:
            report = quantize_mixed(
                model,
                output,
                recipe,
                given,
                budget,
                measure=budget_by,
                overwrite=overwrite,
                progress=progress,
            )
    written(report, print_network, output, pythons, json_, quiet, data)


def plan_graph(model: str, recipe: Recipe, ends: str, rounded: str | None, json_: bool) -> None:
    """What quantizing would make of a network."""
    from arrondi.pipeline.network_plan import plan_network
    from arrondi.report import print_network_plan

    answer(plan_network(model, recipe, ends=_bits(ends), rounded=rounded), json_, print_network_plan)


def evaluate_graph(model: str, against: str, data: Path | None, mean: str | None, std: str | None, json_: bool) -> None:
    """Top-1, agreement and SQNR of a network beside another."""
    from arrondi.measure.networks import compare_networks
    from arrondi.report import print_network_evaluation

    if data is None:
        raise SchemeError("Networks of ONNX operators are measured on samples. Give --data test.npz.")
    found = compare_networks(model, against, data, _numbers("--mean", mean), _numbers("--std", std))
    answer(found, json_, print_network_evaluation)


def _pairs(text: str | None) -> dict[str, str]:
    parts = [part.partition("=") for part in (text or "").split(",") if part]
    return {name.strip(): grid.strip() for name, _, grid in parts}


def _bits(text: str) -> int | None:
    if text != "same" and text not in ("5", "6", "7", "8"):
        raise SchemeError(f"--ends is a number of bits from 5 to 8, or same, got {text!r}.")
    return None if text == "same" else int(text)


def _sixteen(text: str) -> bool:
    if text not in ("16", "same"):
        raise SchemeError(f"--faint is 16 or same, got {text!r}.")
    return text == "16"


def _numbers(option: str, text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise SchemeError(f"{option} is numbers with commas between, one for each channel, got {text!r}.") from None
