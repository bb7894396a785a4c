"""A network that is a graph (an ONNX file, a torch.export archive), quantized into an ONNX file: `quantize_network`.

Ranges of what flows are observed on the network in floating point; then its weights are rounded by the steps of the pipeline, while what
flows is rounded as in the file; what is written is read again and measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.documents import to_json
from arrondi.errors import DataError, OutputError, SchemeError
from arrondi.formats import (
    PRESETS,
    ActivationScheme,
    Format,
    LayerScheme,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Scheme,
    integer,
)
from arrondi.graph import (
    PRODUCTS,
    RULES,
    Graph,
    Program,
    describe,
    has_attention,
    held_bits,
    hold_codes,
    observe,
    places,
    product_places,
    read_graph,
    round_values,
    tidy,
    write_graph,
)
from arrondi.graph.uneven import check_grids
from arrondi.measure.arrays import Arrays, read_arrays
from arrondi.measure.networks import compare_graphs
from arrondi.measure.signals import ratio, signals, spread_of
from arrondi.model import Inputs
from arrondi.pipeline.ends import ends_of, has_few_bits, of_bits, read_by, with_wider_ends
from arrondi.pipeline.module import round_module
from arrondi.pipeline.plan import Plan
from arrondi.pipeline.prepare import rewritten, with_what_was_learned
from arrondi.pipeline.recipe import Recipe
from arrondi.pipeline.steps import STEPS
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.observed import grid_from_range

TARGETS: Final = ("Linear", "Conv1d", "Conv2d", "Conv3d")
"""Layers of a network that become integers."""
_CHOOSING: Final = 128
"""Samples that a choice of recipes, and what is said of every value, is made on."""
_WIDE: Final = 8
"""Bits with which sums can be rounded too."""
_HELD_OUT: Final = 10
"""One sample of so many is measured on and not calibrated on, where no other data is given."""


@dataclass(frozen=True)
class NetworkData:
    """The data of a run.

    Attributes:
        calibration: see `arrondi.measure.arrays.read_arrays`; None for schemes and methods that need none.
        evaluation: what to measure on; None takes the last tenth of the calibration data.
        samples: of calibration at most, chosen by `seed`.
        mean, std: of images.
        evaluate: False leaves the measurement out.
        ends: bits of the first and the last layers, and of what they read, where weights of others have at most four; None: as others.
        rounded: which values: "all" that integer operators read, or those that "products" read; None: "products" in networks with attention
            where values have fewer than eight bits, else "all".
        grids: operator (softmax, gelu) → "twin" or "log2", grids of what it makes that are not uniform.
        observer, observer_options: how ranges of what flows are found, see `arrondi.calibration.OBSERVERS`.
    """

    calibration: Any = None
    evaluation: Any = None
    samples: int = 512
    seed: int = 0
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    evaluate: bool = True
    observer: str = "mse"
    ends: int | None = 8
    rounded: str | None = None
    grids: Mapping[str, str] = field(default_factory=dict)
    observer_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Chosen:
    """A recipe that was chosen on calibration samples.

    Attributes:
        recipe: what is done.
        rows: what is said of every layer.
        note: one sentence for people.
    """

    recipe: Recipe
    rows: list[dict[str, Any]]
    note: str


def quantize_network(
    model: Any,
    out: str | Path,
    recipe: Recipe,
    data: NetworkData,
    *,
    choose: Callable[[Program, list[tuple[torch.Tensor, ...]], Recipe], Chosen] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Quantize a network into an ONNX file.

    Args:
        model: see `arrondi.graph.read_graph`.
        out: the file to write.
        recipe: what weights become and how; the inputs of its scheme, unless None, say what flows between layers becomes. Presets that
            round weights in groups round them by output channel here, and "Linear" stands for every layer.
        data: to calibrate and measure on.
        choose: makes another recipe of this one, knowing the program (what flows is rounded) and calibration samples.
        overwrite: a file that is there may be replaced.

    Returns:
        the report, which is also written beside the file, as NAME.report.json.

    Raises:
        ArrondiError: see its sentence; nothing was written then.
    """
    out, original = Path(out), read_graph(model)
    given = tidy(original)
    if out.suffix != ".onnx":
        raise SchemeError(f"Networks are written as .onnx files, got {out}. Give -o NAME.onnx.")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} is there already. Give another name, or --overwrite.")
    calibration, evaluation = _data(given, data)
    flowing, uneven = _flowing(recipe), check_grids(data.grids)
    notes: list[str] = []
    graph, recipe = rewritten(given, recipe, calibration, notes)
    rounded = _rounded(graph, data.rounded, flowing)
    found = product_places(graph) if rounded == "products" else places(graph)
    firsts, lasts = ends_of(graph)
    careful = has_few_bits(recipe) and data.ends is not None and choose is None  # a budget chooses itself
    rounded_graph, ranges = graph, {}
    if flowing is not None:
        if calibration is None:
            raise DataError("The ranges of what flows between layers are found on data. Give --calibration data.npz, or a scheme of weights alone (W8A16).")  # fmt: skip
        program = Program(graph)
        wider = of_bits(flowing.scheme, data.ends) if careful else flowing.scheme
        apart = {found.values[n]: wider for n in read_by(graph, {*firsts, *lasts}) if n in found.values}
        ends = observe(
            program, calibration.batches(), found.values, flowing.scheme, data.observer, data.observer_options, apart
        )
        groups = (
            found.values
            if rounded == "products"
            else places(graph, {n: ends[g] for n, g in found.values.items()}).values
        )
        spans = {group: ends[found.values[name]] for name, group in reversed(list(groups.items()))}
        ranges = {name: spans[group] for name, group in groups.items()}
        schemes = {
            group: apart.get(found.values[name], flowing.scheme) for name, group in reversed(list(groups.items()))
        }
        grids = {n: (grid_from_range(*ranges[n], schemes[g]), schemes[g]) for n, g in groups.items()}
        rounded_graph = round_values(graph, grids, groups, PRODUCTS if rounded == "products" else RULES, uneven)
        if rounded == "products":
            notes.append("What products read is rounded, both sides of those in attention; sums, norms and what they read stay in floating point. --rounded all rounds these too.")  # fmt: skip
    program = Program(rounded_graph)
    before = {node: _weight(program, path).clone() for node, path in program.layers.items()}
    recipe = _of_weights(recipe, program)
    if careful:
        recipe = with_wider_ends(
            recipe, [program.layers[n] for n in (*firsts, *lasts) if n in program.layers], data.ends
        )
        notes.append(f"The first and last layers ({', '.join((*firsts, *lasts))}) have {data.ends} bits; --ends same gives them those of the others.")  # fmt: skip
    chosen = None
    if choose is not None:
        if calibration is None:
            raise DataError("Widths are chosen on samples. Give --calibration data.npz.")
        chosen = choose(program, list(calibration.taken(_CHOOSING, data.seed).batches()), recipe)
        recipe = chosen.recipe
        notes.append(chosen.note)
    looks = any(STEPS[rule.method].needs for rule in recipe.rules)
    if looks and calibration is None:
        raise DataError("The method looks at what enters every layer. Give --calibration data.npz, or --method rtn.")
    batches = [Inputs(batch) for batch in calibration.batches()] if calibration is not None and looks else None
    _, plan, values = round_module(program, recipe, batches, keep_misfits=True, progress=progress)
    weights = {
        node: values[f"{path}.weight"].weight for node, path in program.layers.items() if f"{path}.weight" in values
    }
    written = hold_codes(with_what_was_learned(rounded_graph, program), weights)
    write_graph(written, out)
    report = _report(graph, program, plan, flowing, weights, before, ranges)
    report |= {**describe(found), "notes": notes, "file_bytes": out.stat().st_size, "out": str(out)}
    report["observer"] = data.observer if flowing is not None else None
    if chosen is not None:
        report["choice"] = chosen.rows
    report["samples"] = 0 if calibration is None else len(calibration)
    if calibration is not None:
        looked = calibration.taken(_CHOOSING, data.seed)
        report["values"] = signals(Program(read_graph(out)), Program(graph), looked.batches(), ranges)
    report["evaluation"] = None if evaluation is None else compare_graphs(read_graph(out), original, evaluation)
    out.with_suffix(".report.json").write_text(to_json(report), encoding="utf-8")
    return report


