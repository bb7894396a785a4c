"""Two networks on the same samples: `compare_networks`. Top-1 where labels are known, agreement, and the ratio of signal to difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from arrondi.errors import DataError, SchemeError
from arrondi.graph import Graph, Program, executor, read_graph
from arrondi.graph.classes import class_axis
from arrondi.graph.codes import INTEGERS
from arrondi.graph.ir import CODES, QDQ
from arrondi.graph.sizes import free_batch, sample_axes
from arrondi.measure.arrays import Arrays, check_normalized, read_arrays
from arrondi.measure.batching import in_batches
from arrondi.measure.intervals import block_bootstrap

FAR: Final = 20.0
"""How many times farther than what calibrated samples may go: outliers do, other scales go 255 times as far."""


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
    first, second = executor(free_batch(graph)), executor(free_batch(reference))
    same: list[torch.Tensor] = []
    hits: list[torch.Tensor] = []
    right: list[torch.Tensor] = []
    signal = noise = 0.0
    start = 0
    for inputs in samples.batches():
        ours, theirs = (_first(run(*inputs)) for run in (first, second))
        for given, whose in ((theirs, "network"), (ours, "rounded network")):
            if given.is_floating_point() and not given.isfinite().all():
                raise DataError(f"The {whose} gives NaN or infinite numbers at its output. Check its weights, and that the samples are in its own scale.")  # fmt: skip
        if ours.shape != theirs.shape:
            raise SchemeError(
                f"The networks give outputs of different shapes, {tuple(ours.shape)} and {tuple(theirs.shape)}."
            )
        signal += float(theirs.double().square().sum())
        noise += float((ours.double() - theirs.double()).square().sum())
        if ours.ndim >= 2:
            axis, classes = _axes(reference, ours)
            ours, theirs = (_told(y, axis, classes) for y in (ours, theirs))
            same.append((ours == theirs).double().mean(1))
            if samples.labels is not None:
                labels = samples.labels[start : start + len(ours)].reshape(len(ours), -1)
                hits.append((ours == labels).double().mean(1))
                right.append((theirs == labels).double().mean(1))
            start += len(ours)
    found: dict[str, Any] = {"samples": len(samples), "data": samples.source}
    for name, parts in (("top1", hits), ("reference_top1", right), ("agreement", same)):
        values = torch.cat(parts) if parts else None
        found[name] = None if values is None else float(values.mean())
        found[f"{name}_interval"] = None if values is None else list(block_bootstrap(values.numpy(), block=1))
    found["sqnr_db"] = math.inf if not noise else 10 * math.log10(signal / noise) if signal else -math.inf
    return found


@torch.no_grad()
def check_finite(graph: Graph, samples: Arrays) -> None:
    """Refuse a network whose outputs are no numbers on the first samples.

    Raises:
        DataError: they are not.
    """
    found = Program(free_batch(graph))(*next(samples.batches()))
    for value, output in zip(graph.outputs, found if isinstance(found, tuple) else (found,), strict=True):
        if output.is_floating_point() and not output.isfinite().all():
            raise DataError(f"The network gives NaN or infinite numbers at {value.name}. Check its weights, and that the samples are in its own scale.")  # fmt: skip


def compare_networks(
    model: str | Path, against: str | Path, data: Any, mean: Sequence[float] = (), std: Sequence[float] = ()
) -> dict[str, Any]:
    """The same for files, and `notes`: sentences about the data; see `compare_graphs` and `read_arrays`."""
    check_normalized(mean, std, data)
    reference = read_graph(against)
    graph = read_graph(model)
    if [v.name for v in graph.inputs] != [v.name for v in reference.inputs] and len(graph.inputs) != len(
        reference.inputs
    ):
        raise DataError(f"{model} and {against} take different inputs.")
    samples = in_batches(reference, read_arrays(data, reference, mean, std))
    check_samples(graph, samples)
    found = compare_graphs(graph, reference, samples)
    return {"model": str(model), "against": str(against), **found, "notes": samples.notes}


@torch.no_grad()
def check_samples(graph: Graph, samples: Arrays) -> None:
    """Refuse samples in another scale than those that calibrated a network, and labels of other classes.

    Raises:
        DataError: they go far beyond the grid of what they enter, as pictures of 0 … 255 do where those were 0 … 1; or a label is
            none of the classes that the network's output has.
    """
    if samples.labels is not None:
        output = _first(Program(free_batch(graph))(*next(samples.batches())))
        if output.ndim >= 2:
            axis, classes = _axes(graph, output)
            _check_classes(
                samples, output.shape[classes], output.numel() // (output.shape[axis] * output.shape[classes])
            )
    readers = graph.consumers
    for value, x in zip(graph.inputs, samples.inputs, strict=True):
        for node in readers.get(value.name, []):
            parts = [graph.constants.get(n) for n in node.inputs[1:3]]
            if node.op not in ("QuantizeLinear", QDQ) or len(parts) < 2 or any(p is None or p.size != 1 for p in parts):
                continue
            low, high, _ = INTEGERS[node.attrs[CODES]]
            scale, zero = (float(np.asarray(p).astype(np.float64).reshape(())) for p in parts)
            end, most = max(zero - low, high - zero) * scale, float(x.abs().max())
            if most > FAR * end:
                raise DataError(
                    f"{samples.source}: {value.name} reaches {most:.4g}, and the samples that calibrated the network reached {end:.4g}. Give both in the network's own scale."
                )


def _axes(graph: Graph, output: torch.Tensor) -> tuple[int, int]:
    """Along which axes of its first output samples and classes lie."""
    axis = sample_axes(graph, graph.outputs[:1])[0] or 0
    classes = class_axis(graph, output.ndim)
    return axis, classes if classes != axis else int(axis == 0)


def _check_classes(samples: Arrays, count: int, places: int) -> None:
    assert samples.labels is not None
    held = samples.labels.reshape(len(samples), -1).shape[1]
    if held != places:
        raise DataError(f"{samples.source}: labels are {held} classes of every sample, and the network tells {places}.")
    last = int(samples.labels.max())
    if last >= count:
        raise DataError(
            f"{samples.source}: labels go up to {last}, and the network tells {count} classes apart, counted from 0."
        )


def _told(y: torch.Tensor, samples: int, classes: int) -> torch.Tensor:
    """The class that is told of every sample and position, (N, positions)."""
    found = y.movedim(classes, -1).argmax(-1)
    return found.movedim(samples - (samples > classes), 0).reshape(y.shape[samples], -1)


def _first(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found
