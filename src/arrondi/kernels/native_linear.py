"""Products by the compiled kernels (`native/` in the source tree).

Owns: `NATIVE`, the operator `torch.ops.arrondi.linear`, `integer_linear` (exact int32 sums), and weights as one (`join`). The weight is kept in tiles
of sixteen rows that the kernels decode in registers. Activations meet integer codes as integers too: int8 or less, one scale
for each token or group of columns, where the scheme asks for it, otherwise as two (bfloat16, float16) or three (float32) digits in base 256 of their share in the largest of each 256
columns, which costs no more than a float product and is as exact: 15 and 23 bits beside the sign. Other codes are multiplied in
float32, or as pairs of bfloat16 where x is bfloat16 and has many rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from arrondi.errors import SchemeError, ShapeError
from arrondi.formats import Format, Granularity, PerBlock, PerGroup, PerToken, Scheme, tile_shape
from arrondi.kernels.kernel import Bound, Kernel, Meta, Tensors
from arrondi.kernels.product import Product
from arrondi.native import TYPES, address, available, native, threads
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import STORED

BLOCK: Final = 16
"""Rows of the weight in one tile."""

_KINDS: Final = (
    "u8", "u6", "u5", "u4", "u3", "u2", "u1", "trit5", "table4", "float4", "fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3",
)  # fmt: skip
"""How codes are packed, numbered as in native/kernels.h."""
_KIND: Final = {name: number for number, name in enumerate(_KINDS)}
_INTEGERS: Final = frozenset(_KIND[name] for name in _KINDS[:9])
_STEP: Final = 32
"""Columns of one packed step; of the 1.6-bit ternary layout 20."""
_MOST_COLUMNS: Final = 65536
"""More would let int32 sums of int8 products overflow."""
_MOST_COLUMNS_ZERO_POINT: Final = 32768
"""The same of int8 weights with activations that have a zero point: code - zero point has nine bits."""
_MOST_GROUP: Final = 512
"""Columns of x under one scale, where not the whole token is."""
_LARGEST: Final = 2**31 - 1
_COLUMNS_BACK: Final = 256
"""Columns of the weight that are decoded at a time for a gradient."""
_DIGITS: Final = {torch.float32: 3, torch.bfloat16: 2, torch.float16: 2}


@dataclass(frozen=True)
class _Coding:
    """How the codes of a format become what the kernels read: value(code) = (table[code] or code - base - zero) · unit."""

    kind: int
    zero: int
    unit: float = 1.0
    table: torch.Tensor | None = None


def _packing(scheme: Scheme, shape: tuple[int, ...]) -> _Coding:
    """How a weight that is not refused is kept. Ternary codes with one scale a row take 1.6 bits, which also reads faster."""
    coding = _coding(scheme.format)
    assert coding is not None
    if scheme.format.levels == 3 and tile_shape(scheme.granularity, shape)[1] >= shape[1]:
        return _Coding(_KIND["trit5"], coding.zero)
    return coding


def _coding(format: Format) -> _Coding | None:
    """None if the kernels cannot read it."""
    if format.kind == "integer":
        width = 8 if format.bits == 7 else format.bits
        return _Coding(_KIND[f"u{width}"], -format.qmin)
    if format.name in _KIND:
        return _Coding(_KIND[format.name], 0)
    if format.values == (-1.0, 1.0):
        return _Coding(_KIND["u1"], 1)
    if format.bits > 4 or format.values is None or not all(math.isfinite(v) for v in format.values):
        return None
    values = torch.tensor(format.values, dtype=torch.float64)
    values = torch.nn.functional.pad(values, (0, 16 - len(values)), value=float(values[0]))
    for unit in (1.0, 0.5, 0.25):
        steps = values / unit
        low = int(steps.min().floor())
        if bool((steps == steps.round()).all()) and int(steps.max()) - low < 128 and low <= 0:
            return _Coding(_KIND["table4"], -low, unit, (steps - low).to(torch.uint8))
    return _Coding(_KIND["float4"], 0, 1.0, values.float())


def _refuse(scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"It runs on the CPU, got {device}."
    if not available():
        return "This installation has no compiled kernels, or ARRONDI_CPU=none leaves them alone."
    if dtype not in TYPES:
        return f"It takes float32, bfloat16 and float16 activations, got {dtype}."
    if len(shape) != 2 or not all(shape):
        return f"It multiplies by matrices (out, in) that are not empty, got shape {shape}."
    if shape[1] > _MOST_COLUMNS or shape[0] * shape[1] > _LARGEST:
        return f"It takes up to {_MOST_COLUMNS} columns and 2³¹ weights, got shape {shape}."
    if _coding(scheme.format) is None:
        return f"It knows integers, small floats and codebooks of up to 16 levels, got {scheme.format}."
    width = tile_shape(scheme.granularity, shape)[1]
    if width < shape[1] and width != BLOCK and width % _STEP:
        return f"It takes groups of 16 or a multiple of {_STEP} columns, got {width}."
    return None


def _per_row(part: torch.Tensor, q: QTensor) -> torch.Tensor:
    """A scale-shaped tensor with one entry for every row, (out, groups)."""
    height = tile_shape(q.scheme.granularity, q.shape)[0]
    return part if height == 1 else part.repeat_interleave(height, dim=0)[: q.shape[0]]


def _blocks(part: torch.Tensor, fill: float) -> torch.Tensor:
    """(out, groups) → (blocks, groups, 16), missing rows filled."""
    rows, groups = part.shape
    part = torch.nn.functional.pad(part, (0, 0, 0, -rows % BLOCK), value=fill)
    return part.reshape(-1, BLOCK, groups).transpose(1, 2).contiguous()


def _narrowest(scale: torch.Tensor, storage: str | Scheme) -> torch.Tensor:
    """The same numbers in the smallest type that holds them; where the scheme names one, that is tried alone."""
    named = STORED.get(storage) if isinstance(storage, str) else None
    for dtype in (named,) if named is not None else (torch.bfloat16, torch.float16):
        narrow = scale.to(dtype)
        if torch.equal(narrow.float(), scale):
            return narrow
    return scale


def prepack(q: QTensor, dtype: torch.dtype) -> Tensors:
    """`codes` in tiles, `scale` (blocks, groups, 16) in the smallest type that holds it exactly, and `zero`, `offset`, `table`
    where the scheme has them; see native/kernels.h."""
    assert native is not None
    rows, columns = q.shape
    coding = _packing(q.scheme, q.shape)
    codes = q.codes.contiguous()
    packed = torch.empty(native.packed_bytes(coding.kind, rows, columns), dtype=torch.uint8)
    add = -q.scheme.format.qmin
    native.prepack(coding.kind, address(codes), columns, 8, add, rows, columns, address(packed), threads())
    scale = _without_nan_codes(q, _per_row(q.real_scale, q))
    if coding.unit != 1.0:
        scale = scale * coding.unit
    tensors = {"codes": packed, "scale": _blocks(_narrowest(scale, q.scheme.scale), 1.0)}
    offset = q.real_offset
    if q.zero_point is not None:
        zero = q.zero_point - q.scheme.format.qmin
        if bool(((zero >= 0) & (zero <= 255)).all()):
            tensors["zero"] = _blocks(_per_row(zero.to(torch.uint8), q), 0)
        else:  # made by hand: a zero point that is no code
            offset = -(q.zero_point * q.real_scale)
    if offset is not None:
        tensors["offset"] = _blocks(_per_row(offset, q), 0.0)
    if coding.table is not None:
        tensors["table"] = coding.table
    return tensors


def _without_nan_codes(q: QTensor, scale: torch.Tensor) -> torch.Tensor:
    """The kernels read every pattern of an 8-bit float as a number; where a group has one that is none, its scale is NaN."""
    if not q.scheme.format.name.startswith("fp8"):
        return scale
    first = 0x7F if q.scheme.format.name == "fp8_e4m3" else 0x7C
    bad = (q.codes & 0x7F) >= first
    if not bool(bad.any()):
        return scale
    width = tile_shape(q.scheme.granularity, q.shape)[1]
    groups = torch.nn.functional.pad(bad, (0, -q.shape[1] % width)).unflatten(1, (-1, width)).any(dim=2)
    return torch.where(groups, torch.nan, scale)


def _facts(tensors: Tensors, meta: Meta) -> list[int]:
    """What native/bind_products.cpp reads: kind, n, k, group, groups, type of the scales, zero point of all, bytes of codes."""
    coding = _packing(meta.scheme, meta.shape)
    n, k = meta.shape
    width = tile_shape(meta.scheme.granularity, meta.shape)[1]
    scale, codes = tensors["scale"], tensors["codes"]
    return [coding.kind, n, k, width, -(-k // width), TYPES[scale.dtype], coding.zero, codes.numel()]


def rounds(weights: Scheme, activations: Scheme) -> bool:
    """Whether the integer product takes these activations: integers of up to 8 bits, symmetric (signed, more than three
    levels, which have a rule of their own) or with an integer zero point, one scale for each token or group of columns."""
    coding, format = _coding(weights.format), activations.format
    return (
        coding is not None
        and coding.kind in _INTEGERS
        and format.kind == "integer"
        and (activations.zero_point == "integer" or (activations.symmetric and format.qmin < 0 and format.levels > 3))
        and _groups_fit(weights, activations.granularity)
        and activations.scale in ("float32", "bfloat16")
    )


def _groups_fit(weights: Scheme, activations: Granularity) -> bool:
    """Groups of activations must be of whole steps, and each made of groups of the weight or a part of one."""
    if not isinstance(activations, PerGroup):
        return isinstance(activations, PerToken)
    size, of_weight = activations.size, weights.granularity
    if size % _STEP or size > _MOST_GROUP or weights.format.levels == 3 or isinstance(of_weight, PerBlock):
        return False
    return not isinstance(of_weight, PerGroup) or of_weight.size % size == 0 or size % of_weight.size == 0


def rounding_of(meta: Meta, kind: int) -> tuple[int, list[int] | None]:
    """In how many digits x meets the codes, and by what it is rounded: lowest code, highest code, type of the scales, columns
    under one scale (0: all of a token); None where x keeps its own numbers."""
    if meta.activations is None:
        return _DIGITS[meta.dtype] if kind in _INTEGERS else 0, None
    format, granularity = meta.activations.format, meta.activations.granularity
    digits = 1 if meta.activations.symmetric else 2
    group = granularity.size if isinstance(granularity, PerGroup) else 0
    return digits, [format.qmin, format.qmax, TYPES[STORED[str(meta.activations.scale)]], group]


def linear(x: torch.Tensor, tensors: Tensors, meta: Meta, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., in) → (..., out); through `torch.ops.arrondi.linear`, so that it can be traced."""
    facts = _facts(tensors, meta)
    return torch.ops.arrondi.linear(x, _parts(tensors), facts, bias, *rounding_of(meta, facts[0]))


