"""PyTorch's own low-bit operators for the CPU, and the shapes on which they can be trusted.

Owns: `TORCH_INT4`, `TORCH_INT8`. Both multiply bfloat16 activations and accumulate in float32. What was found in
PyTorch 2.13 (its source, and measurements on x86 with AVX-512, one core, 2048 × 2048 weights):

    bfloat16            vectorised: one row of x takes 0.12 ms where the float product takes 0.4 ms
    float32, float16    compiled without vector instructions: 10 ms, thrice the reference kernel; refused
    int8, in % 16 ≠ 0   reads past the end of its rows (garbage, or the process dies); refused
    int8, x unaligned   uses aligned loads on 32 bytes; such an x is copied first
    out · in ≥ 2³¹      its offsets are 32-bit; refused, and x is split into rows for the same reason

Error, with u = 2⁻⁸ (half a bfloat16 step) and the exact product y: at most u·|y| for each rounding of the result (one,
and one more for a bias and for an asymmetric grid), plus, where scales are rounded to bfloat16 and not stored so,
u·|y| (8 bits) or u·Σ|x|·8·scale (4 bits; twice that asymmetric), plus float32 accumulation. Measured, it is no larger
than the error of the reference kernel, which rounds the weights.

What rounding to bfloat16 lost of scales, and zero points and offsets, are kept beside under `kept_…`, for `unpack`.
"""

from __future__ import annotations

import platform
import sys

import torch

from arrondi.formats import Scheme, tile_shape
from arrondi.kernels.kernel import Kernel, Meta, Tensors
from arrondi.kernels.packed import on_grid, pack_grid
from arrondi.tensor.qtensor import QTensor

_GROUPS = (256, 128, 64, 32)
"""Group sizes of the 4-bit operator. Larger groups repeat their scale."""

_OUT_MULTIPLE = 16
"""The 4-bit operator wants this many output rows at a time; missing rows are added and cut off again."""

_READ_COLUMNS = 256
"""Columns of codes that are read back at a time."""

_PACKED_ROWS = 1024
"""Rows packed at a time, which takes four bytes a code; a multiple of the 64 that the operator interleaves."""

_OFFSET_LIMIT = 2**31 - 1

_ALIGNMENT = 64
"""Bytes; covers the aligned loads of the 8-bit operator (32) on every instruction set."""


def _refuse_int4(scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    reason = _refuse_machine("_weight_int4pack_mm_for_cpu", shape, dtype, device)
    if reason:
        return reason
    if scheme.format.kind != "integer" or scheme.format.bits > 4:
        return f"It takes integers of at most 4 bits, got {scheme.format}."
    if _common_group(scheme, shape) is None:
        return f"It needs groups of a multiple of 32 columns that divide the row, got {scheme} with {shape[1]} columns."
    return None


def _common_group(scheme: Scheme, shape: tuple[int, ...]) -> int | None:
    """The largest group of the operator of which both a scale's columns and the row are made; None if there is none."""
    columns = tile_shape(scheme.granularity, shape)[1]
    return next((g for g in _GROUPS if columns % g == 0 and shape[1] % g == 0), None)


def _prepack_int4(q: QTensor, dtype: torch.dtype) -> Tensors:
    """`codes` (out + padding, in/2) in the operator's order, `grid` (in/group, out + padding, 2), and `rest`.

    The operator reads w = (code - 8) · scale + zero with both in bfloat16. On an asymmetric grid their rounding shifts
    all weights of a group by up to 1/16 of a step, which adds up where activations have a mean. `rest` (in/group, out)
    bfloat16 is the mean of what a group lost; `linear` adds it times the sum of x. Measured on skewed weights and
    activations of mean 3: root mean square error 4.7 without, 0.21 with, 0.36 of the reference kernel.
    """
    group = _common_group(q.scheme, q.shape)
    assert group is not None
    signed = q.scheme.format.qmin < 0
    scale = _per_group(q.real_scale, q, group)  # (in/group, out)
    zero = torch.zeros_like(scale) if signed else 8 * scale
    if q.zero_point is not None:
        zero = zero - _per_group(q.zero_point, q, group) * scale
    if (offset := q.real_offset) is not None:
        zero = zero + _per_group(offset, q, group)
    grid = torch.stack((scale, zero), dim=-1).to(dtype)
    missing = -q.shape[0] % _OUT_MULTIPLE
    packed, means = [], []
    for part in q.codes.split(_PACKED_ROWS):
        codes = part.int() + (8 if signed else 0)
        means.append(codes.unflatten(-1, (-1, group)).sum(dim=-1) / group - 8)
        codes = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % _OUT_MULTIPLE))
        packed.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
    tensors = {"codes": torch.cat(packed), "grid": torch.nn.functional.pad(grid, (0, 0, 0, missing)).contiguous()}
    if bool(zero.any()):
        lost_scale, lost_zero = scale - grid[..., 0].float(), zero - grid[..., 1].float()
        tensors["rest"] = (lost_zero + torch.cat(means).T * lost_scale).to(dtype)
    return tensors | _kept(q)


