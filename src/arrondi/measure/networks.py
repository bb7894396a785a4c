"""Two networks on the same samples: `compare_networks`. Top-1 where labels are known, agreement, and the ratio of signal to difference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from arrondi.errors import DataError, SchemeError
from arrondi.graph import Graph, executor, read_graph
from arrondi.measure.arrays import Arrays, read_arrays
from arrondi.measure.intervals import block_bootstrap


@torch.no_grad()
def compare_graphs(graph: Graph, reference: Graph, samples: Arrays) -> dict[str, Any]:
    """Measure one network against another.

    Returns:
        `samples`; `top1`, `reference_top1` (shares; None without labels) and `top1_interval`; `agreement`: the share of samples of
        which both give the same class, with `agreement_interval`; `sqnr_db`: 10 log₁₀ of the reference's squared outputs over
        the squared differences (inf where there are none).

    Raises:
        SchemeError: the networks give different shapes.
    """
    first, second = executor(graph), executor(reference)
    same: list[torch.Tensor] = []
    hits: list[torch.Tensor] = []
    right: list[torch.Tensor] = []
    signal = noise = 0.0
    start = 0
    for inputs in samples.batches():
        ours, theirs = _first(first(*inputs)), _first(second(*inputs))
        if ours.shape != theirs.shape:
            raise SchemeError(
                f"The networks give outputs of different shapes, {tuple(ours.shape)} and {tuple(theirs.shape)}."
            )
        signal += float(theirs.double().square().sum())
        noise += float((ours.double() - theirs.double()).square().sum())
        if ours.ndim >= 2:
            ours, theirs = (y.reshape(len(y), y.shape[1], -1).argmax(1) for y in (ours, theirs))
            same.append((ours == theirs).double().mean(1))
            if samples.labels is not None and ours.shape[1] == 1:
                labels = samples.labels[start : start + len(ours)]
                hits.append((ours[:, 0] == labels).double())
                right.append((theirs[:, 0] == labels).double())
        start += len(inputs[0])
    found: dict[str, Any] = {"samples": len(samples), "data": samples.source}
    for name, parts in (("top1", hits), ("reference_top1", right), ("agreement", same)):
        values = torch.cat(parts) if parts else None
        found[name] = None if values is None else float(values.mean())
        found[f"{name}_interval"] = None if values is None else list(block_bootstrap(values.numpy(), block=1))
    found["sqnr_db"] = math.inf if not noise else 10 * math.log10(signal / noise) if signal else -math.inf
    return found


def compare_networks(model: str | Path, against: str | Path, data: Any) -> dict[str, Any]:
    """The same for files; see `compare_graphs`."""
    reference = read_graph(against)
    graph = read_graph(model)
    if [v.name for v in graph.inputs] != [v.name for v in reference.inputs] and len(graph.inputs) != len(
        reference.inputs
    ):
        raise DataError(f"{model} and {against} take different inputs.")
    return {
        "model": str(model),
        "against": str(against),
        **compare_graphs(graph, reference, read_arrays(data, reference)),
    }


def _first(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found