def bind(tensors: Tensors, meta: Meta, bias: torch.Tensor | None) -> Bound:
    """The product with all that does not depend on x worked out once."""
    return product_of(tensors, meta, bias)


def product_of(
    tensors: Tensors,
    meta: Meta,
    bias: torch.Tensor | None,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gate: str | None = None,
) -> Product:
    """The product with what may come before and after it; see `Product`."""
    facts = _facts(tensors, meta)
    return Product(_parts(tensors), facts, *rounding_of(meta, facts[0]), bias, norm=norm, eps=eps, gate=gate)


def _parts(tensors: Tensors) -> list[torch.Tensor | None]:
    return [tensors["codes"], tensors["scale"], *(tensors.get(name) for name in ("zero", "offset", "table"))]


def join(weights: Sequence[tuple[Tensors, Meta]]) -> tuple[Tensors, Meta] | str:
    """Weights that read the same x as one, outputs side by side; a sentence why not where they differ in more than their rows.

    Each must have a multiple of `BLOCK` rows, so that the tensors of every one are a piece of those of all.
    """
    tensors, metas = [t for t, _ in weights], [m for _, m in weights]
    facts: dict[str, set[Any]] = {
        "schemes": {m.scheme for m in metas},
        "numbers of columns": {m.shape[1] for m in metas},
        "types": {m.dtype for m in metas},
        "ways to round them": {m.activations for m in metas},
        "ways to keep zero points": {frozenset(t) for t in tensors},
    }
    for what, found in facts.items():
        if len(found) > 1:
            return f"Layers that read the same activations have different {what}."
    for m in metas:
        if m.shape[0] % BLOCK:
            return f"Layers that read the same activations are joined in tiles of {BLOCK} rows, and one has {m.shape[0]} rows."
    scales = {t["scale"].dtype for t in tensors}
    joined = {}
    for name in tensors[0]:
        pieces = [t[name].float() if name == "scale" and len(scales) > 1 else t[name] for t in tensors]
        joined[name] = pieces[0] if name == "table" else torch.cat(pieces)
    return joined, replace(metas[0], shape=(sum(m.shape[0] for m in metas), metas[0].shape[1]))