def _unpack_int4(tensors: Tensors, meta: Meta) -> QTensor:
    """Codes are read by the operator itself, as products with unit vectors on a grid of whole numbers, which are exact."""
    rows, columns = meta.shape
    padded, dtype = tensors["codes"].shape[0], meta.dtype
    group = columns // tensors["grid"].shape[0]
    whole = torch.stack((torch.ones(columns // group, padded), torch.zeros(columns // group, padded)), dim=-1).to(dtype)
    parts = []
    for start in range(0, columns, _READ_COLUMNS):
        count = min(_READ_COLUMNS, columns - start)
        unit = torch.zeros(count, columns, dtype=dtype)
        unit[:, start : start + count].fill_diagonal_(1)
        parts.append(torch.ops.aten._weight_int4pack_mm_for_cpu(unit, tensors["codes"], group, whole)[:, :rows].T)
    codes = torch.cat(parts, dim=1).to(torch.int8)
    signed = meta.scheme.format.qmin < 0
    return _with_codes(codes if signed else (codes + 8).to(torch.uint8), tensors, meta)


def _kept(q: QTensor) -> Tensors:
    """All of a weight but its codes."""
    return {f"kept_{name}": part.clone() for name, part in pack_grid(q).items()}


def _with_codes(codes: torch.Tensor, tensors: Tensors, meta: Meta) -> QTensor:
    """The weight of these codes and of what `_kept` kept."""
    kept = {name.removeprefix("kept_"): part for name, part in tensors.items() if name.startswith("kept_")}
    return on_grid(codes, kept, meta.scheme)


def _per_group(part: torch.Tensor, q: QTensor, group: int) -> torch.Tensor:
    """A scale-shaped tensor → one float32 value for every group of columns and every row, (in/group, out)."""
    rows, columns = q.shape
    height, width = tile_shape(q.scheme.granularity, q.shape)
    of_row = torch.arange(rows, device=part.device) // height
    of_group = torch.arange(0, columns, group, device=part.device) // width
    return part.float()[of_row][:, of_group].T.contiguous()


def _linear_int4(x: torch.Tensor, tensors: Tensors, meta: Meta, bias: torch.Tensor | None) -> torch.Tensor:
    codes, grid, rest = tensors["codes"], tensors["grid"], tensors.get("rest")
    group = meta.shape[1] // grid.shape[0]
    parts = []
    for part in _row_blocks(x, codes.shape[0]):
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(part, codes, group, grid)[:, : meta.shape[0]]
        if rest is not None:
            sums = part.unflatten(-1, (-1, group)).sum(dim=-1, dtype=torch.float32)
            y = torch.addmm(y, sums.to(y.dtype), rest)
        parts.append(y)
    return _assemble(x, parts, meta, bias)


def _refuse_int8(scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    reason = _refuse_machine("_weight_int8pack_mm", shape, dtype, device)
    if reason:
        return reason
    if scheme.format.name != "int8" or not scheme.symmetric:
        return f"It takes symmetric int8, got {scheme}."
    if tile_shape(scheme.granularity, shape)[1] != shape[1]:
        return f"It takes one scale for a whole row, got {scheme} with {shape[1]} columns."
    if shape[1] % 16:
        return f"It reads 16 columns at a time and past the end of other rows, got {shape[1]} columns."
    return None


def _prepack_int8(q: QTensor, dtype: torch.dtype) -> Tensors:
    """`codes` (out, in) int8 and `scale` (out,)."""
    height = tile_shape(q.scheme.granularity, q.shape)[0]
    scale = q.real_scale[torch.arange(q.shape[0], device=q.codes.device) // height, 0]
    return {"codes": q.codes.clone(memory_format=torch.contiguous_format), "scale": scale.to(dtype)} | _kept(q)


def _unpack_int8(tensors: Tensors, meta: Meta) -> QTensor:
    return _with_codes(tensors["codes"], tensors, meta)


def _linear_int8(x: torch.Tensor, tensors: Tensors, meta: Meta, bias: torch.Tensor | None) -> torch.Tensor:
    codes, scale = _aligned(tensors["codes"]), tensors["scale"]
    parts = [
        torch.ops.aten._weight_int8pack_mm(_aligned(part), codes, scale) for part in _row_blocks(x, codes.shape[0])
    ]
    return _assemble(x, parts, meta, bias)


def _refuse_machine(operator: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"It runs on the CPU, got {device}."
    if not hasattr(torch.ops.aten, operator):
        return f"PyTorch {torch.__version__} has no operator {operator}."
    if dtype != torch.bfloat16:
        return f"PyTorch's operator is fast for bfloat16 activations only, got {dtype}."
    if not _vectorised():
        return "PyTorch's operator has no vector instructions on this machine."
    if len(shape) != 2 or not all(shape):
        return f"It multiplies by matrices (out, in) that are not empty, got shape {shape}."
    if shape[0] * shape[1] > _OFFSET_LIMIT:
        return f"Its offsets have 32 bits: {shape[0]} × {shape[1]} weights are too many."
    return None


def _vectorised() -> bool:
    """Whether PyTorch has more than the scalar loop: x86 needs AVX2 or AVX-512, and not Microsoft's compiler."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return True
    return sys.platform != "win32" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _row_blocks(x: torch.Tensor, rows: int) -> list[torch.Tensor]:
    """x (..., in) as contiguous (tokens, in) blocks that keep every offset of x and y below 2³¹."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return list(flat.split(max(_OFFSET_LIMIT // max(rows, x.shape[-1]), 1))) if flat.shape[0] else []


def _aligned(x: torch.Tensor) -> torch.Tensor:
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


def _assemble(x: torch.Tensor, parts: list[torch.Tensor], meta: Meta, bias: torch.Tensor | None) -> torch.Tensor:
    if not parts:
        return x.new_empty((*x.shape[:-1], meta.shape[0]))
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    y = y.reshape(*x.shape[:-1], meta.shape[0])
    return y if bias is None else y + bias


TORCH_INT4 = Kernel("torch-int4", _refuse_int4, _prepack_int4, _unpack_int4, _linear_int4)
"""Integers of up to 4 bits, symmetric, with zero points or offsets. Codes of 2 and 3 bits are widened to 4."""

TORCH_INT8 = Kernel("torch-int8", _refuse_int8, _prepack_int8, _unpack_int8, _linear_int8)
"""Symmetric int8 with one scale for each output channel or for the tensor."""
