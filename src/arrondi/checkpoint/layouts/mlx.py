"""The layout of MLX, Apple's array library, which mlx-lm and its relatives read.

Owns: `LAYOUT`. Of a weight P.weight (m outputs, n inputs) in groups of g columns:

    P.weight   uint32 (m, n·b/32)   codes of b bits, a bit stream along each row, the first in the lowest bits
    P.scales   float (m, n/g)       of the mode "affine"; uint8 of the others: the exponent + 127 (mxfp4, mxfp8), or an fp8_e4m3 number (nvfp4)
    P.biases   float (m, n/g)       of "affine" alone: x = scale · code + bias

config.json has the mode, the size of groups and the bits under `quantization` (`quantization_config` says the same), and beside them the paths of
modules that differ, each with its own, or false where it is not quantized. Codes of one bit are read as uint2. The nvfp4 of MLX has no
scale for a whole tensor, which our scheme of that name has: it is read with the scale 1, and not written.

Source: MLX 0.32, documentation of `mlx.core.quantize`; mlx-lm 0.31, `utils.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch

from arrondi.checkpoint.containers.config import QUANTIZATION
from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.beside import FLOATS, check_beside, groups_of, shape_of
from arrondi.checkpoint.layouts.checks import checked
from arrondi.checkpoint.layouts.claims import Claims
from arrondi.checkpoint.layouts.classes import module_classes
from arrondi.checkpoint.layouts.layout import LayerValues, Layout, ModelFacts, Names, Placed, Reader
from arrondi.checkpoint.layouts.words import pack_across, unpack_across
from arrondi.errors import FileFormatError
from arrondi.formats import FORMATS, LayerScheme, PerGroup, PerTensor, Scheme
from arrondi.formats.scheme import PLAIN
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import STORED
from arrondi.tensor.storage import load_scale, store_scale

_AFFINE: Final = "affine"
_BITS: Final = (1, 2, 3, 4, 5, 6, 8)
_SIZES: Final = (32, 64, 128)
_FLOATING: Final[Mapping[str, Scheme]] = {
    "mxfp4": Scheme(FORMATS["fp4_e2m1"], PerGroup(32), scale="e8m0"),
    "mxfp8": Scheme(FORMATS["fp8_e4m3"], PerGroup(32), scale="e8m0"),
    "nvfp4": Scheme(FORMATS["fp4_e2m1"], PerGroup(16), scale=Scheme(FORMATS["fp8_e4m3"], PerTensor())),
}
"""Mode → what a weight in it is; of "affine" the tensors say it."""

_Words = tuple[int, int, str]
"""Size of groups, bits and mode."""


def _refuse(placed: Placed) -> str | None:
    scheme, weights = placed.scheme, placed.scheme.weights
    if placed.kind not in ("Linear", "Embedding") or len(placed.shape) != 2 or placed.transposed:
        return f"mlx stores the weights of linear layers and tables, and this is of kind {placed.kind} and shape {placed.shape}"
    if not placed.name.endswith(".weight") or (scheme.inputs, scheme.outputs, scheme.kv) != (None, None, None):
        return "mlx rounds weights alone, no inputs, outputs or caches"
    if placed.indexed or weights.apart is not None:
        return "mlx has no scattered groups, and keeps nothing apart"
    size = weights.granularity.size if isinstance(weights.granularity, PerGroup) else 0
    if weights not in (_FLOATING["mxfp4"], _FLOATING["mxfp8"]):
        if (
            weights.format.name not in [f"uint{b}" for b in _BITS]
            or weights.zero_point != "float"
            or size not in _SIZES
        ):
            return f"mlx stores unsigned integers with offsets in groups of 32, 64 or 128, MXFP4A16 and MXFP8A16, not {weights}"
        if weights.scale not in PLAIN or weights.scale != weights.offset:
            return f"mlx has plain scales and offsets of one type, not {weights}"
    if placed.matrix_shape[1] % size:
        return f"mlx has no shorter last group: {size} does not divide {placed.matrix_shape[1]}"
    return None


def _fit(scheme: LayerScheme) -> LayerScheme:
    """Offsets have the type of the scales."""
    weights = scheme.weights
    if weights.zero_point != "float" or isinstance(weights.scale, Scheme) or weights.scale == "e8m0":
        return scheme
    return replace(scheme, weights=replace(weights, offset=weights.scale))


def _mode(weights: Scheme) -> str:
    return next((mode for mode, scheme in _FLOATING.items() if scheme == weights), _AFFINE)


def _words(placed: Placed) -> _Words:
    weights = placed.scheme.weights
    assert isinstance(weights.granularity, PerGroup)
    return weights.granularity.size, int(placed.storage or weights.format.bits), _mode(weights)


def _specs(placed: Placed) -> list[TensorSpec]:
    path, weights, (rows, columns) = placed.name.removesuffix(".weight"), placed.scheme.weights, placed.matrix_shape
    size, bits, mode = _words(placed)
    grid, affine = (rows, columns // size), mode == _AFFINE
    found: list[TensorSpec] = [
        (placed.name, torch.uint32, (rows, columns * bits // 32)),
        (f"{path}.scales", STORED[str(weights.scale)] if affine else torch.uint8, grid),
    ]
    return [*found, (f"{path}.biases", STORED[str(weights.offset)], grid)] if affine else found


def _write(placed: Placed, values: LayerValues) -> dict[str, torch.Tensor]:
    path, q, bits = placed.name.removesuffix(".weight"), values.weight, _words(placed)[1]
    tensors = {placed.name: pack_across(q.codes, bits).view(torch.uint32)}
    if q.real_offset is None:
        return tensors | {f"{path}.scales": store_scale(q.real_scale, "e8m0")}
    scale, offset = q.real_scale, q.real_offset
    return tensors | {
        f"{path}.scales": scale.to(STORED[str(q.scheme.scale)]),
        f"{path}.biases": offset.to(STORED[str(q.scheme.offset)]),
    }


def _read(placed: Placed, read: Reader) -> LayerValues:
    path, weights, columns = placed.name.removesuffix(".weight"), placed.scheme.weights, placed.matrix_shape[1]
    codes = unpack_across(placed.name, read(placed.name).view(torch.int32), _words(placed)[1], columns)
    stored = read(f"{path}.scales")
    scale: torch.Tensor | QTensor = load_scale(stored)
    if isinstance(weights.scale, Scheme):
        scale = QTensor(stored, torch.ones(1, 1), None, None, weights.scale)
    offset = read(f"{path}.biases").float() if weights.zero_point == "float" else None
    return LayerValues(checked(placed.name, QTensor(codes, scale, None, offset, weights)))


def _config(placed: list[Placed], kept: list[str], facts: ModelFacts = ModelFacts()) -> dict[str, Any]:
    words = [_words(p) for p in placed]
    base = Counter(words).most_common(1)[0][0]
    others = {p.path: _said(w) for p, w in zip(placed, words, strict=True) if w != base}
    return {"quant_method": "mlx", **_said(base), **others}


def _said(words: _Words) -> dict[str, Any]:
    return dict(zip(("group_size", "bits", "mode"), words, strict=True))


def _read_config(config: Mapping[str, Any]) -> tuple[_Words, dict[str, _Words | None]]:
    """What config.json says of all layers, and of some, by path; None: that one is not quantized.

    Raises:
        FileFormatError: a key that is not known, a value that cannot be, or two descriptions that differ.
    """
    found = {key: {k: v for k, v in config[key].items() if k != "quant_method"} for key in QUANTIZATION if isinstance(config.get(key), dict)}  # fmt: skip
    key, said = next(reversed(found.items()))
    if any(other != said for other in found.values()):
        raise FileFormatError("config.json says one thing under quantization and another under quantization_config. Remove the one that is wrong.")  # fmt: skip
    known = ("group_size", "bits", "mode")
    base = _own({k: v for k, v in said.items() if k in known}, key, None)
    paths: dict[str, _Words | None] = {}
    for path, own in said.items():
        if path not in known and not isinstance(own, dict | bool):
            raise FileFormatError(
                f"{key} has the key {path[:60]!r}, which is not known here. Remove it, or update arrondi."
            )
        if path not in known:
            paths[path] = _own(own, f"{key}.{path[:60]}", base) if isinstance(own, dict) else base if own else None
    return base, paths


def _own(said: object, where: str, base: _Words | None) -> _Words:
    claims = Claims(said, where)
    mode = claims.word("mode", _AFFINE, [_AFFINE, *_FLOATING])
    scheme = _FLOATING.get(mode)
    if scheme is None:
        words = claims.number("group_size", base and base[0], _SIZES), claims.number("bits", base and base[1], _BITS)
    else:
        assert isinstance(scheme.granularity, PerGroup)
        size, bits = scheme.granularity.size, scheme.format.bits
        words = claims.number("group_size", size, [size]), claims.number("bits", bits, [bits])
    claims.done()
    return *words, mode


def _find(config: Mapping[str, Any], names: Names, read: Reader) -> list[Placed]:
    base, paths = _read_config(config)
    classes = module_classes(config)
    placed = []
    for path in groups_of(names, ("scales", "biases"), ("weight", "scales")):
        words = paths.pop(path, base)
        if words is None:
            raise FileFormatError(f"config.json says that {path} is not quantized, but it is stored so.")
        placed.append(_place(path, words, "Embedding" if "Embedding" in classes.get(path, []) else "Linear", names))
    lost = next((path for path, words in paths.items() if words is not None), None)
    if lost is not None:
        raise FileFormatError(f"config.json says how {lost[:60]} is quantized, but {lost[:60]}.scales is not stored.")
    check_beside(placed, [s for p in placed for s in _specs(p)], names)
    stray = next((n for n, (dtype, _) in names.items() if dtype == "U32" and n not in {p.name for p in placed}), None)
    if stray is not None:
        raise FileFormatError(f"{stray} holds packed codes, and {stray.rpartition('.')[0]}.scales is not stored.")
    return placed


def _place(path: str, words: _Words, kind: str, names: Names) -> Placed:
    size, bits, mode = words
    if len(names[f"{path}.weight"][1]) == 3:
        raise FileFormatError(f"{path}.weight is a stack of experts under the names of mlx-lm, which are not read here. Give the original model.")  # fmt: skip
    rows, groups = shape_of(names, f"{path}.scales", 2)
    weights = _FLOATING.get(mode)
    if weights is None:
        kinds = {}
        for leaf in ("scales", "biases"):
            stored = names.get(f"{path}.{leaf}", ("nothing", ()))[0]
            if stored not in FLOATS:
                raise FileFormatError(f"{path}.{leaf} should hold floating-point numbers, found {stored}.")
            kinds[leaf] = FLOATS[stored]
        format = FORMATS[f"uint{max(bits, 2)}"]
        scale, offset = str(kinds["scales"]), str(kinds["biases"])
        weights = Scheme(format, PerGroup(size), "float", scale=scale, offset=offset)  # type: ignore[arg-type]
    return Placed(
        f"{path}.weight", (rows, groups * size), LayerScheme(weights), kind=kind, storage="1" if bits == 1 else ""
    )


LAYOUT: Final = Layout("mlx", _refuse, _specs, _write, _read, _config, _find, _fit, keys=QUANTIZATION)
