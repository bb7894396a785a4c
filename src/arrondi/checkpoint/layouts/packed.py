"""Arrondi's own layout: any scheme, for what no other layout can hold (NF4, ternary, float zero points, stacks of experts).

Owns: `LAYOUT`. A tensor `N` becomes `N.codes` (uint8, one little-endian bit stream a row, `arrondi.tensor.packing`), `N.scale`, and,
where the scheme asks for them, `N.zero_point` (uint8, code - qmin) and `N.offset` (float32). Scales
that are quantized in turn are `N.scale.codes` and `N.scale.scale`. A stack (E, a, b) is stored as the matrix (E·a, b). The
`quantization_config` lists every tensor with its shape and its scheme in the compact grammar.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.layout import Layout, Placed
from arrondi.errors import ArrondiError, FileFormatError
from arrondi.formats import LayerScheme, Scheme, parse_scheme, scale_shape
from arrondi.tensor.packing import pack, packed_width, unpack
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import STORED
from arrondi.tensor.storage import load_scale, store_scale


def _refuse(scheme: LayerScheme, name: str, shape: tuple[int, ...]) -> str | None:
    try:
        back = _parse(_text(scheme))
    except ArrondiError:
        back = None
    return None if back == scheme else f"the scheme {scheme} has no name by which a file could refer to it"


def _text(scheme: LayerScheme) -> str:
    """The scheme as the config spells it."""
    return str(scheme)


def _parse(text: str) -> LayerScheme:
    return parse_scheme(text)


def _part_specs(name: str, shape: tuple[int, ...], scheme: Scheme) -> list[TensorSpec]:
    groups = scale_shape(scheme.granularity, shape)
    width = packed_width(shape[-1], scheme.format.bits)
    specs: list[TensorSpec] = [(f"{name}.codes", torch.uint8, (*shape[:-1], width))]
    if isinstance(scheme.scale, Scheme):
        specs += _part_specs(f"{name}.scale", groups, scheme.scale)
    else:
        specs.append((f"{name}.scale", torch.uint8 if scheme.scale == "e8m0" else STORED[scheme.scale], groups))
    if scheme.zero_point == "integer":
        specs.append((f"{name}.zero_point", torch.uint8, groups))
    if scheme.zero_point == "float":
        specs.append((f"{name}.offset", torch.float32, groups))
    return specs


def _part_write(name: str, q: QTensor) -> dict[str, torch.Tensor]:
    low = q.scheme.format.qmin
    tensors = {f"{name}.codes": pack(q.codes, q.scheme.format.bits, lowest=low)}
    if isinstance(q.scale, QTensor):
        tensors |= _part_write(f"{name}.scale", q.scale)
    else:
        tensors[f"{name}.scale"] = store_scale(q.scale, str(q.scheme.scale))
    if q.zero_point is not None:
        tensors[f"{name}.zero_point"] = (q.zero_point - low).to(torch.uint8)
    if (offset := q.real_offset) is not None:
        tensors[f"{name}.offset"] = offset
    return tensors


def _part_read(name: str, shape: tuple[int, ...], scheme: Scheme, read: Callable[[str], torch.Tensor]) -> QTensor:
    low = scheme.format.qmin
    codes = unpack(read(f"{name}.codes"), scheme.format.bits, shape[-1], lowest=low)
    groups = scale_shape(scheme.granularity, shape)
    scale: torch.Tensor | QTensor
    if isinstance(scheme.scale, Scheme):
        scale = _part_read(f"{name}.scale", groups, scheme.scale, read)
    else:
        scale = load_scale(read(f"{name}.scale"))
    zero = read(f"{name}.zero_point").int() + low if scheme.zero_point == "integer" else None
    offset = read(f"{name}.offset") if scheme.zero_point == "float" else None
    return QTensor(codes, scale, zero, offset, scheme)


def _config(placed: list[Placed], kept: list[str], classes: Mapping[str, str], whole: bool = False) -> dict[str, Any]:
    return {
        "quant_method": "arrondi",
        "version": 1,
        "ignore": kept,
        "tensors": {p.name: {"shape": list(p.shape), "scheme": _text(p.scheme)} for p in placed},
    }


def _find(
    config: Mapping[str, Any], names: Mapping[str, tuple[str, tuple[int, ...]]], read: Callable[[str], torch.Tensor]
) -> list[Placed]:
    try:
        if config["version"] != 1:
            raise FileFormatError(
                f"This checkpoint is of version {config['version']} of arrondi's layout; this release reads 1. Update arrondi."
            )
        return [
            Placed(name, tuple(int(n) for n in facts["shape"]), _parse(facts["scheme"]))
            for name, facts in config["tensors"].items()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(
            f"quantization_config of arrondi cannot be read: {type(error).__name__} {error}."
        ) from error


def _notes(placed: list[Placed], classes: Mapping[str, str], whole: bool = False) -> list[str]:
    return []


LAYOUT: Final = Layout(
    "arrondi",
    "arrondi",
    _refuse,
    lambda placed: _part_specs(placed.name, placed.matrix_shape, placed.scheme.weights),
    lambda placed, q: _part_write(placed.name, q),
    lambda placed, read: _part_read(placed.name, placed.matrix_shape, placed.scheme.weights, read),
    _config,
    _find,
    _notes,
)
