"""Operators that slide a window over space, in PyTorch: convolutions, pools, padding, resizing, with ONNX's rules for their edges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F

from arrondi.graph.ir import Unusual

Tensor = torch.Tensor
Attrs = Mapping[str, Any]

_CONV: Final = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: Final = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX: Final = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEAN: Final = {2: F.avg_pool2d, 3: F.avg_pool3d}


def edges(attrs: Attrs, sizes: Sequence[int], kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """How much is added before and after every axis of space.

    Args:
        sizes: of the input's axes of space.
        kernel: of the window.
    """
    count = len(kernel)
    strides, dilations = attrs.get("strides", [1] * count), attrs.get("dilations", [1] * count)
    how = attrs.get("auto_pad", "NOTSET")
    if how in ("NOTSET", ""):
        pads = list(attrs.get("pads", [0] * 2 * count))
        return pads[:count], pads[count:]
    if how == "VALID":
        return [0] * count, [0] * count
    whole = [
        max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        for size, s, k, d in zip(sizes, strides, kernel, dilations, strict=True)
    ]
    small, large = [w // 2 for w in whole], [w - w // 2 for w in whole]
    return (small, large) if how == "SAME_UPPER" else (large, small)


def _padded(x: Tensor, begin: Sequence[int], end: Sequence[int], value: float = 0.0) -> Tensor:
    pairs = [n for b, e in zip(reversed(begin), reversed(end), strict=True) for n in (b, e)]
    return F.pad(x, pairs, value=value) if any(pairs) else x


def conv(attrs: Attrs, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution; x (n, in, …), weight (out, in / groups, …)."""
    space = weight.ndim - 2
    begin, end = edges(attrs, x.shape[2:], weight.shape[2:])
    one = [1] * space
    together = begin if begin == end else [0] * space
    x = x if begin == end else _padded(x, begin, end)
    return _CONV[space](
        x, weight, bias, attrs.get("strides", one), together, attrs.get("dilations", one), attrs.get("group", 1)
    )