def _data(graph: Graph, data: NetworkData) -> tuple[Arrays | None, Arrays | None]:
    """What is calibrated on and what is measured on, no sample in both."""
    calibration = None if data.calibration is None else read_arrays(data.calibration, graph, data.mean, data.std)
    evaluation = None if data.evaluation is None else read_arrays(data.evaluation, graph, data.mean, data.std)
    if not data.evaluate:
        evaluation = None
    elif calibration is not None and evaluation is None and len(calibration) >= _HELD_OUT:
        kept = len(calibration) - len(calibration) // _HELD_OUT
        calibration, evaluation = calibration.part(0, kept), calibration.part(kept)
    return None if calibration is None else calibration.taken(data.samples, data.seed), evaluation


def _flowing(recipe: Recipe) -> ActivationScheme | None:
    """What flows between layers becomes: one stored grid a tensor, with a zero point unless the scheme says static itself."""
    found = {rule.scheme.inputs for rule in recipe.rules if rule.scheme is not None}
    if len(found) > 1:
        raise SchemeError("What flows between layers has one scheme in a network. Give all rules the same inputs.")
    inputs = next(iter(found), None)
    if inputs is None:
        return None
    own = inputs.scheme
    if own.format.kind != "integer":
        raise SchemeError(f"What flows through an ONNX file is rounded to integers, got {own}. Use W8A8 or W4A8.")
    if isinstance(own.granularity, PerToken):  # of language models; an image has no tokens
        own = replace(own, granularity=PerTensor(), zero_point="integer", format=_unsigned(own.format))
    if inputs.dynamic is True and isinstance(inputs.scheme.granularity, PerTensor):
        raise SchemeError(f"Ranges that follow each tensor are not written yet, got {inputs}. Use W8A8.")
    return ActivationScheme(replace(own, scale="float32"), False)