def pieces(tensors: Tensors, rows: Sequence[int]) -> list[Tensors]:
    """The tensors of every weight that `join` made one of, as views; `rows` of each."""
    total = sum(rows)
    found: list[Tensors] = [{} for _ in rows]
    for name, tensor in tensors.items():
        sizes = [tensor.shape[0] * count // total for count in rows]
        for piece, view in zip(found, [tensor] * len(rows) if name == "table" else tensor.split(sizes), strict=True):
            piece[name] = view
    return found


def integer_linear(x: torch.Tensor, tensors: Tensors, meta: Meta) -> torch.Tensor:
    """The exact sums behind a product with integer activations: Σ (code(x) - zero point) · (code(w) - zero point), int32
    (..., out).

    Args:
        x: (..., in), rounded by `meta.activations`.
        tensors, meta: of `NATIVE.prepack`; one scale a row.

    Raises:
        SchemeError: the weight or x has several groups, `meta.activations` is not set, or it has a zero point and the
            weight more than 32768 columns.
    """
    facts = _facts(tensors, meta)
    digits, rounding = rounding_of(meta, facts[0])
    if rounding is None or rounding[3] or facts[4] != 1:
        raise SchemeError(
            f"Exact sums need activations rounded to integers by token and one scale a row, got {meta.activations} and {meta.scheme}."
        )
    if digits > 1 and meta.shape[1] > _MOST_COLUMNS_ZERO_POINT:
        raise SchemeError(
            f"Exact sums with a zero point of activations have up to {_MOST_COLUMNS_ZERO_POINT} columns, got shape {meta.shape}."
        )
    return Product(_parts(tensors), facts, digits, rounding, None)(x, integers=True)


_library: Final = torch.library.Library("arrondi", "FRAGMENT")
_library.define("linear(Tensor x, Tensor?[] packed, int[] facts, Tensor? bias, int digits, int[]? rounding) -> Tensor")


def _linear_cpu(
    x: torch.Tensor,
    packed: list[torch.Tensor | None],
    facts: list[int],
    bias: torch.Tensor | None,
    digits: int,
    rounding: list[int] | None,
) -> torch.Tensor:
    _check(packed, facts, bias)
    _check_rounding(digits, rounding)
    return Product(packed, list(facts), digits, rounding, bias)(x)


def _linear_fake(
    x: torch.Tensor, packed: Any, facts: list[int], bias: Any, digits: int, rounding: list[int] | None
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], facts[1]))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.packed, ctx.facts = inputs[1], list(inputs[2])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """grad @ W, some columns of W at a time. Rounding x counts as the identity."""
    n, k = ctx.facts[1:3]
    digits = _DIGITS[torch.float32] if ctx.facts[0] in _INTEGERS else 0
    flat = grad.reshape(-1, n).float()
    parts = []
    for start in range(0, k, _COLUMNS_BACK):
        count = min(_COLUMNS_BACK, k - start)
        unit = torch.zeros(count, k)
        unit[:, start : start + count].fill_diagonal_(1)
        parts.append(flat @ torch.ops.arrondi.linear(unit, ctx.packed, ctx.facts, None, digits, None).T)
    return torch.cat(parts, dim=1).to(grad.dtype).reshape(*grad.shape[:-1], k), *(None,) * 5


