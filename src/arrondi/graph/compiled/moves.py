"""Values that only move, and tables: how an operator moves numbers is found by giving it their places instead of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from arrondi.graph.codes import tensor_of
from arrondi.graph.compiled.builder import Builder
from arrondi.graph.compiled.room import Held, strides_of
from arrondi.graph.integers import qlinear_concat
from arrondi.graph.ir import Node
from arrondi.graph.ops import evaluate

Array = np.ndarray


def passes(b: Builder, node: Node) -> bool:
    """Other shapes of the same numbers in the same order."""
    x = b.value(node.inputs[0])
    if x is None or any(n and n not in b.constants for n in node.inputs[1:]):
        return False
    if node.op == "Identity":
        b.alias(node.outputs[0], x)
        return True
    shape = b.shapes[node.outputs[0]][0]
    to = b.constants[node.inputs[1]].reshape(-1) if node.op == "Reshape" else np.zeros(1)
    b.batched &= bool(shape) and shape[0] == x.shape[0] and bool(to.size) and to[0] in (0, -1)
    if x.last and not x.either:
        y = b.new(node.outputs[0], x.codes, x.signed, last=False)
        b.move(x, y, x.shape, x.strides(), strides_of(x.shape, False))
    else:
        b.alias(node.outputs[0], replace(x, last=False))
    return True


def index_moves(b: Builder, node: Node) -> bool:
    """Any operator that moves numbers, perhaps among others that are all alike."""
    x = b.value(node.inputs[0])
    if x is None or not x.numel or any(n and n not in b.constants for n in node.inputs[1:]):
        return False
    fill = 0
    rest = [tensor_of(b.constants[n]) if n else None for n in node.inputs[1:]]
    if node.op == "Pad":
        if not x.codes and len(rest) > 1 and rest[1] is not None and float(rest[1]):
            return False
        fill = x.up + (int(rest[1]) if x.codes and len(rest) > 1 and rest[1] is not None else 0)
        rest[1:2] = [torch.tensor(-1)]
    if node.op == "Resize" and node.attrs.get("mode", "nearest") != "nearest":
        return False
    places = torch.arange(x.numel).as_strided(x.shape, strides_of(x.shape, x.last))
    found = evaluate(node, [places.contiguous(), *rest], b.graph.opset)
    for name, part in zip(node.outputs, found, strict=False):
        if name:
            y = b.new(name, x.codes, x.signed, last=x.last)
            _index_move(b, x, y, part.numpy(), fill)
    return True


def _index_move(b: Builder, x: Held, y: Held, places: Array, fill: int) -> None:
    """y[i] = x[places[i]], the fill where that is negative; as strides where they say it."""
    if x.shape[0] != y.shape[0] or ((places >= 0).any() and not _own_sample(places, x)):
        b.batched = False
    inner = _box(places)
    if inner is not None:
        part = places[tuple(slice(f, t) for f, t in inner)]
        come = [
            int(np.take(part, min(1, n - 1), axis).flat[0]) - int(part.flat[0]) for axis, n in enumerate(part.shape)
        ]
        line = part.flat[0] + sum(i * s for i, s in zip(np.ogrid[tuple(map(slice, part.shape))], come, strict=True))
        if (line == part).all():
            go = y.strides()
            to = sum(f * s for (f, _), s in zip(inner, go, strict=True))
            whole = part.size == places.size
            b.move(x, y, part.shape, come, go, int(part.flat[0]), to, None if whole else fill)
            return
    flat = places.transpose([0, *range(2, places.ndim), 1]) if y.last else places
    index32 = b.keep(flat.reshape(-1).astype(np.int32))
    b.plan.gather(x.room.slot, y.room.slot, y.size, places.size, index32, fill)


def _own_sample(places: Array, x: Held) -> bool:
    """Whether what sample i gets comes from sample i."""
    per = x.numel // x.shape[0]
    sample = places // per
    own = np.arange(len(places)).reshape(-1, *[1] * (places.ndim - 1))
    return bool(((sample == own) | (places < 0)).all())


def _box(places: Array) -> list[tuple[int, int]] | None:
    """The box of places that are not negative, if there are no others in it."""
    inside = places >= 0
    if not inside.any():
        return None
    found = []
    for axis in range(places.ndim):
        hits = np.flatnonzero(inside.any(tuple(a for a in range(places.ndim) if a != axis)))
        found.append((int(hits[0]), int(hits[-1]) + 1))
    return found if inside[tuple(slice(f, t) for f, t in found)].all() else None


def table_step(b: Builder, x: Held, name: str, codes: Array, signed: bool) -> None:
    """y = codes[x], both as they lie in memory."""
    y = b.new(name, True, signed, last=x.last)
    b.plan.table(x.room.slot, y.room.slot, x.numel, b.keep(codes.astype(np.uint8)))


def looks_up(b: Builder, node: Node) -> bool:
    """A Cast and the Gather that alone reads it: a table of 256 codes."""
    after = b.graph.only_reader(node.outputs[0])
    x = b.value(node.inputs[0])
    if x is None or not x.codes or after is None or after.op != "Gather" or node.attrs.get("to") not in (6, 7):
        return False
    table = b.constants.get(after.inputs[0])
    if table is None or table.shape != (256,) or table.dtype not in (np.uint8, np.int8) or after.attrs.get("axis", 0) or after.inputs[1] != node.outputs[0]:  # fmt: skip
        return False
    signed = table.dtype == np.int8
    at = (np.arange(256) - x.up) % 256
    table_step(b, x, after.outputs[0], table.view(np.uint8)[at] ^ (128 if signed else 0), signed)
    b.skipped = {after.name}
    return True


def joins(b: Builder, node: Node) -> bool:
    """QLinearConcat: each part through a table where its grid is another, then to its place."""
    grid = [b.constants.get(n) for n in node.inputs[:2]]
    sy, zy = grid
    if sy is None or zy is None:
        return False
    signed = zy.dtype == np.int8
    parts: list[tuple[Held, Array | None]] = []
    for name, scale_name, zero_name in zip(*(node.inputs[2 + i :: 3] for i in range(3)), strict=True):
        held, scale, zero = b.value(name), b.constants.get(scale_name), b.constants.get(zero_name)
        if held is None or scale is None or zero is None or not held.codes or held.signed != (zero.dtype == np.int8):
            return False
        parts.append((held, _regrid(held, scale, zero, sy, zy)))
    y = b.new(node.outputs[0], True, signed)
    axis = node.attrs["axis"] % len(y.shape)
    b.batched &= axis != 0
    go, at = y.strides(), 0
    for held, table in parts:
        given = held
        if table is not None:
            given = b.scratch(held.shape, held, held.last)
            b.plan.table(held.room.slot, given.room.slot, held.numel, b.keep(table))
        b.move(given, y, held.shape, held.strides(), go, 0, at * go[axis])
        at += held.shape[axis]
        if given is not held:
            b.rooms.leave(given.room)
    return True


def _regrid(held: Held, scale: Array, zero: Array, sy: Array, zy: Array) -> Array | None:
    """The output's code in memory of every code in memory; None where it is the same."""
    codes = torch.from_numpy((np.arange(256) ^ held.up).astype(np.uint8).view(zero.dtype).copy())
    made = qlinear_concat({"axis": 0}, *(tensor_of(v) for v in (sy, zy)), codes, *(tensor_of(v) for v in (scale, zero)))
    table: Array = made.numpy().view(np.uint8) ^ (128 if zy.dtype == np.int8 else 0)
    return None if (table == np.arange(256)).all() else table.astype(np.uint8)