def _rounded(graph: Graph, asked: str | None, flowing: ActivationScheme | None) -> str:
    """Which values are rounded."""
    if asked not in (None, "all", "products"):
        raise SchemeError(f"Rounded is all or products, got {asked!r}.")
    few = flowing is not None and flowing.scheme.format.bits < _WIDE
    return asked or ("products" if few and has_attention(graph) else "all")


def _unsigned(format: Format) -> Format:
    """The same codes counted from zero: what ONNX Runtime's integer products on x86 take without a detour."""
    return (
        integer(format.bits, signed=False) if format.kind == "integer" and format.levels == 2**format.bits else format
    )


def _of_weights(recipe: Recipe, program: Program) -> Recipe:
    """The recipe for the program's weights alone."""
    there = {type(program.get_submodule(path)).__name__ for path in program.layers.values()}
    every = tuple(kind for kind in TARGETS if kind in there)
    rules = [
        replace(
            rule, scheme=None if rule.scheme is None else LayerScheme(_by_channel(rule.scheme)),
            targets=every if rule.targets == ("Linear",) else rule.targets,
        )
        for rule in recipe.rules
    ]  # fmt: skip
    return replace(recipe, rules=tuple(rules), ignore=recipe.ignore or ())


def _by_channel(scheme: LayerScheme) -> Scheme:
    """What weights become: presets of language models have groups of columns, which no convolution of ONNX has."""
    grouped = isinstance(scheme.weights.granularity, PerGroup) and scheme in PRESETS.values()
    return replace(scheme.weights, granularity=PerChannel(), scale="float32") if grouped else scheme.weights


def _report(
    graph: Graph, program: Program, plan: Plan, flowing: ActivationScheme | None,
    weights: Mapping[str, QTensor], before: Mapping[str, torch.Tensor], ranges: Mapping[str, tuple[float, float]],
) -> dict[str, Any]:  # fmt: skip
    planned = {t.name: t for t in plan.tensors}
    rows, bits, count = [], 0.0, 0
    for node, path in program.layers.items():
        name, size = f"{path}.weight", before[node].numel()
        q = weights.get(node)
        own = 32.0 * size if q is None else float(held_bits(q))
        bits, count = bits + own, count + size
        tensor = planned.get(name)
        row: dict[str, Any] = {"layer": node, "shape": list(before[node].shape), "bits_per_weight": own / size}
        if q is None:
            row |= {"status": "kept", "reason": "" if tensor is None else tensor.reason}
        else:
            after = _weight(program, path)
            row |= {
                "status": "quantized",
                "scheme": str(q.scheme),
                "weight_sqnr_db": _sqnr(before[node], after),
                "histogram": spread_of(before[node]),
            }
        rows.append(row)
    return {
        "activations": None if flowing is None else str(flowing), "layers": rows, "bits_per_weight": bits / max(count, 1),
        "ranges": {name: list(ends) for name, ends in ranges.items()}, "float_bytes": sum(v.nbytes for v in graph.constants.values()),
    }  # fmt: skip


def _weight(program: Program, path: str) -> torch.Tensor:
    return program.get_parameter(f"{path}.weight").detach()


def _sqnr(original: torch.Tensor, other: torch.Tensor) -> float | None:
    return ratio(float(original.double().square().sum()), float((original.double() - other.double()).square().sum()))
