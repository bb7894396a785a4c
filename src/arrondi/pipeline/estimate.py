"""What a run will need, before it is paid: `estimate`.

Owns: `Estimate`. Peak memory is that of the fullest of a few moments; each moment is a sum of what is there at the same time, from
the plan alone. Time is products at the rate of a small CPU. `tests/pipeline/test_peak.py` holds it against measured peaks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from arrondi.formats import Scheme
from arrondi.measure.compare import BATCH_TOKENS, batch_size, is_causal
from arrondi.model import OnDisk
from arrondi.pipeline.fisher import DRAWS, OUTPUT_BYTES, looks_at_loss
from arrondi.pipeline.plan import Plan
from arrondi.pipeline.resolve import PlannedTensor
from arrondi.pipeline.run import HIDDEN_LIMIT
from arrondi.pipeline.steps import get_step
from arrondi.tensor.rows import rowwise
from arrondi.tensor.trellis import search_seconds

BASE_BYTES: Final = 430 << 20
"""Resident set of Python with torch and transformers loaded, and a model without its weights."""
_SCRATCH: Final = 32 << 20
"""Pieces of tensors on their way."""
_COMPARING: Final = 48 << 20
"""Pieces of two models' logits in float64."""
_KERNELS: Final = (1024, 1 << 17)
"""oneDNN keeps kernels for so many shapes, of so many bytes each; every expert sees another number of tokens."""
_FLOPS: Final = 2.0e11
"""Rough rate of a small CPU."""
_BYTES_A_SECOND: Final = 5.0e8
"""Rough rate at which weights are read, hashed and written."""
_START_SECONDS: Final = 3.0
"""Imports, headers, tokenizer."""
_FLOAT: Final = 4


@dataclass(frozen=True)
class Estimate:
    """What a run will need.

    Attributes:
        bytes: peak memory.
        seconds: roughly.
        moment: when the peak is reached.
    """

    bytes: int
    seconds: float
    moment: str


def estimate(plan: Plan, tokens: int = 0, eval_tokens: int = 0, seq_len: int = 512) -> Estimate:
    """What a run of a plan will need.

    Args:
        plan: of a model directory.
        tokens, eval_tokens: of calibration and evaluation, 0 where there are none.
        seq_len: tokens of a window.
    """
    moments = {"the model is looked at": _probe(plan), "tensors are rounded one by one": _blind(plan)}
    if tokens or eval_tokens:
        moments = {"the model is looked at": _probe(plan), **_followed(plan, tokens, eval_tokens, seq_len)}
    moment = max(moments, key=lambda name: moments[name])
    return Estimate(BASE_BYTES + _SCRATCH + moments[moment], _seconds(plan, tokens, eval_tokens, seq_len), moment)


def _probe(plan: Plan) -> int:
    """One unit of made-up weights, of every stack one matrix; and marked numbers in the place of tensors that are merged."""
    made: dict[int, int] = {}
    for t in plan.tensors:
        if t.block is not None and not (t.sites and t.sites[0].param_index):
            made[t.block] = made.get(t.block, 0) + t.weights
    return max(_FLOAT * max(made.values(), default=0), 3 * _FLOAT * _merged(plan))


def _merged(plan: Plan) -> int:
    """Weights of the largest parameter that is made of several tensors."""
    parts: dict[str, dict[str, int]] = {}
    for t in plan.tensors:
        for s in t.sites:
            parts.setdefault(s.param, {})[t.name] = t.weights
    return max((sum(p.values()) for p in parts.values() if len(p) > 1), default=0)


def _blind(plan: Plan) -> int:
    """One tensor as stored, its codes twice (in pieces, then joined), and packed."""
    return max(map(_rounded_alone, plan.quantized), default=0)


def _rounded_alone(t: PlannedTensor) -> int:
    assert t.scheme is not None
    whole = not rowwise(t.scheme.weights) or t.tensor.converted
    return int(t.weights * (t.dtype.itemsize + 2 + _bits(t) / 4 + (3 * _FLOAT if whole else 0)))


