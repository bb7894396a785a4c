"""Copies of outputs with one tensor wrong, as a writer that errs would have left it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Change = Callable[[np.ndarray], np.ndarray]


def next_nibbles(codes: np.ndarray) -> np.ndarray:
    """Every packed word holds what the one before it should."""
    return np.roll(codes, 1, axis=-1)


def halves(heads: int) -> Change:
    """Rows of a projection in the order of the other convention for rotary embeddings: both halves of a head alternate."""

    def swapped(rows: np.ndarray) -> np.ndarray:
        parted = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
        return parted.swapaxes(1, 2).reshape(rows.shape)

    return swapped


def one_up(packed: np.ndarray) -> np.ndarray:
    """Every packed code of 4 bits, or zero point, one higher, where it is not the last."""
    words = np.ascontiguousarray(packed).view(np.uint8)
    low, high = np.minimum((words & 15) + 1, 15), np.minimum((words >> 4) + 1, 15)
    return (low | (high << 4)).astype(np.uint8).view(packed.dtype).reshape(packed.shape)


def in_directory(source: Path, out: Path, tensor: str, change: Change) -> Path:
    """A copy of a directory in which one tensor is changed."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    (name,) = [n for n in tensors if n.endswith(tensor)]
    tensors[name] = torch.from_numpy(np.ascontiguousarray(change(tensors[name].numpy())))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def in_gguf(source: Path, out: Path, tensor: str, change: Change) -> Path:
    """A copy of a GGUF file in which one tensor's rows of bytes are changed."""
    from gguf import GGUFReader

    shutil.copyfile(source, out)
    reader = GGUFReader(out, "r+")
    (held,) = [t for t in reader.tensors if t.name == tensor]
    held.data[:] = change(np.array(held.data))
    reader.data.flush()
    return out


def q4_0_one_up(rows: np.ndarray) -> np.ndarray:
    """As `one_up`, of rows of Q4_0 blocks: their scales stay."""
    blocks = rows.reshape(-1, 18).copy()
    blocks[:, 2:] = one_up(blocks[:, 2:])
    return blocks.reshape(rows.shape)


def in_onnx(source: Path, out: Path, constant: str, change: Change) -> Path:
    """A copy of an ONNX file in which one constant is changed."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(source)
    (held,) = [c for c in model.graph.initializer if c.name == constant]
    held.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(held)), constant))
    onnx.save(model, out)
    return out
