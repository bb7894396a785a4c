"""Data for networks that are graphs: `read_arrays`, from `.npz` files and folders of images to batches of tensors.

An archive holds `inputs` (N, …) in the network's own scale, or one array for each of its inputs by name, and `labels` (N,) for top-1.
For folders see `arrondi.measure.pictures`.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from arrondi.errors import DataError, FileFormatError
from arrondi.graph import Graph, Value
from arrondi.graph.sizes import sample_axes
from arrondi.measure.pictures import ENDINGS, samples_of

BATCH: Final = 32
"""Samples that are run at once."""


@dataclass(frozen=True)
class Arrays:
    """Samples.

    Attributes:
        inputs: one tensor for each input of the network, (N, …) each, wherever the network has its samples; numbers without axes as they are.
        labels: (N,) classes, or (N, positions) where the network tells one of each, or None.
        axes: along which axis the network has its samples, see `arrondi.graph.sizes.sample_axes`; (): the first of all.
        source: for people.
        size: how many are run at once, where the network takes no other number; None: `BATCH`.
        unread: what an archive holds besides.
    """

    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor | None
    source: str
    size: int | None = None
    axes: tuple[int | None, ...] = ()
    unread: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(x for x in self.inputs if x.ndim))

    def part(self, start: int, stop: int | None = None) -> Arrays:
        """Some of them, in order."""
        labels = None if self.labels is None else self.labels[start:stop]
        return replace(self, inputs=tuple(t[start:stop] if t.ndim else t for t in self.inputs), labels=labels)

    def taken(self, count: int, seed: int) -> Arrays:
        """At most so many, chosen by a seed."""
        if count >= len(self):
            return self
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count].sort().values
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, inputs=tuple(t[chosen] if t.ndim else t for t in self.inputs), labels=labels)

    @property
    def notes(self) -> list[str]:
        """What a user should know of them."""
        if not self.unread:
            return []
        kept = "" if self.labels is not None else ", and no labels, so no top-1 is told: classes are read from labels"
        return [f"{self.source} also holds {', '.join(self.unread)}, which is not read{kept}."]

    def batches(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Samples in order, some at a time; of a network that takes `size`, no fewer."""
        size = self.size or BATCH
        for start in range(0, len(self) - (len(self) % size if self.size else 0), size):
            yield self.turned(tuple(t[start : start + size] if t.ndim else t for t in self.inputs))

    def turned(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Inputs (N, …) as the network takes them."""
        axes = self.axes or (0,) * len(inputs)
        return tuple(t.movedim(0, axis) if axis else t for t, axis in zip(inputs, axes, strict=True))


def check_normalized(mean: Sequence[float], std: Sequence[float], *data: Any) -> None:
    """Refuse numbers that images are normalised by where no data are a folder of images.

    Raises:
        DataError: it is so.
    """
    perhaps = (
        isinstance(d, (str, Path)) and not Path(d).is_file() for d in data
    )  # one that is not there is told later
    if (mean or std) and not any(perhaps):
        raise DataError("mean and std are of images in a folder; the numbers of an archive are taken as they are. Leave mean and std out.")  # fmt: skip


def read_arrays(
    data: Any,
    graph: Graph,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    *,
    most: int | None = None,
    seed: int = 0,
) -> Arrays:
    """Samples for a network.

    Args:
        data: path of an `.npz` file or of a folder of images; a tensor or array; a tuple of them, one for each input; or a
            mapping as an archive holds it.
        graph: whose inputs they are.
        mean, std: of images, for each channel.
        most, seed: of a folder's images, so many at most, and their order.

    Raises:
        DataError: wrong shapes, types or numbers, or none at all; FileFormatError: a file that cannot be read.
    """
    if isinstance(data, (str, Path)):
        path = Path(data)
        if path.is_dir():
            if len(graph.inputs) != 1:
                raise DataError(f"{path}: the network has {len(graph.inputs)} inputs, and images are one. Give an .npz file.")  # fmt: skip
            if graph.inputs[0].dtype.kind != "f":
                raise DataError(f"{path}: the network takes {graph.inputs[0].dtype}, and images become numbers in floating point. Give an .npz file.")  # fmt: skip
            pixels = samples_of(path, graph.inputs[0].shape, mean, std, most=most, seed=seed)
            pixels = torch.from_numpy(pixels.numpy().astype(graph.inputs[0].dtype, copy=False))
            return Arrays((pixels,), None, f"images of {path}")
        if path.suffix.lower() in ENDINGS:
            raise DataError(f"{path} is one image. Give a folder of them.")
        return _checked(_archive(path), graph, str(path))
    if isinstance(data, Mapping):
        return _checked(data, graph, "the arrays")
    several = data if isinstance(data, (tuple, list)) else (data,)
    return _checked(dict(zip([v.name for v in graph.inputs], several, strict=False)), graph, "the arrays")


def _archive(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise DataError(f"{path} does not exist. Give an .npz file with inputs (N, …), or a folder of images.")
    try:
        with path.open("rb") as file:
            held = np.load(file, allow_pickle=False)
            return {"inputs": held} if isinstance(held, np.ndarray) else {name: held[name] for name in held.files}
    except (
        OSError,
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        AttributeError,
        NotImplementedError,
    ) as error:
        why = "it is none, or holds Python objects, which are not read" if "pickle" in str(error) else str(error)
        raise FileFormatError(
            f"{path} cannot be read as an .npz file ({why}). Write numbers with numpy.savez."
        ) from error


def _checked(held: Mapping[str, Any], graph: Graph, where: str) -> Arrays:
    names = [v.name for v in graph.inputs]
    if len(names) == 1 and "inputs" in held:
        held = {**held, names[0]: held["inputs"]}
    missing = [n for n in names if n not in held]
    if missing:
        wanted = "inputs" if len(names) == 1 else ", ".join(names)
        raise DataError(f"{where} holds {', '.join(held) or 'nothing'}, and the network needs {wanted} (N, …).")
    axes = sample_axes(graph)
    inputs = tuple(_input(held[v.name], v, axis, where) for v, axis in zip(graph.inputs, axes, strict=True))
    counts = {v.name: len(t) for v, t in zip(graph.inputs, inputs, strict=True) if t.ndim}
    count = max(counts.values(), default=0)
    if not count or len({*counts.values()}) > 1:
        told = " and ".join(f"{n} samples of {name}" for name, n in counts.items())
        raise DataError(f"{where} holds {told or 'no samples'}. Give at least one, equally many for every input.")
    labels = held.get("labels")
    unread = tuple(n for n in held if n not in (*names, "labels") and not (n == "inputs" and len(names) == 1))
    if labels is None:
        return Arrays(inputs, None, where, axes=axes, unread=unread)
    classes = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if classes.shape[:1] != (count,) or not classes.size or classes.dtype.kind not in "iu":
        raise DataError(f"{where}: labels are {count} whole numbers, one for each sample (or a row of them, one for each position), got {classes.shape} of type {classes.dtype}.")  # fmt: skip
    if classes.min() < 0:
        raise DataError(f"{where}: labels are classes counted from 0, got {classes.min()}.")
    flat = torch.from_numpy(classes.reshape(count, -1).astype(np.int64))
    return Arrays(inputs, flat[:, 0] if flat.shape[1] == 1 else flat, where, axes=axes, unread=unread)


def _input(values: Any, wanted: Value, axis: int | None, where: str) -> torch.Tensor:
    """One input with its samples first."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.dtype == object or array.dtype.kind not in "fiub":
        raise DataError(f"{where}: {wanted.name} is made of numbers, got {array.dtype}.")
    floating = wanted.dtype.kind == "f"
    if array.dtype.kind == "f" and not floating:
        raise DataError(f"{where}: {wanted.name} takes {wanted.dtype}, got {array.dtype}.")
    fixed = [(i, n) for i, n in enumerate(wanted.shape) if isinstance(n, int) and i != axis]
    if array.ndim != len(wanted.shape) or any(array.shape[i] != n for i, n in fixed):
        shape = ", ".join("N" if i == axis else str(n) for i, n in enumerate(wanted.shape))
        hint = _layout_hint(array.shape, wanted.shape)
        raise DataError(f"{where}: {wanted.name} has the shape ({shape}), got {array.shape}.{hint}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{where}: {wanted.name} holds NaN or infinite numbers. Leave those samples out.")
    with np.errstate(over="ignore"):
        given = np.array(array, wanted.dtype, order="C")
    if given.dtype.kind == "f" and not np.isfinite(given).all():
        raise DataError(f"{where}: {wanted.name} holds numbers that are too large for {wanted.dtype}.")
    return torch.from_numpy(given).movedim(axis or 0, 0) if axis is not None else torch.from_numpy(given)


def _layout_hint(given: tuple[int, ...], wanted: Sequence[Any]) -> str:
    moved = (given[0], given[-1], *given[1:-1]) if len(given) > 2 else given
    fits = len(moved) == len(wanted) and all(not isinstance(n, int) or not i or m == n for i, (m, n) in enumerate(zip(moved, wanted, strict=True)))  # fmt: skip
    return " Its channels come last: transpose it to channels first." if fits and moved != given else ""
