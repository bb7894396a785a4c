"""Rows of blocks ↔ QTensors, bit for bit.

Owns: `decode_blocks` and `encode_blocks`. Codes of fewer than eight bits are counted from the lowest, those of eight are two's complement.
"""

from __future__ import annotations

from typing import Final

import torch

from arrondi.checkpoint.containers.gguf.planes import read_planes, write_planes
from arrondi.checkpoint.layouts.ggml.blocks import BLOCKS, BlockType
from arrondi.checkpoint.layouts.ggml.ternary import read_trits, write_trits
from arrondi.errors import FileFormatError, ShapeError, unknown
from arrondi.formats import Format, Scheme, scale_shape
from arrondi.tensor.encoding import code_dtype
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.storage import load_scale, signed, store_scale, unsigned

_CHUNK: Final = 1 << 18
"""Elements handled at a time; their bytes stay in the core's own cache."""


def block_type(name: str) -> BlockType:
    """The type of that name, in any case.

    Raises:
        FileFormatError: there is none; the nearest name is given.
    """
    if name.upper() not in BLOCKS:
        raise unknown("type of blocks", name, BLOCKS, FileFormatError)
    return BLOCKS[name.upper()]


def check_rows(raw: torch.Tensor, kind: BlockType, name: str) -> None:
    """Refuse what are no rows of whole blocks.

    Raises:
        FileFormatError: not uint8, not two axes, or another number of bytes.
    """
    if raw.dtype != torch.uint8 or raw.dim() != 2 or raw.shape[1] % kind.size:
        raise FileFormatError(
            f"{name}: rows of {kind.name} are whole blocks of {kind.size} bytes, got {raw.dtype} {tuple(raw.shape)}."
        )


def decode_blocks(raw: torch.Tensor, kind: BlockType, name: str = "tensor") -> QTensor:
    """The tensor that rows of blocks hold.

    Args:
        raw: (rows, bytes of a row) uint8.
        kind: of the blocks; one with a scheme.
        name: for messages.

    Returns:
        (rows, elements of a row); scales and offsets as the scheme stores them. Numbers are not checked.

    Raises:
        FileFormatError: not uint8, or a row is no whole number of blocks.
    """
    scheme = kind.scheme
    assert scheme is not None, f"{kind.name} has no scheme"
    check_rows(raw, kind, name)
    rows, blocks = raw.shape[0], raw.reshape(-1, kind.size)
    shape = (rows, raw.shape[1] // kind.size * kind.elements)
    sizes = _sizes(kind, scheme)
    codes = raw.new_empty((len(blocks), kind.elements), dtype=code_dtype(scheme.format))
    parts = {part: raw.new_empty((len(blocks), size)) for part, size in sizes.items()}
    step = max(_CHUNK // kind.elements, 1)
    for start in range(0, len(blocks), step):
        some = slice(start, start + step)
        found = read_planes(blocks[some], kind.planes, sizes | {"codes": kind.elements})
        codes[some] = from_bits(read_trits(blocks[some]) if kind.trits else found["codes"], scheme.format)
        for part, numbers in parts.items():
            numbers[some] = found[part]
    halves = {n: blocks[:, at : at + 2].contiguous().view(torch.float16).float() for n, at in kind.halves}
    groups = scale_shape(scheme.granularity, shape)
    scale = _part(scheme.scale, parts.get("scale"), halves.get("d"), groups)
    offset = None
    if scheme.zero_point == "float":
        below = -halves["m"] if isinstance(scheme.offset, Scheme) else halves["m"]
        offset = _part(scheme.offset, parts.get("offset"), below, groups)
    return QTensor(codes.reshape(shape), scale, None, offset, scheme)


def encode_blocks(q: QTensor, kind: BlockType, name: str = "tensor") -> torch.Tensor:
    """The rows of blocks of a tensor, the inverse of `decode_blocks`.

    Args:
        q: 2-D, of the scheme of `kind`.
        kind: a type that is written.

    Returns:
        (rows, bytes of a row) uint8.

    Raises:
        ShapeError: another scheme, or rows that are no whole number of blocks.
    """
    if q.scheme != kind.scheme or not kind.written or len(q.shape) != 2 or q.shape[1] % kind.elements:
        raise ShapeError(
            f"{name}: blocks of {kind.name} hold rows of a multiple of {kind.elements} in {kind.scheme}, got {q.shape} in {q.scheme}."
        )
    codes, sizes = q.codes.reshape(-1, kind.elements), _sizes(kind, q.scheme)
    parts = {part: numbers.reshape(-1, sizes[part]) for part, numbers in _inner_bits(q).items()}
    blocks = torch.zeros((len(codes), kind.size), dtype=torch.uint8, device=codes.device)
    step = max(_CHUNK // kind.elements, 1)
    for start in range(0, len(blocks), step):
        some = slice(start, start + step)
        here = to_bits(codes[some], q.scheme.format)
        write_planes(blocks[some], kind.planes, {"codes": here, **{part: n[some] for part, n in parts.items()}})
        if kind.trits:
            write_trits(blocks[some], here)
    outer = {"d": _outer(q.scale), "m": _outer(q.offset, -1)}
    for half, at in kind.halves:
        blocks[:, at : at + 2] = outer[half].reshape(-1).to(torch.float16).view(torch.uint8).reshape(-1, 2)
    return blocks.reshape(q.shape[0], q.shape[1] // kind.elements * kind.size)


def from_bits(numbers: torch.Tensor, format: Format) -> torch.Tensor:
    """Stored numbers (uint8) as the codes of a QTensor."""
    return numbers.view(torch.int8) if format.qmin < 0 and format.bits == 8 else signed(numbers, format)


def to_bits(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """The inverse of `from_bits`."""
    codes = codes.contiguous()
    return codes.view(torch.uint8) if format.qmin < 0 and format.bits == 8 else unsigned(codes, format)


def _sizes(kind: BlockType, scheme: Scheme) -> dict[str, int]:
    """Scales and offsets of a block, where they are codes or bytes."""
    groups = scale_shape(scheme.granularity, (1, kind.elements))[1]
    return dict.fromkeys({plane.part for plane in kind.planes} - {"codes"}, groups)


def _inner_bits(q: QTensor) -> dict[str, torch.Tensor]:
    """The same as they are stored."""
    if q.scheme.scale == "e8m0":
        return {"scale": store_scale(q.real_scale, "e8m0")}
    both = {"scale": q.scale, "offset": q.offset}
    return {n: to_bits(part.codes, part.scheme.format) for n, part in both.items() if isinstance(part, QTensor)}


def _part(
    storage: str | Scheme, stored: torch.Tensor | None, outer: torch.Tensor | None, shape: tuple[int, ...]
) -> torch.Tensor | QTensor:
    """Scales or offsets in the shape of the groups, from codes (or bytes) and float16 numbers."""
    if isinstance(storage, Scheme) and stored is not None:
        wanted = scale_shape(storage.granularity, shape)
        real = torch.ones(wanted, device=stored.device) if outer is None else outer.reshape(wanted)
        return QTensor(from_bits(stored, storage.format).reshape(shape), real, None, None, storage)
    numbers = outer if stored is None else load_scale(stored)
    assert numbers is not None
    return numbers.reshape(shape)


def _outer(part: torch.Tensor | QTensor | None, sign: int = 1) -> torch.Tensor:
    """The numbers that are stored as float16; of nested ones times a sign."""
    if isinstance(part, QTensor):
        return part.real_scale * sign
    return torch.empty(0) if part is None else part