def _check(packed: list[torch.Tensor | None], facts: list[int], bias: torch.Tensor | None) -> None:
    """The operator can be called with anything; the kernels read where they are told to."""
    if len(packed) != 5 or len(facts) != 8:
        raise ShapeError(f"A packed weight has 5 tensors and 8 facts, got {len(packed)} and {len(facts)}.")
    if not 0 <= facts[0] < len(_KINDS) or min(facts[1:5]) < 1:
        raise ShapeError(f"The facts of a packed weight must be a kind and positive sizes, got {list(facts)}.")
    kind, n, k, group, groups, scale_type, _, _ = facts
    if groups != -(-k // group):
        raise ShapeError(f"A weight of {k} columns in groups of {group} has {-(-k // group)} groups, got {groups}.")
    assert native is not None
    blocks = -(-n // BLOCK)
    names = ("codes", "scale", "zero", "offset", "table")
    table = {_KIND["table4"]: torch.uint8, _KIND["float4"]: torch.float32}.get(kind)
    scale_dtype = next((d for d, number in TYPES.items() if number == scale_type), None)
    wanted = (
        (native.packed_bytes(kind, n, k), torch.uint8),
        (blocks * groups * BLOCK, scale_dtype),
        (blocks * groups * BLOCK, torch.uint8),
        (blocks * groups * BLOCK, torch.float32),
        (16, table),
    )
    for name, tensor, (count, dtype) in zip(names, packed, wanted, strict=True):
        needed = name in ("codes", "scale") or (name == "table" and table is not None)
        if tensor is None:
            if needed:
                raise ShapeError(f"{name} of a packed weight of shape {(n, k)} is missing.")
            continue
        if (
            tensor.numel() != count
            or tensor.dtype != dtype
            or not tensor.is_contiguous()
            or tensor.device.type != "cpu"
        ):
            raise ShapeError(
                f"{name} of a packed weight of shape {(n, k)} must be {count} contiguous {dtype} on the CPU, got shape {tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}."
            )
    if bias is not None and tuple(bias.shape) != (n,):
        raise ShapeError(f"The bias must have one number for each of {n} outputs, got {tuple(bias.shape)}.")


def _check_rounding(digits: int, rounding: list[int] | None) -> None:
    """The numbers of `rounding_of`."""
    if rounding is None:
        if digits not in (0, 2, 3):
            raise ShapeError(f"Activations that are not rounded are floats (0) or have 2 or 3 digits, got {digits}.")
        return
    lowest, highest, step_type, group = rounding if len(rounding) == 4 else (0, 0, 0, 0)
    signed = -128 <= lowest < 0 and lowest < highest <= 127
    codes = signed if digits == 1 else digits == 2 and (signed or (lowest == 0 < highest <= 255))
    sizes = group == 0 or (_STEP <= group <= _MOST_GROUP and group % _STEP == 0)
    if not codes or not sizes or step_type not in (TYPES[torch.float32], TYPES[torch.bfloat16]):
        raise ShapeError(
            f"The rounding of activations is lowest and highest code of up to 8 bits, type of the scales (float32, bfloat16) and columns under one (0, or {_STEP} … {_MOST_GROUP} in steps of {_STEP}), got {rounding} in {digits} digits."
        )


_library.impl("linear", _linear_cpu, "CPU")
torch.library.register_fake("arrondi::linear", _linear_fake, lib=_library)
torch.library.register_autograd("arrondi::linear", _backward, setup_context=_keep_for_backward, lib=_library)

NATIVE: Final = Kernel("native", _refuse, prepack, linear, rounds, bind)
"""Compiled for this CPU. Error: see the module; exact int32 sums with activations rounded by token."""

__all__ = [
    "BLOCK",
    "NATIVE",
    "bind",
    "integer_linear",
    "join",
    "linear",
    "pieces",
    "prepack",
    "product_of",
    "rounding_of",
    "rounds",
]
