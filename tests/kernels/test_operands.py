"""Every compiled function with operands that do not fit: it answers as the reference does, or raises an error of arrondi.

Each operand of each function is changed in every way below. Kernels read and write where they are told to, so an operand that
slips through shows as another result, another kind of exception, or the end of the process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from arrondi.errors import ArrondiError, ShapeError
from arrondi.formats import parse_scheme
from arrondi.kernels import native_linear as module
from arrondi.kernels.binary import binary_linear, binary_linear_reference, pack_signs, sign_tiles
from arrondi.kernels.hadamard import hadamard, hadamard_reference
from arrondi.kernels.product import Product
from arrondi.kernels.tokens import attend, dense_linear, rotate
from arrondi.native import native, operand
from arrondi.tensor import quantizers
from arrondi.tensor.encoding import decode, encode
from arrondi.tensor.nearest import quantize_tensor
from arrondi.tensor.packing import pack, pack_reference, unpack, unpack_reference
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import Grid
from tests.kernels.common import normal, packed, weight

pytestmark = pytest.mark.skipif(native is None, reason="arrondi was installed without its compiled kernels")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Function:
    """A compiled function: valid operands, the call, and what it must answer for any operands that it takes.

    Attributes:
        reference: None where changed operands have no meaning.
        strict: operands of which only changes that keep their numbers are taken.
        without: operands with changes that have no meaning.
    """

    make: Callable[[], Tensors]
    run: Callable[..., Any]
    reference: Callable[..., Any] | None
    strict: frozenset[str] = frozenset()
    without: frozenset[tuple[str, str]] = frozenset()


def rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: torch.Tensor, key_norm: torch.Tensor
) -> torch.Tensor:
    """4 heads and 2 key heads."""
    width = cos.shape[1]
    if not cos.shape == sin.shape == (len(x), width) or not norm.shape == key_norm.shape == (width,):
        raise ValueError
    y = x.clone()
    for head in range(6):
        a = x[:, head * width : (head + 1) * width]
        if a.shape[1] != width:
            raise ValueError
        scale = norm if head < 4 else key_norm
        a = a / (a.square().mean(dim=1, keepdim=True) + 0.1).sqrt() * scale
        half = torch.cat((-a[:, width // 2 :], a[:, : width // 2]), dim=1)
        y[:, head * width : (head + 1) * width] = a * cos + half * sin
    return y


def run_rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: torch.Tensor, key_norm: torch.Tensor
) -> torch.Tensor:
    y = x if x.device.type != "cpu" or not isinstance(x, torch.Tensor) else x.clone(memory_format=torch.preserve_format)
    rotate(y, 4, 2, cos, sin, norm=norm, key_norm=key_norm, eps=0.1)
    return y


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if query.shape[0] != 1 or query.shape[2] != 1 or key.shape != value.shape or key.shape[0] != 1:
        raise ValueError
    shared = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(shared, 1).transpose(2, 3) * 0.3
    return (scores.softmax(dim=-1) @ value.repeat_interleave(shared, 1)).transpose(1, 2)


def linear_of(q: QTensor, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    if bias.shape != (q.shape[0],):
        raise ValueError
    return x.float() @ q.dequantize().T + bias


Q = weight("w=uint4/g32/asym", (40, 64))
STATIC = weight("w=int8/channel", (40, 64))


def product_parts() -> Tensors:
    tensors, _ = packed(Q)
    return {"x": normal(3, 64), **{n: t for n, t in tensors.items() if n in module.Parts._fields}}


def run_parts(x: torch.Tensor, **parts: torch.Tensor) -> torch.Tensor:
    tensors, meta = packed(Q)
    named = module.parts_of(tensors)._replace(**parts)
    return Product(named, module.facts_of(tensors, meta), 3, None, None)(x)


def run_static(x: torch.Tensor, input_scale: torch.Tensor, input_zero_point: torch.Tensor) -> torch.Tensor:
    tensors, meta = packed(STATIC, rounding=parse_scheme("w=int8,a=int8/tensor/asym/static").inputs)
    return module.product_of({**tensors, "input_scale": input_scale, "input_zero_point": input_zero_point}, meta, None)(
        x
    )


def run_into(x: torch.Tensor, y: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    product = module.product_of(*packed(Q), None)
    product.into(x, y, residual)
    return y


def into_reference(x: torch.Tensor, y: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    found = x.float() @ Q.dequantize().T
    if not found.shape == y.shape == residual.shape:
        raise ValueError
    return found + residual


ASYM = parse_scheme("w=int4/g16/asym").weights


def grid_operands() -> Tensors:
    q = quantize_tensor(normal(6, 40), ASYM)
    assert q.zero_point is not None
    return {"x": normal(6, 40), "scale": q.real_scale, "zero_point": q.zero_point}


def spread(part: torch.Tensor, columns: int) -> torch.Tensor:
    """(rows, groups of 16) → (rows, columns)."""
    return part.reshape(-1, math.ceil(columns / 16)).repeat_interleave(16, 1)[:, :columns]


def on_grid(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    x = x.flatten(0, -2)
    wide = spread(scale, x.shape[1]), spread(zero_point, x.shape[1])
    if wide[0].shape != x.shape or wide[1].shape != x.shape or not bool(torch.isfinite(x).all()):
        raise ValueError
    return encode(x.float() / wide[0], ASYM.format, wide[1])


def restored(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    codes = codes.flatten(0, -2)
    wide = spread(scale, codes.shape[1]), spread(zero_point, codes.shape[1])
    if wide[0].shape != codes.shape or wide[1].shape != codes.shape:
        raise ValueError
    return (decode(codes, ASYM.format) - wide[1].int()) * wide[0]


def swept() -> Tensors:
    n, m = 24, 20
    factor = torch.triu(normal(n, n, seed=3) * 0.1) + 2 * torch.eye(n)
    return {
        "rows": normal(n, m), "owed": torch.zeros(n, m), "factor": factor, "codes": torch.zeros(n, m, dtype=torch.int8),
        "places": torch.arange(n), "groups": torch.arange(n) // 8, "scale": torch.full((3, m), 0.1),
        "zero": torch.zeros(3, m),
    }  # fmt: skip


def run_sweep(**t: torch.Tensor) -> None:
    grid = Grid(t["scale"], t["zero"])
    quantizers.sweep(t["rows"], t["owed"], t["factor"], t["codes"], (t["places"], t["groups"]), grid, (0, 24, 24), ASYM)


BITS, TILES = pack_signs(normal(5, 70)), sign_tiles(pack_signs(normal(20, 70, seed=1)))

FUNCTIONS = {
    "dense_linear": Function(
        lambda: {"x": normal(3, 33), "weight": normal(10, 33, seed=1), "bias": normal(10, seed=2)},
        dense_linear,
        lambda x, weight, bias: x @ weight.T + bias if bias.shape == weight.shape[:1] else 1 / 0,
    ),
    "attend": Function(
        lambda: {"query": normal(1, 4, 1, 32), "key": normal(1, 2, 5, 32, seed=1), "value": normal(1, 2, 5, 32, seed=2)},
        lambda query, key, value: attend(query, key, value, 0.3),
        attended,
    ),
    "rotate": Function(
        lambda: {
            "x": normal(3, 6 * 20 + 7), "cos": normal(3, 20, seed=1), "sin": normal(3, 20, seed=2),
            "norm": normal(20, seed=3), "key_norm": normal(20, seed=4),
        },
        run_rotate,
        rotated,
    ),
    "linear": Function(
        lambda: {"x": normal(3, 64), "bias": normal(40, seed=1)},
        lambda x, bias: module.product_of(*packed(Q), bias)(x),
        lambda x, bias: linear_of(Q, x, bias),
        without=frozenset({("x", "infinity")}),  # digits of its share in the largest: the row is NaN
    ),
    "linear, its weight": Function(product_parts, run_parts, None, strict=frozenset({"codes", "scale", "zero"})),
    "linear, its static grid": Function(
        lambda: {"x": normal(3, 64), "input_scale": torch.tensor([0.02]), "input_zero_point": torch.tensor([3], dtype=torch.int32)},
        run_static,
        None,
        strict=frozenset({"input_scale", "input_zero_point"}),
    ),
    "linear, what is written": Function(
        lambda: {"x": normal(3, 64), "y": torch.zeros(3, 40), "residual": normal(3, 40, seed=1)},
        run_into,
        into_reference,
        without=frozenset({("x", "infinity")}),
    ),
    "hadamard": Function(lambda: {"x": normal(3, 48)}, hadamard, hadamard_reference),
    "pack_signs": Function(
        lambda: {"x": normal(3, 70)},
        pack_signs,
        lambda x: None if x.dim() == 0 or not x.shape[-1] else _signs(x),
    ),
    "binary_linear": Function(
        lambda: {"x_bits": BITS, "w_tiles": TILES, "scale": normal(20), "token_scale": normal(5)},
        lambda x_bits, w_tiles, scale, token_scale: binary_linear(x_bits, w_tiles, (20, 70), scale=scale, token_scale=token_scale),
        lambda x_bits, w_tiles, scale, token_scale: binary_linear_reference(x_bits, w_tiles, (20, 70), scale, token_scale, torch.float32)
        if w_tiles.shape == (2, 3, 16) and scale.shape == (20,) and token_scale.shape == x_bits.shape[:-1] and x_bits.shape[-1:] == (3,)
        else 1 / 0,
    ),
    "pack": Function(lambda: {"codes": torch.arange(60, dtype=torch.uint8).reshape(4, 15) % 16}, lambda codes: pack(codes, 4), lambda codes: pack_reference(codes, 4)),
    "unpack": Function(
        lambda: {"packed": torch.arange(60, dtype=torch.uint8).reshape(4, 15)},
        lambda packed: unpack(packed, 3, 40),
        lambda packed: unpack_reference(packed, 3, 40) if packed.shape[-1] >= 15 else 1 / 0,
    ),
    "round_on": Function(
        grid_operands,
        lambda x, scale, zero_point: quantizers.round_on(x, ASYM, Grid(scale, zero_point)),
        on_grid,
        without=frozenset({("scale", "NaN"), ("scale", "infinity")}),  # there are no codes on such a grid
    ),
    "restore": Function(
        lambda: {"codes": quantize_tensor(normal(6, 40), ASYM).codes, **{n: t for n, t in grid_operands().items() if n != "x"}},
        lambda codes, scale, zero_point: quantizers.restore(codes, ASYM, Grid(scale, zero_point), torch.float32),
        restored,
    ),
    "sweep": Function(swept, run_sweep, None, strict=frozenset(swept())),
}  # fmt: skip


def _signs(x: torch.Tensor) -> torch.Tensor:
    ones = torch.nn.functional.pad((x > 0).long(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    return (ones << torch.arange(32)).sum(-1).int()


def changes(t: torch.Tensor) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Ways to change an operand."""
    for axis in range(t.dim()):
        yield f"one less of axis {axis}", lambda a=axis: t.narrow(a, 0, t.shape[a] - 1).contiguous()
        yield f"one more of axis {axis}", lambda a=axis: torch.cat((t, t.narrow(a, 0, 1)), dim=a)
        yield f"many more of axis {axis}", lambda a=axis: torch.cat([t] * 40, dim=a)
        yield f"none of axis {axis}", lambda a=axis: t.narrow(a, 0, 0)
    yield "no axis", lambda: t.flatten()[0].clone()
    yield "an axis more", lambda: t[None]
    yield "float64", lambda: t.double()
    yield "float16", lambda: t.half()
    yield "int64", lambda: t.long()
    yield "bool", lambda: t != 0
    yield "every other number", lambda: torch.stack((t, t), dim=-1)[..., 0]
    yield (
        "columns first",
        lambda: t.T.contiguous().T if t.dim() == 2 else t.transpose(0, -1).contiguous().transpose(0, -1),
    )
    yield "expanded", lambda: t[:1].expand(t.shape)
    yield "meta", lambda: t.to("meta")
    yield "fake", lambda: FakeTensorMode().from_tensor(t)
    yield "sparse", lambda: t.to_sparse()
    if t.dtype.is_floating_point:
        yield "a negated view", lambda: torch._neg_view(-t)
        yield "NaN", lambda: torch.where(torch.arange(t.numel()).reshape(t.shape) == t.numel() // 2, torch.nan, t)
        yield "infinity", lambda: torch.where(torch.arange(t.numel()).reshape(t.shape) == t.numel() // 2, torch.inf, t)


KEEPS_ITS_NUMBERS = ("every other number", "columns first", "a negated view", "an axis more")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operands_that_do_not_fit(name: str):
    function = FUNCTIONS[name]
    for which in function.make():
        for how, change in changes(function.make()[which]):
            if (which, how) in function.without:
                continue
            given = function.make()
            given[which] = change()
            check(function, given, which, how)


def check(function: Function, given: Tensors, which: str, how: str) -> None:
    try:
        got = function.run(**given)
    except ArrondiError:
        return
    except Exception:  # PyTorch says of its own operators what layouts and modes it does not take
        if how in ("sparse", "fake"):
            return
        raise
    if got is None or which in function.strict:
        assert got is None or how in KEEPS_ITS_NUMBERS or how in ("NaN", "infinity", "expanded"), (which, how, got)
        return
    if got.device.type == "meta" or type(got) is not torch.Tensor:
        assert how in ("meta", "fake"), (which, how)
        return
    assert function.reference is not None or which == "x", (which, how)
    if function.reference is None:
        return
    try:
        wanted = function.reference(**given)
    except Exception as error:
        raise AssertionError(f"{which}, {how}: taken, and the reference refuses it: {error!r}") from error
    torch.testing.assert_close(
        got.to(wanted.dtype).reshape(wanted.shape), wanted, rtol=1e-2 if how == "float16" else 1e-5, atol=1e-2 if how == "float16" else 2e-5,
        equal_nan=True, msg=lambda text: f"{which}, {how}: {text}",
    )  # fmt: skip


def test_the_sentence_names_the_operand_and_what_was_found():
    with pytest.raises(
        ShapeError,
        match=r"bias must be \(3,\) in float32 or bfloat16, contiguous, on the CPU, got \(4,\) in float64, strides \(1,\) on cpu\.",
    ):
        operand("bias", torch.zeros(4, dtype=torch.float64), (3,), (torch.float32, torch.bfloat16))
    with pytest.raises(ShapeError, match=r"got str\. Pass a torch\.Tensor"):
        operand("bias", "zeros", (3,), torch.float32)
    with pytest.raises(ShapeError, match="a negated view"):
        operand("bias", torch._neg_view(torch.zeros(3)), (3,), torch.float32)
    assert operand("bias", None, (3,), torch.float32) == 0
    assert operand("bias", torch.zeros(0), (0,), torch.float32) == 0


def test_rows_that_are_written_must_not_overlap():
    room = torch.zeros(3, 8)
    assert operand("y", room[:, :5], (3, 5), torch.float32, "rows") == room.data_ptr()
    for wrong in (room[:1].expand(3, 8), room.as_strided((3, 8), (7, 1)), room.T, room[:, ::2]):
        with pytest.raises(ShapeError, match="do not overlap"):
            operand("y", wrong, tuple(wrong.shape), torch.float32, "rows")
    assert operand("x", room[:1].expand(3, 8), (3, 8), torch.float32, "last") == room.data_ptr()


def test_rotary_positions_of_the_wrong_size_write_nothing():
    room = torch.ones(1, 192)
    with pytest.raises(ShapeError, match=r"got x \(1, 32\), 4 \+ 2 heads and cosines \(1, 32\)"):
        rotate(room[:, :32], 4, 2, torch.zeros(1, 32), torch.zeros(1, 32))
    with pytest.raises(ShapeError, match=r"x must be \(100001, 192\)"):
        rotate(room, 4, 2, normal(100001, 32), normal(100001, 32))
    assert bool((room == 1).all())