def _followed(plan: Plan, tokens: int, eval_tokens: int, seq_len: int) -> dict[str, int]:
    """The moments of a run that follows the model on data."""
    source = plan.source
    assert isinstance(source, OnDisk)
    units, outer = _units(plan), [t for t in plan.tensors if t.block is None]
    widest = max((s.matrix_shape[1] for t in plan.tensors for s in t.sites if s.kind != "embedding"), default=0)
    hidden = min((s.matrix_shape[1] for t in plan.tensors for s in t.sites if t.block is not None), default=widest)
    batch = max(BATCH_TOKENS // seq_len, 1) * seq_len
    eval_batch = batch_size(source.model, seq_len) * seq_len if eval_tokens else 0
    batches = -(-tokens // batch) + (-(-eval_tokens // eval_batch) if eval_tokens else 0)
    shapes = 4 * batches * sum(s.param_index is not None for t in plan.tensors for s in t.sites)
    kernels = min(shapes, _KERNELS[0]) * _KERNELS[1]
    states = min(_FLOAT * hidden * (tokens * (2 if _follows_original(plan) else 1) + 2 * eval_tokens), HIDDEN_LIMIT)
    running = _FLOAT * max(min(batch, tokens), min(eval_batch, eval_tokens)) * (6 * hidden + 3 * widest)
    looked_up = [t for t in outer if t.sites and t.sites[0].kind == "embedding"]
    heads = [t for t in outer if t.sites and t.sites[0].kind == "linear"] or looked_up  # tied
    rows = max((t.shape[0] for t in heads), default=0) if is_causal(source.model) else hidden
    unit = _FLOAT * (max(units.values(), default=0) + _merged(plan))
    found = {
        "the first block is entered": _loaded(looked_up) + unit + running,
        "blocks are run": states + unit + running + kernels + _working(plan, units, bool(tokens)),
        "the model's own end is compared": _loaded(heads) + 2 * _FLOAT * rows * (min(eval_batch, eval_tokens) or seq_len),
    }  # fmt: skip
    quantized = [t for t in heads if t.status == "quantized"]
    if quantized:
        logits = _FLOAT * rows * seq_len if tokens else 0
        work = max(_solving(plan, quantized, bool(tokens)), logits)
        found["the head is rounded"] = states + _FLOAT * _weights(quantized) + work
    if eval_tokens:
        both = _loaded(heads) + (_loaded(quantized) + _weights(quantized) if quantized else 0)
        found["outputs are compared"] = states + both + 2 * _FLOAT * rows * seq_len + _COMPARING
    if any(one.step.scope == "whole" and one.groups for one in plan.selected):
        # Two models, what stands in for one, its gradient, what is learned; and what every unit keeps for the way back.
        found["the whole model is learned"] = 5 * _FLOAT * _weights(plan.tensors) + running * max(len(units), 1)
    if looks_at_loss(plan) and tokens:
        entering = min(_FLOAT * hidden * tokens * (len(units) + 1), HIDDEN_LIMIT)
        outputs = max(OUTPUT_BYTES, _FLOAT * rows * seq_len)
        found["the original's gradients are followed"] = entering + max(unit, _loaded(heads)) + 4 * (running + outputs)
    if source.whole:
        found["both models are in memory"] = states + 2 * _FLOAT * _weights(plan.tensors) + running
    return found


def _working(plan: Plan, units: dict[int, int], calibrated: bool) -> int:
    """Beside a unit's weights: those of the original where they are needed, codes of what is done, and what rounding takes."""
    most = 0
    for block, weights in units.items():
        own = [t for t in plan.quantized if t.block == block]
        original = _FLOAT * weights if _follows_original(plan) else 0
        most = max(most, original + _weights(own) + _solving(plan, own, calibrated))
    return most


def _solving(plan: Plan, tensors: Iterable[PlannedTensor], calibrated: bool) -> int:
    """Moments of the inputs of a stage, a full one and its factor, and the weights that are rounded together, a few times."""
    groups: dict[str, list[tuple[int, int]]] = {}
    most = 0
    for t in tensors:
        most = max(most, 2 * _FLOAT * t.weights)  # dequantized, and on its way to the file
        for s in t.sites:
            rows, columns = s.matrix_shape
            groups.setdefault(s.reads or s.name, []).append((rows, columns))
    if not calibrated:
        return most
    stages: dict[str, int] = {}
    for reads, shapes in groups.items():
        stage = reads.partition("[")[0]  # the experts of a stack are one stage
        stages[stage] = stages.get(stage, 0) + 2 * shapes[0][1] ** 2
    moments = max(stages.values(), default=0)
    solved = max(
        (5 * _FLOAT * sum(r * c for r, c in g) + 3 * _FLOAT * g[0][1] ** 2 for g in groups.values()), default=0
    )
    return max(most, moments + solved)


def _seconds(plan: Plan, tokens: int, eval_tokens: int, seq_len: int) -> float:
    rounding = sum(t.weights * _seconds_of_a_weight(t) for t in plan.quantized)
    rounding += (
        sum(s.matrix_shape[0] * s.matrix_shape[1] * one.step.cost for one in plan.selected for s in one.sites) / 1e9
    )
    moved = sum(t.weights * t.dtype.itemsize for t in plan.tensors) + plan.output_bytes
    matrices = sum(t.weights for t in plan.tensors if t.sites and t.sites[0].kind != "embedding")
    passes = 3.4 * tokens + 2 * eval_tokens + (2 * seq_len if tokens or eval_tokens else 0)
    if looks_at_loss(plan):
        passes += 4 * DRAWS * tokens  # forwards, and units forwards and backwards again
    return _START_SECONDS + rounding + moved / _BYTES_A_SECOND + 2 * matrices * passes / _FLOPS


def _seconds_of_a_weight(t: PlannedTensor) -> float:
    """Of choosing its code."""
    trellis = None if t.scheme is None else t.scheme.weights.format.trellis
    seconds = search_seconds(trellis) if trellis else get_step(t.rule.method).cost if t.rule else 0.0
    return seconds / 1e9


def _units(plan: Plan) -> dict[int, int]:
    """Unit → its weights."""
    found: dict[int, int] = {}
    for t in plan.tensors:
        if t.block is not None:
            found[t.block] = found.get(t.block, 0) + t.weights
    return found


def _loaded(tensors: list[PlannedTensor]) -> int:
    """Tensors in float32, and one of them as stored, on its way."""
    return _FLOAT * _weights(tensors) + max((t.weights * t.dtype.itemsize for t in tensors), default=0)


def _weights(tensors: Iterable[PlannedTensor]) -> int:
    return sum(t.weights for t in tensors)


def _bits(t: PlannedTensor) -> int:
    assert t.scheme is not None and isinstance(t.scheme.weights, Scheme)
    return t.scheme.weights.format.bits


def _follows_original(plan: Plan) -> bool:
    return any(step.follows_original for step in plan.steps())
