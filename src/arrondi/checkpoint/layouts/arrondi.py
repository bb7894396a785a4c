"""Arrondi's own layout: any scheme, for what no other layout can hold (NF4, ternary, float zero points, stacks of experts).

Owns: `LAYOUT`. A tensor `N` becomes `N.codes` (uint8, one little-endian bit stream a row, `arrondi.tensor.packing`), `N.scale`, and,
where the scheme asks for them, `N.zero_point` (uint8, code - qmin), `N.offset` and `N.group_index` (int32), `N.table` (tables, levels)
of a look-up format (int8 counts in steps of 1/128), `N.apart_index` (int32) and `N.apart_values` of what is kept apart, and `N.row_side` and
`N.column_side` (float16) of a turned tensor without a seed. Codes of a trellis are a bit stream a column. Scales and offsets that
are quantized in turn are `N.scale.codes`, `N.scale.scale` and so on. Static scales of inputs and outputs are `N.input_scale`,
`N.input_zero_point`, `N.input_offset`, and the same of outputs. Weights are always stored as the matrix (out, in); a stack (E, a, b) is
the matrix (E·a, b). The `quantization_config` lists every tensor with the shape of its plain form and its scheme in the compact
grammar, and says where it is stored transposed, under another module path, or of another kind than Linear; a digest guards it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

import torch

from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.checks import check_padding, checked, checked_grid
from arrondi.checkpoint.layouts.claims import check_described, check_ignored
from arrondi.checkpoint.layouts.layout import LayerValues, Layout, ModelFacts, Names, Placed, Reader
from arrondi.errors import ArrondiError, FileFormatError
from arrondi.formats import ActivationScheme, LayerScheme, Scheme, parse_scheme, scale_shape
from arrondi.formats.trellis import RING, SIDE
from arrondi.rewrite.spread import check_block
from arrondi.tensor.apart import Kept
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import STORED, Grid
from arrondi.tensor.storage import code_line, load_codes, load_scale, store_codes, store_scale, stored_shape
from arrondi.tensor.tables import load_table, store_table
from arrondi.tensor.trellis import refuse_shape
from arrondi.tensor.turned import Sides

_KEYS: Final = frozenset({"quant_method", "version", "ignore", "tensors", "digest"})
_SIDES: Final = ("row_side", "column_side")
_LONGEST: Final = 1000
"""Characters of a scheme; every real one has fewer."""
_FACTS: Final[Mapping[str, type]] = {
    "shape": list, "scheme": str, "module": str, "kind": str, "transposed": bool, "indexed": bool,
}  # fmt: skip


def _refuse(placed: Placed) -> str | None:
    trellis = placed.scheme.weights.format.trellis
    if trellis is not None and (reason := refuse_shape(placed.matrix_shape, trellis)) is not None:
        return reason[0].lower() + reason[1:].rstrip(".")
    if trellis is not None and placed.matrices > 1:
        tall = RING if trellis.ring == "rows" else SIDE
        if placed.matrix_shape[0] // placed.matrices % tall:
            return f"rings of {tall} rows do not end where the matrices of a stack do"
    try:
        back = parse_scheme(str(placed.scheme))
    except ArrondiError:
        back = None
    if back != placed.scheme:
        return f"the scheme {placed.scheme} has no name by which a file could refer to it"
    return None


# ── the weight ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _part_specs(name: str, shape: tuple[int, ...], scheme: Scheme) -> list[TensorSpec]:
    groups = scale_shape(scheme.granularity, shape)
    specs: list[TensorSpec] = [(f"{name}.codes", torch.uint8, stored_shape(shape, scheme.format))]
    specs += _grid_specs(f"{name}.scale", groups, scheme.scale)
    if scheme.zero_point == "integer":
        specs.append((f"{name}.zero_point", torch.uint8, groups))
    if scheme.zero_point == "float":
        specs += _grid_specs(f"{name}.offset", groups, scheme.offset)
    return specs


def _grid_specs(name: str, shape: tuple[int, ...], storage: str | Scheme) -> list[TensorSpec]:
    if isinstance(storage, Scheme):
        return _part_specs(name, shape, storage)
    return [(name, torch.uint8 if storage == "e8m0" else STORED[storage], shape)]


def _part_write(name: str, q: QTensor) -> dict[str, torch.Tensor]:
    low = q.scheme.format.qmin
    tensors = {f"{name}.codes": store_codes(q.codes, q.scheme.format)}
    tensors |= _grid_write(f"{name}.scale", q.scale, q.scheme.scale)
    if q.zero_point is not None:
        tensors[f"{name}.zero_point"] = (q.zero_point - low).to(torch.uint8)
    if q.offset is not None:
        tensors |= _grid_write(f"{name}.offset", q.offset, q.scheme.offset)
    return tensors


def _grid_write(name: str, values: torch.Tensor | QTensor, storage: str | Scheme) -> dict[str, torch.Tensor]:
    if isinstance(values, QTensor):
        return _part_write(name, values)
    return {name: store_scale(values, str(storage))}


def _part_read(
    name: str,
    shape: tuple[int, ...],
    scheme: Scheme,
    read: Reader,
    index: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    apart: Kept | None = None,
    sides: Sides | None = None,
) -> QTensor:
    low, packed = scheme.format.qmin, read(f"{name}.codes")
    check_padding(name, packed, *code_line(shape, scheme.format)[::-1])
    codes = load_codes(packed, shape, scheme.format)
    groups = scale_shape(scheme.granularity, shape)
    scale = _grid_read(f"{name}.scale", groups, scheme.scale, read)
    zero = read(f"{name}.zero_point").int() + low if scheme.zero_point == "integer" else None
    offset = _grid_read(f"{name}.offset", groups, scheme.offset, read) if scheme.zero_point == "float" else None
    return QTensor(codes, scale, zero, offset, scheme, index, table, apart, sides)


def _grid_read(name: str, shape: tuple[int, ...], storage: str | Scheme, read: Reader) -> torch.Tensor | QTensor:
    return _part_read(name, shape, storage, read) if isinstance(storage, Scheme) else load_scale(read(name))


# ── the layer ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _sides(scheme: LayerScheme) -> list[tuple[str, ActivationScheme, str]]:
    """The sides with static scales, and the storage type of these."""
    sides = {"input": scheme.inputs, "output": scheme.outputs}
    found = [(s, a) for s, a in sides.items() if a is not None and a.dynamic is not True]
    return [(s, a, "float32" if isinstance(a.scheme.scale, Scheme) else a.scheme.scale) for s, a in found]


def _specs(placed: Placed) -> list[TensorSpec]:
    name = placed.name
    specs = _part_specs(name, placed.matrix_shape, placed.scheme.weights)
    if placed.indexed:
        specs.append((f"{name}.group_index", torch.int32, (placed.matrix_shape[1],)))
    specs += _own_specs(placed)
    for side, activations, storage in _sides(placed.scheme):
        specs += _grid_specs(f"{name}.{side}_scale", (1, 1), storage)
        if activations.dynamic == "local":
            continue
        if activations.scheme.zero_point == "integer":
            specs.append((f"{name}.{side}_zero_point", torch.uint8, (1, 1)))
        if activations.scheme.zero_point == "float":
            specs += _grid_specs(f"{name}.{side}_offset", (1, 1), activations.scheme.offset)
    return specs


def _own_specs(placed: Placed) -> list[TensorSpec]:
    """Tables, and what is kept apart."""
    name, scheme, (rows, _) = placed.name, placed.scheme.weights, placed.matrix_shape
    specs: list[TensorSpec] = []
    if scheme.table is not None:
        stored = torch.int8 if scheme.table.stored == "int8" else STORED[scheme.table.stored]
        specs.append((f"{name}.table", stored, (scheme.table.count(rows), scheme.format.levels)))
    if scheme.apart is not None:
        columns, count = scheme.apart.what == "columns", scheme.apart.count
        specs.append((f"{name}.apart_index", torch.int32, (placed.matrices, count) if columns else (count,)))
        specs.append((f"{name}.apart_values", STORED[scheme.apart.stored], (rows, count) if columns else (count,)))
    if scheme.turned is not None and scheme.turned.seed is None:
        specs += [
            (f"{name}.{side}", torch.float16, (count,)) for side, count in zip(_SIDES, placed.matrix_shape, strict=True)
        ]
    return specs


def _write(placed: Placed, values: LayerValues) -> dict[str, torch.Tensor]:
    name, index = placed.name, values.weight.group_index
    tensors = _part_write(name, values.weight)
    assert (index is not None) == placed.indexed, f"{name}: the plan and the tensor differ about a group index"
    if index is not None:
        tensors[f"{name}.group_index"] = index.to(torch.int32)
    weight, scheme = values.weight, values.weight.scheme
    if weight.table is not None and scheme.table is not None:
        tensors[f"{name}.table"] = store_table(weight.table, scheme.table)
    if weight.apart is not None and scheme.apart is not None:
        tensors[f"{name}.apart_index"] = weight.apart.index
        tensors[f"{name}.apart_values"] = weight.apart.values.to(STORED[scheme.apart.stored])
    if weight.sides is not None:
        tensors |= {f"{name}.{side}": part.half() for side, part in zip(_SIDES, weight.sides, strict=True)}
    for side, activations, storage in _sides(placed.scheme):
        grid = values.inputs if side == "input" else values.outputs
        assert grid is not None, f"{name}: the scheme asks for a static scale of {side}s, and none is given"
        tensors[f"{name}.{side}_scale"] = store_scale(grid.scale.reshape(1, 1), storage)
        if grid.zero_point is not None:
            zero = grid.zero_point.reshape(1, 1) - activations.scheme.format.qmin
            tensors[f"{name}.{side}_zero_point"] = zero.to(torch.uint8)
        if grid.offset is not None:
            tensors |= _grid_write(f"{name}.{side}_offset", grid.offset.reshape(1, 1), activations.scheme.offset)
    return tensors


def _read(placed: Placed, read: Reader) -> LayerValues:
    name = placed.name
    scheme = placed.scheme.weights
    index = read(f"{name}.group_index") if placed.indexed else None
    table = load_table(read(f"{name}.table")) if scheme.table is not None else None
    kept = None
    if scheme.apart is not None:
        kept = Kept(read(f"{name}.apart_index"), read(f"{name}.apart_values").float())
    sides = None
    if scheme.turned is not None and scheme.turned.seed is None:
        sides = Sides(*(read(f"{name}.{side}").float() for side in _SIDES))
    q = _part_read(name, placed.matrix_shape, scheme, read, index, table, kept, sides)
    grids = {}
    for side, activations, _ in _sides(placed.scheme):
        low, zero, offset = activations.scheme.format.qmin, None, None
        if activations.dynamic is False and activations.scheme.zero_point == "integer":
            zero = read(f"{name}.{side}_zero_point").int() + low
        if activations.dynamic is False and activations.scheme.zero_point == "float":
            offset = load_scale(read(f"{name}.{side}_offset"))
        grid = Grid(load_scale(read(f"{name}.{side}_scale")), zero, offset)
        grids[side] = checked_grid(f"{name}.{side}_scale", grid, activations.scheme.format)
    return LayerValues(checked(name, q), grids.get("input"), grids.get("output"))


# ── the config ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _config(placed: list[Placed], kept: list[str], facts: ModelFacts = ModelFacts()) -> dict[str, Any]:
    tensors = {p.name: _facts(p) for p in placed}
    return {
        "quant_method": "arrondi",
        "version": 1,
        "ignore": list(dict.fromkeys(kept)),
        "tensors": tensors,
        "digest": digest(tensors),
    }


def digest(tensors: Mapping[str, Any]) -> str:
    """A hash of what the config says of the tensors.

    Many schemes fit the same bytes (int4 and uint4, NF4 and FP4), so a changed word would be read in silence as other numbers.
    """
    text = json.dumps(tensors, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _facts(p: Placed) -> dict[str, Any]:
    facts: dict[str, Any] = {"shape": list(p.shape), "scheme": str(p.scheme)}
    if p.path != p.name.removesuffix(".weight"):
        facts["module"] = p.module
    if p.kind != "Linear":
        facts["kind"] = p.kind
    return facts | {key: True for key in ("transposed", "indexed") if getattr(p, key)}


def _find(config: Mapping[str, Any], names: Names, read: Reader) -> list[Placed]:
    config = config["quantization_config"]
    version = config.get("version")
    if version != 1 or isinstance(version, bool):
        raise FileFormatError(
            f"this checkpoint is of version {version} of arrondi's layout; this release reads 1. Update arrondi."
        )
    unknown = sorted(str(k) for k in config.keys() - _KEYS)
    if unknown:
        raise FileFormatError(f"quantization_config has the key {unknown[0]!r}, which is not known here.")
    tensors = config.get("tensors")
    if not isinstance(tensors, Mapping):
        raise FileFormatError(f"tensors should be an object, found {type(tensors).__name__}.")
    check_ignored(config.get("ignore", []))
    placed = [_place(name, facts) for name, facts in tensors.items()]
    _check_neighbours(placed, names)
    if config.get("digest") != digest(tensors):
        raise FileFormatError(
            "digest does not belong to tensors: the config was changed, or is of an unfinished release."
        )
    return placed


def _check_neighbours(placed: list[Placed], names: Names) -> None:
    """Refuse a part of a quantized tensor that is not listed, or that its scheme does not have."""
    listed = {p.name for p in placed}
    consumed = {name for p in placed for name, _, _ in _specs(p)}
    for name in names.keys() - consumed:
        if name in listed:
            raise FileFormatError(f"{name} is stored plain as well as quantized.")
        parts = name.split(".")
        owner = next((o for i in range(1, len(parts)) if (o := ".".join(parts[:i])) in listed), None)
        if owner is not None:
            raise FileFormatError(f"{name} is stored beside the quantized {owner}, and its scheme has no such part.")
        if parts[-1] == "codes" or "weight" in parts[:-1]:
            raise FileFormatError(f"{name} is stored, but no tensor that is listed has such a part.")


def _place(name: str, facts: object) -> Placed:
    if not isinstance(facts, Mapping):
        raise FileFormatError(f"{name} should be described by an object, found {type(facts).__name__}.")
    check_described(name, facts, _FACTS)
    if not {"shape", "scheme"} <= facts.keys():
        raise FileFormatError(f"{name} lacks its shape or its scheme.")
    if len(facts["scheme"]) > _LONGEST:
        raise FileFormatError(f"{name} has a scheme of {len(facts['scheme'])} characters.")
    shape = facts["shape"]
    if len(shape) < 2 or not all(type(n) is int and 0 < n < 2**40 for n in shape):
        raise FileFormatError(f"{name} has the shape {shape!r}, which is no shape of a weight.")
    scheme = parse_scheme(facts["scheme"])
    placed = Placed(
        name,
        tuple(shape),
        scheme,
        facts.get("module", ""),
        facts.get("kind", "Linear"),
        facts.get("transposed", False),
        facts.get("indexed", False),
    )
    if scheme.inputs is not None:
        check_block(placed.matrix_shape[1], scheme.inputs.spread)
    return placed


LAYOUT: Final = Layout("arrondi", _refuse, _specs, _write, _read, _config, _find)
