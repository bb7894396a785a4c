"""A folder of pictures → pixels: `pictures_in`, `opened`, and `samples_of`, the samples that a network with one input of pictures is given.

Pictures are taken as common loaders of image folders take them: transparency is dropped, grey ones have three equal channels, and
those of four inks become red, green and blue. Sixteen bits of grey become eight.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from arrondi.checkpoint.containers.descriptors import reraise_exhaustion
from arrondi.errors import DataError, FileFormatError, MissingExtraError

ENDINGS: Final = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
"""What files of pictures are called."""


def pictures_in(folder: Path, *, below: bool = False) -> list[Path]:
    """The pictures of a folder by name; hidden files are none.

    Args:
        below: those of folders inside it as well.

    Raises:
        FileFormatError: it is no folder, cannot be read, or holds none.
    """
    try:
        found = sorted(
            path
            for path in (folder.rglob("*") if below else folder.iterdir())
            if path.suffix.lower() in ENDINGS and not path.name.startswith(".") and path.is_file()
        )
    except OSError as error:
        reraise_exhaustion(error)
        reason = "no such directory" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise FileFormatError(f"{folder}: {reason}. Give a directory of images.") from error
    if not found:
        raise FileFormatError(f"{folder}: no images in it ({', '.join(sorted(ENDINGS))}). Give a directory of images.")
    return found


def opened(path: Path, mode: str) -> Any:
    """A picture, all of it read.

    Args:
        mode: "RGB" or "L" (grey).

    Raises:
        MissingExtraError: Pillow is not installed.
        FileFormatError: it is broken.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError(
            f"{path}: images are read by Pillow, which is not installed. Install it: pip install 'arrondi[images]'."
        ) from error
    try:
        with Image.open(path) as image:
            return _eight_bits(image).convert(mode)
    except Exception as error:  # whatever Pillow raises about a broken file, or one that is too large to be a picture
        reraise_exhaustion(error)
        raise FileFormatError(
            f"{path}: cannot be read as an image ({type(error).__name__}). Remove it from the folder."
        ) from error


def _eight_bits(image: Any) -> Any:
    """Grey of sixteen bits in eight, where Pillow itself would cut it off at 255."""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64) / 257
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def samples_of(
    folder: Path,
    shape: Sequence[int | str | None],
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    *,
    most: int | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Pictures of a folder, and of those inside it, as float32 samples.

    Args:
        shape: of the network's input: (N, channels, height, width) or, if only that can be meant, (N, height, width, channels).
            The shorter side is scaled to it, and the middle is cut out.
        mean, std: for each channel, of values in [0, 1].
        most: so many pictures at most.
        seed: of the order, so that every part has pictures of every folder.

    Raises:
        DataError: the input says nothing of pictures, or mean or std do not go with it.
        FileFormatError: there are no pictures, or a broken one.
    """
    if len(shape) != 4:
        raise DataError("Images go into networks with one input (N, channels, height, width). Give an .npz file.")
    _, *dims = shape
    last = dims[2] in (1, 3) and dims[0] not in (1, 3)
    channels, height, width = (dims[2], *dims[:2]) if last else dims
    if channels not in (1, 3) or not isinstance(height, int) or not isinstance(width, int):
        raise DataError(f"The network's input {tuple(shape)} does not say how large images are. Give an .npz file.")
    if any(len(part) not in (0, channels) for part in (mean, std)) or any(s <= 0 for s in std):
        raise DataError(
            f"mean and std have {channels} positive numbers, one for each channel, got {list(mean)} and {list(std)}."
        )
    paths = pictures_in(folder, below=True)
    random.Random(seed).shuffle(paths)
    pixels = np.empty((len(paths[:most]), height, width, channels), np.float32)
    for place, path in zip(pixels, paths, strict=False):
        cut = _cut(opened(path, "RGB" if channels == 3 else "L"), height, width)
        place[...] = np.asarray(cut, np.float32).reshape(place.shape) / 255
    pixels -= np.array(mean or [0.0], np.float32)
    pixels /= np.array(std or [1.0], np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels if last else pixels.transpose(0, 3, 1, 2)))


def _cut(image: Any, height: int, width: int) -> Any:
    """The middle of an image whose shorter side is scaled to fit."""
    scale = max(height / image.height, width / image.width)
    size = max(round(image.width * scale), width), max(round(image.height * scale), height)
    scaled = image.resize(size) if size != image.size else image
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return scaled.crop((left, top, left + width, top + height))
