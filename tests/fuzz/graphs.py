"""A fuzzer of the readers of graphs: `python -m tests.fuzz.graphs --seconds 60 --seed 1`.

Every mutant of a small ONNX or TFLite file either raises an ArrondiError of one line, or gives the numbers that a plain decoder finds in what the package
onnx parses of the mutant (of TFLite: the unmutated numbers, or bytes of the file). A traceback, a hang of more than five seconds and a number
that is silently another one are failures.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from arrondi.checkpoint import Checkpoint
from arrondi.checkpoint.containers.onnx.view import view_of
from arrondi.errors import ArrondiError
from tests.checkpoint.containers.onnx_nets import in_blocks, mlp
from tests.checkpoint.containers.tflite_files import built
from tests.fuzz.checkpoints import Result, limited

KINDS = ("onnx blocks", "onnx linear", "tflite")
_NUMBERS = (0, 1, -1, 2, 3, 4, 7, 8, 16, 31, 32, 48, 64, 255, 2**31, 2**40, 2**62, -(2**63))


def bases() -> dict[str, list[bytes]]:
    """Unmutated files of every kind."""
    cases = [(4, False), (4, True), (2, False), (8, True)]
    return {
        "onnx blocks": [in_blocks(mlp(), bits, symmetric).SerializeToString() for bits, symmetric in cases],
        "onnx linear": [
            in_blocks(mlp(), 4, symmetric, standard=True).SerializeToString() for symmetric in (True, False)
        ],
        "tflite": [built()],
    }


def mutant(raw: bytes, kind: str, rng: random.Random) -> bytes:
    """One to three mutations: of what the file says, or of its bytes."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        if kind != "tflite" and rng.random() < 0.7:
            raw = _said(raw, rng)
        else:
            raw = _bytes(raw, rng)
    return raw


def _bytes(raw: bytes, rng: random.Random) -> bytes:
    if not raw:
        return raw
    i = rng.randrange(len(raw) if rng.random() < 0.5 else min(len(raw), 600))
    kind = rng.randrange(5)
    if kind == 0:
        return raw[:i]
    if kind == 1:
        return raw[:i] + bytes([rng.randrange(256)]) + raw[i + 1 :]
    if kind == 2:
        return raw[:i] + raw[i + rng.randrange(1, 9) :]
    if kind == 3:
        return raw[:i] + raw[i : i + rng.randrange(1, 40)] + raw[i:]
    return raw[:i] + bytes([raw[i] ^ 1 << rng.randrange(8)]) + raw[i + 1 :]


