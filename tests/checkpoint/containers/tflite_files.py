"""A small TFLite file, built field by field: its tensors are weights of the usual operators, with grids of every kind.

Owns: `built` and `WEIGHTS`. What a field is called and where it stands is in schema.fbs of LiteRT.
"""

from __future__ import annotations

from typing import Any

import flatbuffers
import numpy as np

TYPES = {"float32": 0, "int32": 2, "uint8": 3, "int8": 9, "int4": 17, "float16": 1}
OPERATORS = {"conv": 3, "depthwise": 4, "full": 9, "table": 36}
_RNG = np.random.default_rng(0)


def _codes(low: int, high: int, *shape: int) -> np.ndarray:
    return _RNG.integers(low, high, shape)


def _scales(count: int) -> np.ndarray:
    return _RNG.uniform(0.001, 0.1, count).astype(np.float32)


WEIGHTS: dict[str, dict[str, Any]] = {
    "conv/kernel": {"op": "conv", "type": "int8", "codes": _codes(-127, 128, 6, 3, 3, 4), "scale": _scales(6), "axis": 0},
    "depthwise/kernel": {"op": "depthwise", "type": "int8", "codes": _codes(-127, 128, 1, 3, 3, 8), "scale": _scales(8), "axis": 3},
    "full/weight": {"op": "full", "type": "int8", "codes": _codes(-127, 128, 12, 10), "scale": _scales(12), "axis": 0},
    "full/old": {"op": "full", "type": "uint8", "codes": _codes(0, 256, 5, 7), "scale": _scales(1), "zero": np.array([131])},
    "full/narrow": {"op": "full", "type": "int4", "codes": _codes(-7, 8, 9, 15), "scale": _scales(9), "axis": 0},
    "full/bias": {"op": "full", "place": 2, "type": "int32", "codes": _codes(-9999, 9999, 12), "scale": _scales(12), "axis": 0},
    "words": {"op": "table", "place": 0, "type": "int8", "codes": _codes(-127, 128, 20, 6), "scale": _scales(1), "zero": np.array([-4])},
    "norm": {"op": "full", "place": 2, "type": "float32", "codes": _RNG.standard_normal(12).astype(np.float32)},
}  # fmt: skip
"""Name → operator, place among its inputs, type, codes, and grid."""


def meant(weight: dict[str, Any]) -> np.ndarray:
    """What the codes of a weight mean, by the rule of the format: scale · (code − zero)."""
    codes = weight["codes"]
    if "scale" not in weight:
        return np.asarray(codes)
    along = [-1 if i == weight.get("axis", 0) else 1 for i in range(codes.ndim)]
    scale = weight["scale"].reshape(along) if len(weight["scale"]) > 1 else weight["scale"][0]
    wide = np.float64 if weight["type"] == "int32" else np.float32
    return ((codes - weight.get("zero", np.array([0]))[0]).astype(wide) * scale.astype(wide)).astype(np.float32)


def built(weights: dict[str, dict[str, Any]] = WEIGHTS) -> bytes:
    """The file."""
    b = flatbuffers.Builder(1 << 14)
    buffers, tensors, operators, codes = [_table(b, {})], [], [], []
    for name, w in weights.items():
        raw = b.CreateByteVector(_bytes(w))
        buffers.append(_table(b, {0: raw}))
        grid = 0
        if "scale" in w:
            scale = b.CreateNumpyVector(w["scale"])
            zero = b.CreateNumpyVector(w.get("zero", np.zeros(len(w["scale"]), int)).astype(np.int64))
            grid = _table(b, {2: scale, 3: zero}, {6: ("Int32", w.get("axis", 0))})
        shape, text = b.CreateNumpyVector(np.array(w["codes"].shape, np.int32)), b.CreateString(name)
        tensors.append(_table(b, {0: shape, 3: text, **({4: grid} if grid else {})}, {1: ("Int8", TYPES[w["type"]]), 2: ("Uint32", len(buffers) - 1)}))  # fmt: skip
        inputs = np.full(w.get("place", 1) + 1, -1, np.int32)
        inputs[-1] = len(tensors) - 1
        read = b.CreateNumpyVector(inputs)
        operators.append(_table(b, {1: read}, {0: ("Uint32", len(codes))}))
        number = OPERATORS[w["op"]]
        codes.append(_table(b, {}, {0: ("Int8", number), 3: ("Int32", number)}))
    lists = [_list(b, part) for part in (tensors, operators)]
    graph = _table(b, {0: lists[0], 3: lists[1]})
    ends = {1: _list(b, codes), 2: _list(b, [graph]), 3: b.CreateString("made by hand"), 4: _list(b, buffers)}
    b.Finish(_table(b, ends, {0: ("Uint32", 3)}), b"TFL3")
    return bytes(b.Output())


def _bytes(w: dict[str, Any]) -> bytes:
    if w["type"] != "int4":
        return np.asarray(w["codes"], w["type"]).tobytes()
    flat = np.append(w["codes"].reshape(-1) & 15, 0).astype(np.uint8)
    even = flat[: len(flat) // 2 * 2]
    return bytes((even[::2] | even[1::2] << 4).tolist())


def _table(b: Any, offsets: dict[int, int], numbers: dict[int, tuple[str, int]] | None = None) -> int:
    b.StartObject(15)
    for slot, offset in offsets.items():
        b.PrependUOffsetTRelativeSlot(slot, offset, 0)
    for slot, (kind, value) in (numbers or {}).items():
        getattr(b, f"Prepend{kind}Slot")(slot, value, 0)
    return int(b.EndObject())


def _list(b: Any, offsets: list[int]) -> int:
    b.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        b.PrependUOffsetTRelative(offset)
    return int(b.EndVector())
