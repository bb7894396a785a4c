"""Weights as the compiled kernels want them: `dense`, `depthwise`.

Zero points go into the bias: Σ (x − Z_x)(w − Z_w) = Σ x w' − Z_x Σ w' with w' = w − Z_w, which has to fit int8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

_MOST = 2**31 - 1


@dataclass(frozen=True)
class Packed:
    """One layer, or one group of it.

    Attributes:
        offsets: int32 bytes from the first pixel of a window to each run of it, or each tap.
        weight: int8, in the kernels' order.
        bias, multiplier: int32 and what `asks.Ending` has, one a lane.
        quads: four-byte pieces of a run.
    """

    offsets: Array
    weight: Array
    bias: Array
    multiplier: Array
    quads: int = 0


def centred(weight: Array, zero: Array) -> Array | None:
    """w − Z_w as int8, None where it does not fit. The zero point is one number or one for each index of the first axis."""
    whole = weight.astype(np.int64) - zero.astype(np.int64).reshape(
        -1, *[1] * (weight.ndim - 1) if zero.size > 1 else []
    )
    return whole.astype(np.int8) if whole.size and whole.min() >= -128 and whole.max() <= 127 else None


def folded(weight: Array, bias: Array | None, zero: int) -> Array | None:
    """The bias with the zero point of x in it, int32; None where a sum of the kernel may leave int32.

    Args:
        weight: (out, …) of `centred`.
        zero: of x as it lies in memory, 0 … 255.
    """
    rows = weight.reshape(len(weight), -1).astype(np.int64)
    whole = (0 if bias is None else bias.astype(np.int64)) - zero * rows.sum(1)
    if (np.abs(whole) + 255 * np.abs(rows).sum(1)).max(initial=0) > _MOST:
        return None
    return whole.astype(np.int32)


def _lanes(values: Array, step: int) -> Array:
    """Numbers for every output, with zeros up to a whole block."""
    return np.pad(values, ((0, -len(values) % step), *[(0, 0)] * (values.ndim - 1)))


def dense(
    weight: Array, bias: Array, multiplier: Array, width: int, channels: int, dilations: tuple[int, int]
) -> Packed:
    """Blocks of 16 outputs, four bytes of the input after the other.

    Args:
        weight: (out, in, kernel height, kernel width) int8.
        bias, multiplier: (out,).
        width, channels: of the input, edges included; `in` may be fewer channels (a group).
        dilations: of the two axes of space.
    """
    out, inside, high, wide = weight.shape
    down, right = dilations[0] * width * channels, dilations[1] * channels
    by_pixel = weight.transpose(0, 2, 3, 1)
    if inside == channels and (dilations[1] == 1 or wide == 1):
        runs = by_pixel.reshape(out, high, wide * inside)
        offsets = np.arange(high) * down
    else:
        runs = by_pixel.reshape(out, high * wide, inside)
        offsets = (np.arange(high)[:, None] * down + np.arange(wide) * right).reshape(-1)
    quads = -(-runs.shape[2] // 4)
    padded = np.pad(runs, ((0, -out % 16), (0, 0), (0, 4 * quads - runs.shape[2])))
    blocks = padded.reshape(-1, 16, runs.shape[1] * quads, 4).transpose(0, 2, 1, 3)
    return Packed(
        offsets.astype(np.int32), np.ascontiguousarray(blocks), _lanes(bias, 16), _lanes(multiplier, 16), quads
    )


def depthwise(
    weight: Array, bias: Array, multiplier: Array, width: int, channels: int, dilations: tuple[int, int]
) -> Packed:
    """Blocks of 64 channels, four taps after the other; vector v of a block has channels 4v … 4v + 3 of each sixteen.

    Args:
        weight: (channels, 1, kernel height, kernel width) int8; the others as in `dense`.
    """
    _, _, high, wide = weight.shape
    down, right = dilations[0] * width * channels, dilations[1] * channels
    offsets = (np.arange(high)[:, None] * down + np.arange(wide) * right).reshape(-1)
    taps = -(-len(offsets) // 4) * 4
    whole = np.pad(weight.reshape(channels, -1), ((0, -channels % 64), (0, taps - len(offsets))))
    # channel = 64 block + 16 g + 4 v + l goes to lane 4 g + l of vector v
    quads = whole.reshape(-1, 4, 4, 4, taps // 4, 4).transpose(0, 4, 2, 1, 3, 5)

    def ordered(values: Array) -> Array:
        blocks = _lanes(values, 64).reshape(-1, 4, 4, 4, *values.shape[1:])
        return np.ascontiguousarray(blocks.swapaxes(1, 2))

    return Packed(
        np.pad(offsets, (0, taps - len(offsets))).astype(np.int32),
        np.ascontiguousarray(quads), ordered(bias), ordered(multiplier),
    )  # fmt: skip
