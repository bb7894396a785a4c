"""Data for networks that are graphs: `read_arrays`, from `.npz` files and folders of images to batches of tensors.

An archive holds `inputs` (N, …) in the network's own scale, or one array for each of its inputs by name, and `labels` (N,) for top-1.
Images are scaled to the network's input: the shorter side to its size, the middle cut out, values in [0, 1], then normalised as asked.
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

from arrondi.errors import DataError, FileFormatError, MissingExtraError
from arrondi.graph import Graph, Value

IMAGES: Final = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})
BATCH: Final = 32
"""Samples that are run at once."""


@dataclass(frozen=True)
class Arrays:
    """Samples.

    Attributes:
        inputs: one tensor for each input of the network, (N, …) each.
        labels: (N,) classes, or None.
        source: for people.
        size: how many are run at once, where the network takes no other number; None: `BATCH`.
    """

    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor | None
    source: str
    size: int | None = None

    def __len__(self) -> int:
        return len(self.inputs[0])

    def part(self, start: int, stop: int | None = None) -> Arrays:
        """Some of them, in order."""
        labels = None if self.labels is None else self.labels[start:stop]
        return replace(self, inputs=tuple(t[start:stop] for t in self.inputs), labels=labels)

    def taken(self, count: int, seed: int) -> Arrays:
        """At most so many, chosen by a seed."""
        if count >= len(self):
            return self
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count].sort().values
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, inputs=tuple(t[chosen] for t in self.inputs), labels=labels)

    def batches(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Samples in order, some at a time; of a network that takes `size`, no fewer."""
        size = self.size or BATCH
        for start in range(0, len(self) - (len(self) % size if self.size else 0), size):
            yield tuple(t[start : start + size] for t in self.inputs)


def read_arrays(data: Any, graph: Graph, mean: Sequence[float] = (), std: Sequence[float] = ()) -> Arrays:
    """Samples for a network.

    Args:
        data: path of an `.npz` file or of a folder of images; a tensor or array; a tuple of them, one for each input; or a
            mapping as an archive holds it.
        graph: whose inputs they are.
        mean, std: of images, for each channel.

    Raises:
        DataError: wrong shapes, types or numbers, or none at all; FileFormatError: a file that cannot be read.
    """
    if isinstance(data, (str, Path)):
        path = Path(data)
        if path.is_dir():
            return Arrays((_images(path, graph, mean, std),), None, f"images of {path}")
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
    inputs = tuple(_input(held[v.name], v, where) for v in graph.inputs)
    count = len(inputs[0])
    if not count or any(len(t) != count for t in inputs):
        raise DataError(
            f"{where} holds {[len(t) for t in inputs]} samples. Give at least one, equally many for every input."
        )
    labels = held.get("labels")
    if labels is None:
        return Arrays(inputs, None, where)
    classes = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    classes = classes.reshape(-1)
    if len(classes) != count or classes.dtype.kind not in "iu":
        raise DataError(f"{where}: labels are {count} whole numbers, got {len(classes)} of type {classes.dtype}.")
    if classes.min() < 0:
        raise DataError(f"{where}: labels are classes counted from 0, got {classes.min()}.")
    return Arrays(inputs, torch.from_numpy(classes.astype(np.int64)), where)


def _input(values: Any, wanted: Value, where: str) -> torch.Tensor:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.dtype == object or array.dtype.kind not in "fiub":
        raise DataError(f"{where}: {wanted.name} is made of numbers, got {array.dtype}.")
    floating = wanted.dtype.kind == "f"
    if array.dtype.kind == "f" and not floating:
        raise DataError(f"{where}: {wanted.name} takes {wanted.dtype}, got {array.dtype}.")
    fixed = [(i, n) for i, n in enumerate(wanted.shape) if isinstance(n, int) and i]
    if array.ndim != len(wanted.shape) or any(array.shape[i] != n for i, n in fixed):
        shape = ", ".join("N" if not i else str(n) for i, n in enumerate(wanted.shape))
        hint = _layout_hint(array.shape, wanted.shape)
        raise DataError(f"{where}: {wanted.name} has the shape ({shape}), got {array.shape}.{hint}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{where}: {wanted.name} holds NaN or infinite numbers. Leave those samples out.")
    with np.errstate(over="ignore"):
        given = np.ascontiguousarray(array).astype(wanted.dtype)
    if given.dtype.kind == "f" and not np.isfinite(given).all():
        raise DataError(f"{where}: {wanted.name} holds numbers that are too large for {wanted.dtype}.")
    return torch.from_numpy(given)


def _layout_hint(given: tuple[int, ...], wanted: Sequence[Any]) -> str:
    moved = (given[0], given[-1], *given[1:-1]) if len(given) > 2 else given
    fits = len(moved) == len(wanted) and all(not isinstance(n, int) or not i or m == n for i, (m, n) in enumerate(zip(moved, wanted, strict=True)))  # fmt: skip
    return " Its channels come last: transpose it to channels first." if fits and moved != given else ""


def _images(folder: Path, graph: Graph, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtraError("Images need the package pillow: pip install 'arrondi[images]'.") from error
    if len(graph.inputs) != 1 or len(graph.inputs[0].shape) != 4:
        raise DataError("Images go into networks with one input (N, channels, height, width). Give an .npz file.")
    _, *dims = graph.inputs[0].shape
    last = dims[2] in (1, 3) and dims[0] not in (1, 3)
    channels, height, width = (dims[2], *dims[:2]) if last else dims
    if channels not in (1, 3) or not isinstance(height, int) or not isinstance(width, int):
        raise DataError(
            f"The network's input {graph.inputs[0].shape} does not say how large images are. Give an .npz file."
        )
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES)
    if not paths:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(IMAGES))}).")
    if any(len(part) not in (0, channels) for part in (mean, std)) or any(s <= 0 for s in std):
        raise DataError(
            f"mean and std have {channels} positive numbers, one for each channel, got {list(mean)} and {list(std)}."
        )
    found = []
    for path in paths:
        try:
            with Image.open(path) as image:
                array = (
                    np.asarray(_cut(image.convert("RGB" if channels == 3 else "L"), height, width), np.float32) / 255
                )
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise FileFormatError(f"{path} cannot be read as an image ({error}). Take it out of the folder.") from error
        found.append(array.reshape(height, width, channels))
    pixels = (np.stack(found) - np.array(mean or [0.0], np.float32)) / np.array(std or [1.0], np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels if last else pixels.transpose(0, 3, 1, 2)).astype(np.float32))


def _cut(image: Any, height: int, width: int) -> Any:
    """The middle of an image whose shorter side is scaled to fit."""
    scale = max(height / image.height, width / image.width)
    size = max(round(image.width * scale), width), max(round(image.height * scale), height)
    scaled = image.resize(size) if size != image.size else image
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return scaled.crop((left, top, left + width, top + height))
