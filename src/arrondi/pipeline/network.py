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
    LayerScheme,
    PerChannel,
    PerGroup,
    Scheme,
)
from arrondi.graph import (
    Graph,
    Program,
    describe,
    held_bits,
    hold_biases,
    hold_codes,
    integer_products,
    places,
    read_graph,
    round_dynamically,
    tidy,
    write_graph,
)
from arrondi.graph.foreign import check_known
from arrondi.graph.ir import QDQ
from arrondi.graph.ops import OPERATORS
from arrondi.graph.read import file_bytes
from arrondi.graph.refuse import check_rounded
from arrondi.graph.uneven import check_grids
from arrondi.measure.arrays import Arrays, check_normalized, read_arrays
from arrondi.measure.batching import in_batches
from arrondi.measure.networks import check_finite, check_samples, compare_graphs
from arrondi.measure.signals import ratio, signals, spread_of
from arrondi.model import Inputs
from arrondi.pipeline.ends import ends_of, has_few_bits, with_wider_ends
from arrondi.pipeline.flowing import Ranges, flowing_scheme, rounded_flow, which_values
from arrondi.pipeline.module import round_module
from arrondi.pipeline.plan import Plan
from arrondi.pipeline.prepare import correct_by_norms, is_analytic, rewritten, with_what_was_learned
from arrondi.pipeline.recipe import Recipe
from arrondi.pipeline.steps import STEPS
from arrondi.tensor.qtensor import QTensor

