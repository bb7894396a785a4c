"""What a run will need, before it is paid: `estimate`.

Rough on purpose, from the plan alone: sizes of what is in memory at the same time, and products at the rate of a small CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from arrondi.pipeline.plan import Plan
from arrondi.pipeline.step import get_step

_BASE_BYTES = 430 << 20
"""Resident set of Python with torch and transformers loaded, and a model without its weights."""
_STORE_BYTES = 512 << 20
"""Hidden states and arguments that stay in memory; more goes to a file."""
_OUTPUT_BYTES = 256 << 20
"""Outputs of one model of one batch."""
_FLOPS = 2.0e11
"""Rough rate of a small CPU."""
_START_SECONDS = 3.0
"""Imports, headers, tokenizer."""
_EXTRA_PASSES = 2
"""Passes of one window: the chain beside the model's own forward."""


@dataclass(frozen=True)
class Estimate:
    """Peak memory in bytes and rough seconds."""

    bytes: int
    seconds: float


def estimate(plan: Plan, tokens: int, eval_tokens: int) -> Estimate:
    """What so many calibration and evaluation tokens will need.

    Args:
        plan: of the run.
        tokens, eval_tokens: 0 where a run has none.
    """
    largest = max((t.weights for t in plan.quantized), default=0)
    rounded = [(t.weights, get_step(t.rule.method)) for t in plan.quantized if t.rule]
    seconds = _START_SECONDS + sum(weights * step.cost for weights, step in rounded) / 1e9
    if not tokens and not eval_tokens:
        return Estimate(_BASE_BYTES + 10 * largest, seconds)  # as stored, codes, packed, and pieces in float32
    blocks: dict[int, int] = {}
    for t in plan.tensors:
        if t.block is not None:
            blocks[t.block] = blocks.get(t.block, 0) + t.weights
    outside = sum(t.weights for t in plan.tensors if t.block is None)
    width = max((s.matrix_shape[1] for t in plan.quantized for s in t.sites), default=0)
    hidden = min((s.matrix_shape[1] for t in plan.quantized for s in t.sites), default=0)
    states = min(4 * hidden * (tokens + 2 * eval_tokens), _STORE_BYTES)
    # A moment and its factor; then weights that share an input, as float32, as rows and restored.
    solving = 10 * width**2 + 26 * largest if any(step.needs for _, step in rounded) else 0
    unit = 4 * max(blocks.values(), default=0) + solving
    # Both models' outer weights are there when outputs are compared, and outputs of one batch of both.
    ends = 8 * outside + (4 * _OUTPUT_BYTES if eval_tokens else 0)
    matrices = sum(t.weights for t in plan.quantized)
    seconds += 2 * matrices * (3.4 * tokens + 2 * eval_tokens + _EXTRA_PASSES * 512) / _FLOPS
    return Estimate(_BASE_BYTES + states + max(ends, unit), seconds)