def conv_transpose(attrs: Attrs, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A transposed convolution; weight (in, out / groups, …)."""
    space = weight.ndim - 2
    one, zero = [1] * space, [0] * space
    strides, dilations = attrs.get("strides", one), attrs.get("dilations", one)
    y = _TRANSPOSED[space](
        x, weight, bias, strides, zero, attrs.get("output_padding", zero), attrs.get("group", 1), dilations
    )
    begin, end = transposed_edges(attrs, x.shape[2:], weight.shape[2:])
    return _padded(y, [-b for b in begin], [-e for e in end])


def transposed_edges(attrs: Attrs, sizes: Sequence[int], kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """How much a transposed convolution cuts off."""
    space = len(kernel)
    one, zero = [1] * space, [0] * space
    strides, dilations, extra = (
        attrs.get("strides", one),
        attrs.get("dilations", one),
        attrs.get("output_padding", zero),
    )
    how, wanted = attrs.get("auto_pad", "NOTSET"), attrs.get("output_shape")
    if wanted is None and how in ("NOTSET", ""):
        pads = list(attrs.get("pads", zero * 2))
        return pads[:space], pads[space:]
    if how == "VALID" and wanted is None:
        return zero, zero
    targets = [n * s for n, s in zip(sizes, strides, strict=True)] if wanted is None else list(wanted)[-space:]
    whole = [
        s * (n - 1) + o + (k - 1) * d + 1 - t
        for n, s, o, k, d, t in zip(sizes, strides, extra, kernel, dilations, targets, strict=True)
    ]
    small, large = [w // 2 for w in whole], [w - w // 2 for w in whole]
    return (small, large) if how == "SAME_UPPER" else (large, small)


def windows(attrs: Attrs, shape: Sequence[int]) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Kernel, strides, dilations, and what is added before and after, with the rest that `ceil_mode` asks for."""
    kernel = list(attrs["kernel_shape"])
    one = [1] * len(kernel)
    strides, dilations = list(attrs.get("strides", one)), list(attrs.get("dilations", one))
    begin, end = edges(attrs, shape[2:], kernel)
    if attrs.get("ceil_mode", 0):
        for i, size in enumerate(shape[2:]):
            reach = (kernel[i] - 1) * dilations[i] + 1
            steps = -(-(size + begin[i] + end[i] - reach) // strides[i])
            if steps * strides[i] >= size + begin[i]:  # a window that would begin behind the input is left out
                steps -= 1
            end[i] = max(steps * strides[i] + reach - size - begin[i], end[i])
    return kernel, strides, dilations, begin, end


def max_pool(attrs: Attrs, x: Tensor) -> Tensor:
    """The largest of a window."""
    kernel, strides, dilations, begin, end = windows(attrs, x.shape)
    lowest = -math.inf if x.dtype.is_floating_point else torch.iinfo(x.dtype).min
    x = _padded(x, begin, end, lowest)
    floating = x if x.dtype.is_floating_point else x.float()
    return _MAX[len(kernel)](floating, kernel, strides, 0, dilations).to(x.dtype)


def average_pool(attrs: Attrs, x: Tensor) -> Tensor:
    """The mean of a window; what was added counts only if `count_include_pad` says so, and never what `ceil_mode` added."""
    kernel, strides, dilations, begin, end = windows(attrs, x.shape)
    if any(d != 1 for d in dilations):
        raise Unusual("dilations")
    return _window_sums(_padded(x, begin, end), kernel, strides) / window_counts(attrs, torch.ones_like(x[:1, :1]))


def window_counts(attrs: Attrs, ones: Tensor) -> Tensor:
    """How many numbers count in every window of an average.

    Args:
        ones: (1, 1, …) of the input's space.
    """
    kernel, strides, _, begin, end = windows(attrs, ones.shape)
    own_begin, own_end = edges(attrs, ones.shape[2:], kernel)
    if attrs.get("count_include_pad", 0):
        counted = _padded(ones, own_begin, own_end, 1.0)
        counted = _padded(counted, [0] * len(kernel), [e - o for e, o in zip(end, own_end, strict=True)])
    else:
        counted = _padded(ones, begin, end)
    return _window_sums(counted, kernel, strides)


def _window_sums(x: Tensor, kernel: Sequence[int], strides: Sequence[int]) -> Tensor:
    """The sum of every window, one number after another."""
    if len(kernel) == 1:
        return _window_sums(x[:, :, None], [1, *kernel], [1, *strides])[:, :, 0]
    return _MEAN[len(kernel)](x, list(kernel), list(strides), divisor_override=1)


def pad(attrs: Attrs, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    """Numbers around a tensor; negative ones cut it."""
    along = list(range(x.ndim)) if axes is None else [a % x.ndim for a in axes.tolist()]
    given = pads.tolist()
    begin, end = [0] * x.ndim, [0] * x.ndim
    for i, axis in enumerate(along):
        begin[axis], end[axis] = given[i], given[i + len(along)]
    mode = attrs.get("mode", "constant")
    if mode == "constant":
        return _padded(x, begin, end, 0.0 if value is None else float(value))
    for axis in range(x.ndim):
        x = x.index_select(axis, _beyond(x.shape[axis], begin[axis], end[axis], mode).to(x.device))
    return x


def _beyond(size: int, begin: int, end: int, mode: str) -> Tensor:
    """Which entries of an axis stand where numbers are added."""
    index = torch.arange(-begin, size + end)
    if mode == "edge":
        return index.clamp(0, size - 1)
    if mode == "wrap":
        return index % size
    period = max(2 * (size - 1), 1)
    folded = index % period
    return torch.where(folded < size, folded, period - folded)


def resize(
    attrs: Attrs, x: Tensor, region: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    """Nearest or linear interpolation over space, in the coordinates that PyTorch has too.

    Raises:
        Unusual: anything else.
    """
    mode, coordinates = attrs.get("mode", "nearest"), attrs.get("coordinate_transformation_mode", "half_pixel")
    by = None if scales is None or not scales.numel() else scales.tolist()
    given = (
        [n * s for n, s in zip(x.shape, by, strict=False)]
        if by is not None
        else []
        if sizes is None
        else sizes.tolist()
    )
    wanted = [int(n) for n in given]
    if (
        "axes" in attrs
        or wanted[:2] != list(x.shape[:2])
        or attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch"
    ):
        raise Unusual("other axes than those of space")
    if mode == "nearest" and coordinates in ("asymmetric", "half_pixel", "pytorch_half_pixel"):
        return _nearest(x, wanted[2:], by, coordinates, attrs.get("nearest_mode", "round_prefer_floor"))
    exact = wanted == given and not attrs.get("antialias", 0) and min(wanted) > 1
    names = {3: "linear", 4: "bilinear", 5: "trilinear"}
    if mode == "linear" and exact and coordinates in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        return F.interpolate(x, wanted[2:], mode=names[x.ndim], align_corners=coordinates == "align_corners")
    raise Unusual(f"{mode} in {coordinates}")


def _nearest(x: Tensor, wanted: Sequence[int], scales: Sequence[float] | None, coordinates: str, how: str) -> Tensor:
    rounded = {
        "floor": torch.floor, "ceil": torch.ceil, "round_prefer_floor": lambda p: torch.ceil(p - 0.5),
        "round_prefer_ceil": lambda p: torch.floor(p + 0.5),
    }  # fmt: skip
    for axis, size in enumerate(wanted, start=2):
        scale = size / x.shape[axis] if scales is None else scales[axis]
        place = torch.arange(size, dtype=torch.float64)
        place = place / scale if coordinates == "asymmetric" else (place + 0.5) / scale - 0.5
        x = x.index_select(axis, rounded[how](place).long().clamp(0, x.shape[axis] - 1).to(x.device))
    return x