TARGETS: Final = ("Linear", "Conv1d", "Conv2d", "Conv3d")
"""Layers of a network that become integers."""
_CHOOSING: Final = 128
"""Samples that a choice of recipes, and what is said of every value, is made on."""
_HELD_OUT: Final = 10
"""One sample of so many is measured on and not calibrated on, where no other data is given."""
_MEASURED: Final = 1000
"""Images of a folder that are read besides those to calibrate on, at most."""
_FEWEST: Final = 4
"""Samples to calibrate on, fewer than which are refused."""


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
        faint: whether values whose quiet samples eight bits drown get sixteen.
        int32_bias: whether biases are written as int32 codes of scale S_x · S_w instead of floating numbers.
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
    faint: bool = True
    int32_bias: bool = False
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
        graph: with fewer values rounded; None: as it was.
    """

    recipe: Recipe
    rows: list[dict[str, Any]]
    note: str
    graph: Graph | None = None


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
    passes: list[tuple[str, int]] = [("read", len(original.nodes))]
    given = tidy(original, passes)
    if out.suffix != ".onnx":
        raise SchemeError(f"Networks are written as .onnx files, got {out}. Give -o NAME.onnx.")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} is there already. Give another name, or --overwrite.")
    check_rounded(given)
    calibration, evaluation = _data(given, data)
    if calibration is not None or evaluation is not None:
        check_known(original, OPERATORS)
    if calibration is not None:
        check_finite(original, calibration)
    flowing, uneven = flowing_scheme(recipe), check_grids(data.grids, given)
    notes = [note for some in (calibration, evaluation) if some is not None for note in some.notes]
    notes = list(dict.fromkeys(notes))
    analytic = is_analytic(recipe)
    graph, recipe = rewritten(given, recipe, calibration, notes)
    passes += [("channels equalized, biases added", len(graph.nodes))] if graph is not given else []
    rounded = which_values(graph, data.rounded, flowing)
    found, rounded_graph = places(graph), graph
    ranges: Mapping[str, tuple[float, float]] = {}
    careful = has_few_bits(recipe) and data.ends is not None and choose is None
    if flowing is not None and flowing.dynamic:
        rounded_graph = round_dynamically(graph)
    elif flowing is not None:
        if calibration is None:
            raise DataError("The ranges of what flows between layers are found on data. Give --calibration data.npz, or a scheme of weights alone (W8A16).")  # fmt: skip
        how = Ranges(data.observer, data.observer_options, data.ends if careful else None, data.faint, rounded, uneven)
        flow = rounded_flow(graph, flowing.scheme, calibration, how)
        found, rounded_graph, ranges = flow.found, flow.graph, flow.ranges
        if flow.wide:
            notes.append(f"Eight bits would drown the quiet samples of {', '.join(flow.wide)}: sixteen there; --faint same gives eight.")  # fmt: skip
        if rounded == "products":
            notes.append("What products read is rounded, both sides of those in attention; sums, norms and what they read stay in floating point. --rounded all rounds these too.")  # fmt: skip
    program = Program(rounded_graph)
    before = {node: _weight(program, path).clone() for node, path in program.layers.items()}
    recipe = of_weights(recipe, program)
    if choose is None:  # a budget chooses itself
        recipe = with_ends(recipe, graph, program, data.ends, notes)
    chosen = None
    if choose is not None:
        if calibration is None:
            raise DataError("Widths are chosen on samples. Give --calibration data.npz.")
        chosen = choose(program, list(calibration.taken(_CHOOSING, data.seed).batches()), recipe)
        recipe = chosen.recipe
        notes.append(chosen.note)
        if chosen.graph is not None:
            rounded_graph, program = chosen.graph, Program(chosen.graph)
            there = {n.inputs[0] for n in rounded_graph.nodes if n.op == QDQ}
            found = replace(found, values={n: g for n, g in found.values.items() if n in there})
            ranges = {n: ends for n, ends in ranges.items() if n in there}
    looks = any(STEPS[rule.method].needs for rule in recipe.rules)
    if looks and calibration is None:
        raise DataError("The method looks at what enters every layer. Give --calibration data.npz, or --method rtn.")
    batches = [Inputs(batch) for batch in calibration.batches()] if calibration is not None and looks else None
    try:
        _, plan, values = round_module(program, recipe, batches, keep_misfits=True, layout="arrondi", progress=progress)
    except SchemeError as error:
        if calibration is None or calibration.size is None or "cannot be computed" not in str(error):
            raise
        raise SchemeError(f"The network takes {calibration.size} samples at a time, and the method runs parts of it on other numbers of them. Export it with a number of samples that may vary, or take --method rtn.") from error  # fmt: skip
    weights = {
        node: values[f"{path}.weight"].weight for node, path in program.layers.items() if f"{path}.weight" in values
    }
    if analytic:
        corrected = correct_by_norms(program, original, graph, before)
        notes.append(f"{len(corrected)} of {len(program.layers)} layers had their bias corrected by the means that normalizations tell; the others read something else, or have no bias.")  # fmt: skip
    learned, left = with_what_was_learned(rounded_graph, program), weights
    if flowing is not None and flowing.dynamic:
        learned, left = integer_products(learned, weights)
    written = hold_codes(learned, left)
    if evaluation is not None:
        check_samples(written, evaluation)
    if data.int32_bias:
        if flowing is None or flowing.dynamic:
            raise SchemeError("Biases are codes of the scale of what a layer reads, which is not stored here. Use W8A8, or leave --int32-bias out.")  # fmt: skip
        written = hold_biases(written, weights)
    write_graph(written, out)
    report = _report(graph, program, plan, flowing, weights, before, ranges)
    report |= {**describe(found), "notes": notes, "file_bytes": file_bytes(out), "out": str(out)}
    passes += [("values rounded", len(rounded_graph.nodes)), ("codes held", len(written.nodes))]
    report["passes"] = [{"pass": name, "operators": count} for name, count in passes]
    report["observer"] = data.observer if flowing is not None else None
    if chosen is not None:
        report["choice"] = chosen.rows
        for row in (r for r in report["layers"] if r["status"] == "kept" and chosen.graph is not None):
            row["reason"] = "the budget leaves it in floating point"
    report["samples"] = 0 if calibration is None else len(calibration)
    if calibration is not None:
        looked = calibration.taken(_CHOOSING, data.seed)
        report["values"] = signals(Program(read_graph(out)), Program(graph), looked.batches(), ranges)
    report["evaluation"] = None if evaluation is None else compare_graphs(read_graph(out), original, evaluation)
    out.with_suffix(".report.json").write_text(to_json(report), encoding="utf-8")
    return report


def _data(graph: Graph, data: NetworkData) -> tuple[Arrays | None, Arrays | None]:
    """What is calibrated on and what is measured on, no sample in both."""
    given = (data.calibration, data.evaluation if data.evaluate else None)
    check_normalized(data.mean, data.std, *given)
    most = (data.samples + _MEASURED, None)
    read = (
        None if d is None else read_arrays(d, graph, data.mean, data.std, most=m, seed=data.seed)
        for d, m in zip(given, most, strict=True)
    )  # fmt: skip
    calibration, evaluation = (None if some is None else in_batches(graph, some) for some in read)
    if data.evaluate and calibration is not None and evaluation is None:
        held = len(calibration) // _HELD_OUT
        kept = len(calibration) - (held - held % calibration.size if calibration.size else held)
        if kept < len(calibration):
            calibration, evaluation = calibration.part(0, kept), calibration.part(kept)
    if calibration is not None and len(calibration) < _FEWEST:
        raise DataError(f"{calibration.source} holds {len(calibration)} samples to calibrate on, and ranges of so few mean nothing. Give at least {_FEWEST}, better a hundred.")  # fmt: skip
    return None if calibration is None else calibration.taken(data.samples, data.seed), evaluation


def with_ends(recipe: Recipe, graph: Graph, program: Program, bits: int | None, notes: list[str]) -> Recipe:
    """A recipe of few bits with more of them in the first and the last layers, and a note of that.

    Args:
        recipe: for the program's weights.
        bits: so many; None leaves the recipe as it is.
    """
    if bits is None or not has_few_bits(recipe):
        return recipe
    ends = [name for some in ends_of(graph) for name in some]
    notes.append(f"The first and last layers ({', '.join(ends)}) have {bits} bits; --ends same gives them those of the others.")  # fmt: skip
    return with_wider_ends(recipe, [program.layers[n] for n in ends if n in program.layers], bits)


def of_weights(recipe: Recipe, program: Program) -> Recipe:
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
