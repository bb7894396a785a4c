"""Rounding sites: weights in, QTensors with what they cost out.

Owns: `Rounded`, `round_alone` (a weight of whose inputs nothing is known) and `round_together` (weights that read the same input).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from arrondi.calibration import Moved
from arrondi.formats import LayerScheme, Scheme
from arrondi.model import Site, release
from arrondi.pipeline.statistics import Seen
from arrondi.pipeline.steps import get_step
from arrondi.rounding.error import Loss, output_loss, weight_loss
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.quantizers import knows
from arrondi.tensor.rows import rowwise, split_rows, stack_rows

_CHUNK = 1 << 19
"""Elements of a weight that are rounded at a time when rows do not depend on each other."""


@dataclass
class Rounded:
    """One site, rounded.

    Attributes:
        q: its codes.
        weight_error: Σ (w - ŵ)² and Σ w².
        output_error: ‖X(W - Ŵ)ᵀ‖² and ‖XWᵀ‖² on the calibration inputs, if there were any.
        tokens: calibration tokens that reached it; None without calibration.
        routed: tokens that the model sent to an expert which was calibrated on all tokens instead; None for all others.
        moved: how far what was seen of its input moves between two halves of the text, if that is known.
        method: what was done.
        why: why it is not what was asked for, "" if it is.
        facts: what the method says of its run.
    """

    q: QTensor
    weight_error: Loss
    output_error: Loss | None
    tokens: int | None
    method: str
    why: str = ""
    moved: Moved | None = None
    routed: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def round_alone(
    weight: torch.Tensor, scheme: Scheme, method: str, options: Mapping[str, Any], name: str, why: str = ""
) -> Rounded:
    """Round one weight (out, in), any float dtype, without knowing its inputs."""
    run = get_step(method).round
    assert run is not None
    chunked = rowwise(scheme) and not knows(weight, scheme)
    step = max(_CHUNK // weight.shape[1], 1) if chunked else len(weight)
    parts, error = [], Loss()
    facts: dict[str, Any] = {}
    for start in range(0, len(weight), step):
        part = weight[start : start + step]
        q, said = run(part.float() if chunked else part, scheme, None, name=name, **options)
        error += weight_loss(part, q)
        facts |= said
        parts.append(q)
    return Rounded(stack_rows(parts), error, None, None, method, why, facts=facts)


def round_together(
    sites: Sequence[Site],
    weights: Sequence[torch.Tensor],
    scheme: Scheme,
    method: str,
    options: Mapping[str, Any],
    seen: Seen,
) -> list[Rounded]:
    """Round weights (out, in) that read the same input, in one sweep; each error is the weight's own."""
    run = get_step(method).round
    assert run is not None
    if seen.groups:
        return [_round_groups(site, w, scheme, method, options, seen) for site, w in zip(sites, weights, strict=True)]
    joined = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    q, facts = run(joined, scheme, seen, name=sites[0].name, **options)
    sizes = [len(w) for w in weights]
    found = []
    moved = None if seen.energy is None else seen.energy.moved
    hessian = None if seen.moment is None else seen.moment.matrix()
    for weight, part in zip(weights, split_rows(q, sizes), strict=True):
        restored = part.dequantize()
        error = None if hessian is None else output_loss(weight, restored, hessian)
        found.append(
            Rounded(
                part,
                weight_loss(weight, part),
                error,
                seen.tokens,
                method,
                moved=moved,
                routed=seen.routed,
                facts=facts,
            )
        )
    release()
    return found


def _round_groups(
    site: Site, weight: torch.Tensor, scheme: Scheme, method: str, options: Mapping[str, Any], seen: Seen
) -> Rounded:
    """Round the weight of a convolution in groups, each group by what enters it."""
    run = get_step(method).round
    assert run is not None
    parts, error = [], Loss()
    facts: dict[str, Any] = {}
    for rows, own in zip(weight.chunk(len(seen.groups)), seen.groups, strict=True):
        q, facts = run(rows, scheme, own, name=site.name, **options)
        parts.append(q)
        if own.moment is not None:
            error += output_loss(rows, q.dequantize(), own.moment.matrix())
    whole = stack_rows(parts)
    return Rounded(whole, weight_loss(weight, whole), error, seen.tokens, method, facts=facts)


def row_of(
    name: str, scheme: LayerScheme, parts: Sequence[Rounded], nbytes: int, *, experts: bool = False
) -> dict[str, Any]:
    """A tensor's line in `report.json`; sums of its sites', never means of ratios. `nbytes`: what it takes in the file.

    `experts`: its sites are matrices of experts.
    """
    error = sum((p.weight_error for p in parts), Loss())
    outputs = [p.output_error for p in parts if p.output_error is not None]
    output = sum(outputs, Loss())
    tokens = [p.tokens for p in parts if p.tokens is not None]
    weights = sum(p.q.codes.numel() for p in parts)
    ways = sorted({p.method for p in parts})
    whys = sorted({p.why for p in parts if p.why})
    facts = {k: v for p in parts for k, v in p.facts.items()}
    moved = [p.moved for p in parts if p.moved is not None]
    sent = [p.tokens if p.routed is None else p.routed for p in parts]
    everywhere = [i for i, p in enumerate(parts) if p.routed is not None]
    middle = [round(statistics.median(m[i] for m in moved), 5) for i in range(len(Moved._fields))] if moved else []
    return {
        "name": name,
        "scheme": str(scheme),
        "method": "+".join(ways),
        "bits_per_weight": round(8 * nbytes / max(weights, 1), 4),
        "sqnr_db": round(error.decibels, 3) if math.isfinite(error.decibels) else None,
        "output_error": output.ratio if outputs else None,
        "calibration_tokens": min(tokens) if tokens else None,
        **({"expert_tokens": sent} if experts and tokens else {}),
        **({"on_all_tokens": everywhere} if everywhere else {}),
        **({"moved": dict(zip(Moved._fields, middle, strict=True))} if middle else {}),
        **({"why": "; ".join(whys)} if whys else {}),
        **facts,
    }