def _said(raw: bytes, rng: random.Random) -> bytes:
    """An attribute, a shape, a type, a name or an input changed, or something removed or doubled."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(raw)
        return _changed(model, rng)
    except (
        DecodeError,
        UnicodeDecodeError,
    ):  # bytes that an earlier mutation has spoilt, which the package cannot name
        return raw


def _changed(model: Any, rng: random.Random) -> bytes:
    graph, kind = model.graph, rng.randrange(9)
    if not graph.node or not graph.initializer:
        return bytes(model.SerializeToString())
    node, tensor = rng.choice(list(graph.node)), rng.choice(list(graph.initializer))
    if kind == 0 and node.attribute:
        rng.choice(list(node.attribute)).i = rng.choice(_NUMBERS)
    elif kind == 1 and node.attribute:
        del node.attribute[rng.randrange(len(node.attribute))]
    elif kind == 2 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(_NUMBERS)
    elif kind == 3:
        tensor.data_type = rng.randrange(30)
    elif kind == 4 and node.input:
        names = [*node.input, *(t.name for t in graph.initializer), ""]
        node.input[rng.randrange(len(node.input))] = rng.choice(names)
    elif kind == 5:
        graph.initializer.remove(tensor)
    elif kind == 6:
        tensor.name = rng.choice([f"{tensor.name}x", "", rng.choice(list(graph.initializer)).name])
    elif kind == 7:
        node.op_type = rng.choice(["MatMul", "Gemm", "MatMulNBits", "DequantizeLinear", "Gather", "QLinearMatMul", "MatMulInteger", "Identity", "Transpose"])  # fmt: skip
    else:
        rng.shuffle(tensor.dims) if rng.random() < 0.5 else tensor.dims.append(rng.choice([1, 2]))
    return bytes(model.SerializeToString())


def plain_values(model: Any) -> dict[str, list[np.ndarray]]:
    """Constant of codes → what each operator that has them makes of them, by loops over its definition; (out, in) of MatMulNBits."""
    held = {t.name: t for t in model.graph.initializer}
    found: dict[str, list[np.ndarray]] = {}
    for node in model.graph.node:
        attrs = {a.name: a.i for a in node.attribute}
        with (
            contextlib.suppress(KeyError, ValueError, IndexError, TypeError),
            np.errstate(all="ignore"),
        ):  # which nobody can decode
            if node.op_type == "MatMulNBits" and node.input[1] in held:
                found.setdefault(node.input[1], []).append(_blocks(node, attrs, held))
            elif node.op_type == "DequantizeLinear" and node.input[0] in held:
                found.setdefault(node.input[0], []).append(_linear(node, attrs, held))
    return found


def _blocks(node: Any, attrs: dict[str, int], held: dict[str, Any]) -> np.ndarray:
    rows, columns, bits, block = attrs["N"], attrs["K"], attrs.get("bits", 4), attrs["block_size"]
    if bits not in (2, 4, 8) or not 0 < block < 2**20 or not 0 < rows * columns < 2**20:
        raise ValueError("no weight of these files")
    count = -(-columns // block)
    raw = numpy_helper.to_array(held[node.input[1]]).reshape(rows, -1)
    scale = numpy_helper.to_array(held[node.input[2]]).reshape(rows, count).astype(np.float32)
    zero = np.full((rows, count), 2 ** (bits - 1))
    if len(node.input) > 3 and node.input[3]:
        packed = numpy_helper.to_array(held[node.input[3]]).reshape(rows, -1)
        if packed.dtype != np.uint8:
            zero = packed.reshape(rows, count)
        else:
            zero = np.array([[packed[r, g * bits // 8] >> g * bits % 8 & 2**bits - 1 for g in range(count)] for r in range(rows)])  # fmt: skip
    values = np.zeros((rows, columns), np.float32)
    for c in range(columns):
        code = raw[:, c * bits // 8] >> c * bits % 8 & 2**bits - 1
        values[:, c] = (code.astype(np.float32) - zero[:, c // block]) * scale[:, c // block]
    return values


def _linear(node: Any, attrs: dict[str, int], held: dict[str, Any]) -> np.ndarray:
    codes = numpy_helper.to_array(held[node.input[0]]).astype(np.float32)
    axis, block = attrs.get("axis", 1), attrs.get("block_size", 0)
    parts = [numpy_helper.to_array(held[n]).astype(np.float32) for n in node.input[1:3] if n]
    if block < 0 or block > 2**20:
        raise ValueError("no block of these files")
    for i, part in enumerate(parts):
        if block:
            part = np.repeat(part, block, axis)
            parts[i] = np.take(part, np.arange(codes.shape[axis]), axis)
        elif part.size > 1:
            parts[i] = part.reshape([-1 if a == axis % codes.ndim else 1 for a in range(codes.ndim)])
        else:
            parts[i] = part.reshape(())
    return np.asarray((codes - parts[1] if len(parts) > 1 else codes) * parts[0], np.float32)


def verdict(raw: bytes, kind: str, folder: Path) -> str | None:
    """What is wrong with how a mutant is read, None if nothing is."""
    path = folder / ("m.tflite" if kind == "tflite" else "m.onnx")
    path.write_bytes(raw)
    try:
        checkpoint = Checkpoint.open(path)
        checkpoint.verify()
        dense = {name: checkpoint.dense(name) for name in checkpoint.names}
    except ArrondiError as error:
        return None if "\n" not in str(error) else f"a message of several lines: {error}"
    except Exception:
        return "a traceback: " + traceback.format_exc(limit=-3)
    if kind == "tflite":
        return None
    model = onnx.ModelProto()
    try:
        model.ParseFromString(raw)
    except DecodeError:
        return None  # onnx's parser also checks texts and fields that nobody here asks for
    expected = plain_values(model)
    for name, (_, stored) in view_of(path).found.holders.items():
        ours = dense[name].numpy()
        theirs = expected.get(stored["_quantized"], [])
        zero = checkpoint.placed[name].scheme.weights.zero_point if name in checkpoint.placed else "none"
        if not any(_same(ours, t, zero == "float") or _same(ours, t.T, zero == "float") for t in theirs):
            return f"{name} has other numbers than a plain decoder gives"
    return None


def _same(ours: np.ndarray, theirs: np.ndarray, rounded: bool) -> bool:
    """The same numbers; zero points that are no codes are kept as offsets, which may round the last bit otherwise."""
    if ours.shape != theirs.shape:
        return False
    most = float(np.abs(theirs).max(initial=0)) if rounded else 0.0
    return bool((np.abs(ours - theirs) <= 2e-7 * most).all()) if rounded else np.array_equal(ours, theirs)


def run(seed: int, mutants: int, seconds: float, kinds: tuple[str, ...] = KINDS) -> Result:
    """As many mutants of every kind as asked for, or as the time allows."""
    result, files, stop = Result(read=Counter()), bases(), time.monotonic() + seconds
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for number in range(mutants):
            for kind in kinds:
                if time.monotonic() > stop:
                    return result
                key = f"{seed}-{kind}-{number}"
                rng = random.Random(key)
                raw = mutant(rng.choice(files[kind]), kind, rng)
                with limited(5):
                    wrong = verdict(raw, kind, Path(folder))
                result.mutants += 1
                result.read[kind] += 1
                if wrong:
                    result.failures.append(f"{key}: {wrong}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutants", type=int, default=1_000_000, help="of every kind")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--kind", choices=KINDS, action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = run(options.seed, options.mutants, options.seconds, tuple(options.kind or KINDS))
    for failure in result.failures[:20]:
        print(failure, file=sys.stderr)
    counts = ", ".join(f"{n} {kind}" for kind, n in result.read.items())
    print(f"{result.mutants} mutants ({counts}), {len(result.failures)} failures, seed {options.seed}")
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
