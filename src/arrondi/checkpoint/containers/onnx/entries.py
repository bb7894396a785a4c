"""Constants of an ONNX file as entries of a model directory: `entry_of`, `scaled_entry` and `value_of`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from arrondi.checkpoint.containers.numbers import Numbers
from arrondi.checkpoint.containers.onnx.header import NARROW, Constant
from arrondi.checkpoint.containers.tensor_file import DTYPES, Entry, read_tensor
from arrondi.errors import FileFormatError
from arrondi.tensor.packing import unpack

FLOATS: Final = ("F32", "F16", "BF16", "F64")


def entry_of(name: str, held: Constant, shape: tuple[int, ...] | None = None, transposed: bool = False) -> Entry:
    """A constant as it is, its codes of less than a byte as bytes.

    Args:
        shape: another one of as many numbers; None: its own.
        transposed: the entry has the transpose.

    Raises:
        FileFormatError: it holds no numbers.
    """
    if held.dtype not in DTYPES and held.dtype not in NARROW:
        raise FileFormatError(
            f"{held.path}: the tensor {held.name!r} holds text, and is used as numbers. The file is damaged."
        )
    narrow = held.dtype in NARROW
    dtype = "U8" if narrow else held.dtype
    stored = (-(-held.numel * NARROW[held.dtype] // 8),) if narrow else held.shape
    wanted = shape if shape is not None else stored[::-1] if transposed else stored
    turn = None
    if held.varints:
        turn = Numbers("U8", (held.stop - held.start,), DTYPES[dtype], transposed, unpacked=stored)
    elif transposed:
        turn = Numbers(dtype, stored, transposed=True, unpacked=stored)
    return Entry(name, held.path, dtype, wanted, held.start, held.stop, turn)


def value_of(held: Constant) -> torch.Tensor:
    """The numbers of a constant, its codes of less than a byte as bytes."""
    entry = entry_of(held.name, held)
    return entry.made(read_tensor(entry))


def scaled_entry(
    name: str,
    codes: Constant,
    scales: tuple[Constant, ...],
    zero: Constant | None,
    axis: int,
    transposed: bool = False,
) -> Entry:
    """What codes mean, as float32: for grids that no scheme says, and for biases."""
    raw = entry_of(name, codes)
    held = "U8" if codes.varints else raw.dtype
    turn = Numbers(
        held,
        (codes.stop - codes.start,) if codes.varints else raw.shape,
        DTYPES[raw.dtype] if codes.varints else None,
        transposed,
        tuple(_reader(s) for s in scales),
        None if zero is None else _reader(zero),
        axis,
        NARROW.get(codes.dtype, 8),
        not codes.dtype.startswith("U"),
        codes.shape if codes.shape else (1,),
    )
    shape = codes.shape[::-1] if transposed else codes.shape
    return Entry(name, codes.path, "F32", shape, codes.start, codes.stop, turn)


def _reader(held: Constant) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        value = value_of(held)
        if held.dtype not in NARROW:
            return value.reshape(held.shape)
        bits = NARROW[held.dtype]
        lowest = 0 if held.dtype.startswith("U") else -(2 ** (bits - 1))
        return unpack(value.reshape(-1), bits, held.numel, lowest=lowest).reshape(held.shape)

    return read
