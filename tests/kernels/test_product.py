"""`Product` with norm, bias, gate and residual against PyTorch in float64, and weights that are joined to one."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from arrondi.errors import SchemeError, ShapeError
from arrondi.formats import LayerScheme, Scheme, parse_scheme
from arrondi.kernels import native_linear as module
from arrondi.kernels.product import GATES
from arrondi.native import native
from arrondi.tensor.nearest import fake_quantize
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import Grid
from tests.kernels.common import PATHS, inputs, normal, packed, pairwise, weight

pytestmark = pytest.mark.skipif(native is None, reason="arrondi was installed without its compiled kernels")

SCHEMES = ("W4A16", "W8A16", "W2A16_ASYM", "NF4", "W4A8", "W8A8")
SHAPES = ((42, 40), (98, 320), (34, 1040))
"""(out, in): out even, for the gates, and no multiple of 16, nor is half of it; in with a last group that is short."""
ROWS = (1, 2, 3, 5, 17)
PORTION = 400
"""Rows that a gated product computes in two portions, of 384 and of the rest."""
EPS = 0.01
"""As large as the mean square of the activations here."""
STEEPEST = 1.13
"""No gate's slope is larger."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two would wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def weight_and_values(scheme: Scheme, rows: int, columns: int) -> tuple[QTensor, torch.Tensor]:
    q = weight(scheme, (rows, columns))
    return q, q.dequantize(torch.float64)


def silu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gate and the exponent z of x · sigmoid(z)."""
    return x * torch.sigmoid(x), x


def gelu_tanh(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z = 2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    return x * torch.sigmoid(z), z


REFERENCES = {"silu": silu, "gelu_tanh": gelu_tanh}


@dataclass
class Near:
    """Numbers in float64, and how far from them float32 may be."""

    value: torch.Tensor
    bound: torch.Tensor


def normed_reference(x: torch.Tensor, norm: torch.Tensor) -> Near:
    """A sum of squares in 16 lanes loses at most half a unit of 2^-24 a step; half of that is left behind the root."""
    x = x.double()
    value = x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * norm.double()
    return Near(value, value.abs() * (x.shape[-1] / 16 * 2.0**-25 + 2.0**-22))


def product_reference(x: Near, scheme: LayerScheme, w: torch.Tensor, bias: torch.Tensor, roundoff: float) -> Near:
    """x Wᵀ + bias of values that are off by up to x.bound. Where int8 is asked for and x lies that close to the edge
    between two codes, either may be chosen."""
    values, doubt = x.value, x.bound
    if scheme.inputs is not None:
        values = fake_quantize(x.value.float(), scheme.inputs.scheme).double()
        step = x.value.abs().amax(dim=-1, keepdim=True) / 127.5
        off_edge = (x.value / step - (x.value / step).floor() - 0.5).abs()
        doubt = torch.where(off_edge * step <= 2 * doubt + 2.0**-22 * x.value.abs(), step, 2.0**-18 * values.abs())
    sizes = values.abs() @ w.abs().T + bias.double().abs()
    return Near(values @ w.T + bias.double(), roundoff * sizes + doubt @ w.abs().T)


def gate_reference(y: Near, gate: str) -> Near:
    """gate(first half) · second half; e^z is as good as z, and no larger than 2^125."""
    (g, u), (dg, du) = y.value.chunk(2, dim=-1), y.bound.chunk(2, dim=-1)
    gated, z = REFERENCES[gate](g)
    relative = 2.0**-21 + 2.0**-22 * z.abs() * torch.sigmoid(-z)
    near = STEEPEST * dg * (u.abs() + du) + gated.abs() * du
    return Near(gated * u, near + (gated * u).abs() * relative + (g * u).abs() * 2.0**-124)


def inside(dtype: torch.dtype, path: str) -> float:
    """What is lost before the result is rounded, in units of the sum of sizes: digits of 23 and of 15 bits beside the sign, of
    which the largest of 256 numbers takes some; paths with products of bfloat16 round weights to it."""
    return 2.0**-20 if dtype == torch.float32 else 2.0**-7 if path in ("avx512_bf16", "avx512_amx") else 2.0**-12


def close(y: torch.Tensor, wanted: Near) -> bool:
    half = 2.0**-23 if y.dtype == torch.float32 else 2.0**-8
    return bool(((y.double() - wanted.value).abs() <= wanted.bound * 1.01 + half * wanted.value.abs() + 1e-30).all())


TYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("path", "text", "before", "after", "dtype"),
    pairwise(PATHS, SCHEMES, ("norm", "as-it-is"), ("silu", "gelu_tanh", "residual"), TYPES),
    indirect=["path"],
)
def test_it_is_the_product_of_pytorch(path: str, text: str, before: str, after: str, dtype: torch.dtype):
    scheme = parse_scheme(text)
    gate = after if after in GATES else None
    for (out, columns), rows in [*itertools.product(SHAPES, ROWS), *([(SHAPES[1], PORTION)] if gate else [])]:
        q, values = weight_and_values(scheme.weights, out, columns)
        norm = (1 + 0.3 * normal(columns, seed=1)) if before == "norm" else None
        bias, x = normal(out, seed=2) * 0.3, (normal(rows, columns, seed=rows) * 0.1).to(dtype)
        if norm is None:
            x = x * 8
        tensors, meta = packed(q, dtype, scheme.inputs)
        product = module.product_of(tensors, meta, bias, norm=norm, eps=EPS, gate=gate)
        residual = None if gate else (normal(rows, out + 3, seed=4) * 2).to(dtype)[:, :out]
        y = product(x, residual)
        given = Near(x.double(), x.double() * 0) if norm is None else normed_reference(x, norm)
        wanted = product_reference(given, scheme, values, bias, inside(dtype, path))
        if gate is not None:
            wanted = gate_reference(wanted, gate)
        if residual is not None:
            sizes = wanted.value.abs() + residual.double().abs()
            wanted = Near(wanted.value + residual.double(), wanted.bound + 2.0**-23 * sizes)
        assert y.dtype == dtype and y.shape == (rows, out // 2 if gate else out)
        assert close(y, wanted), (out, columns, rows)


def test_the_norm_of_small_numbers_counts_eps_and_zeros_stay_finite(path: str):
    q = weight(parse_scheme("W4A16").weights, (32, 64))
    x = normal(3, 64)
    x[1] *= 1e-3
    x[2] = 0
    for eps in (1e-6, 1e-12):
        y = module.product_of(*packed(q), None, norm=torch.ones(64), eps=eps)(x)
        exact = nn.functional.rms_norm(x.double(), (64,), eps=eps) @ q.dequantize(torch.float64).T
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
        assert not bool(y[2].any())
    large, small = (module.product_of(*packed(q), None, norm=torch.ones(64), eps=eps)(x[1:2]) for eps in (1e-6, 1e-12))
    square = float(x[1].double().square().mean())
    ratio = ((square + 1e-12) / (square + 1e-6)) ** 0.5
    assert ratio < 0.8
    torch.testing.assert_close(large, small * ratio, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("path", "gate", "dtype"), pairwise(PATHS, REFERENCES, TYPES), indirect=["path"])
def test_gates_far_out(path: str, gate: str, dtype: torch.dtype):
    """e^100 and more, and cubes that float32 cannot hold."""
    far = [100.0, -100.0, 1e30, -1e30, 12.0, -12.0, 0.0, -0.0, 1e-30]
    half = 24
    q = weight(parse_scheme("W8A16").weights, (2 * half, 64))
    q.scale[: len(far)] = 0.0  # their results are the bias
    bias = normal(2 * half, seed=1)
    bias[: len(far)] = torch.tensor(far)
    for rows in (1, 7):
        x = normal(rows, 64, seed=rows).to(dtype)
        y = module.product_of(*packed(q, dtype), bias, gate=gate)(x)
        given = Near(x.double(), x.double() * 0)
        before = product_reference(given, parse_scheme("W8A16"), q.dequantize(torch.float64), bias, inside(dtype, path))
        before.bound[:, : len(far)] = 0
        assert close(y, gate_reference(before, gate)), rows
        assert bool((y[:, [1, 3]].abs() < 1e-7 * before.value[:, half:][:, [1, 3]].abs() + 1e-30).all())


def test_nan_stays_nan_and_where_it_is(path: str):
    for dtype in TYPES:
        scheme = parse_scheme("W4A16").weights
        q, half = weight(scheme, (72, 64)), 36
        bias = normal(72, seed=1)
        for gate, rows in itertools.product(REFERENCES, (1, 3, 9)):
            x = normal(rows, 64, seed=2).to(dtype)
            clean = module.product_of(*packed(q, dtype), bias, gate=gate)(x)
            for place in (5, half + 7):  # in front of the gate, and behind it
                dirty = bias.clone()
                dirty[place] = torch.nan
                y = module.product_of(*packed(q, dtype), dirty, gate=gate)(x)
                assert bool(torch.isnan(y[:, place % half]).all())
                others = torch.arange(half) != place % half
                assert torch.equal(y[:, others], clean[:, others])
            x[rows // 2, 9] = torch.nan
            for norm in (None, torch.ones(64)):
                wanted = module.product_of(*packed(q, dtype), bias, norm=norm, gate=gate)
                clear = torch.where(torch.isnan(x), 1, x)
                y, whole = wanted(x), wanted(clear)
                assert bool(torch.isnan(y[rows // 2]).all())
                others = torch.arange(rows) != rows // 2
                assert torch.equal(y[others], whole[others])
        residual = normal(2, 72, seed=3).to(dtype)
        residual[1, 4] = torch.nan
        y = module.product_of(*packed(q, dtype), None)(normal(2, 64).to(dtype), residual)
        assert torch.isnan(y).nonzero().tolist() == [[1, 4]]


@pytest.mark.parametrize("gate", [None, *REFERENCES])
def test_strides_axes_and_types_of_x(gate: str | None):
    q = weight(parse_scheme("W4A16").weights, (48, 320))
    product = module.product_of(*packed(q), normal(48, seed=1), norm=torch.ones(320), eps=EPS, gate=gate)
    out = 48 if gate is None else 24
    wide = normal(7, 640)
    for x in (wide[:, 5:325], wide[:, ::2], normal(320, 9, seed=2).T, wide[:1, :320].expand(4, 320)):
        assert torch.equal(product(x), product(x.contiguous()))
    deep = wide[:6, :320].reshape(2, 3, 320)
    assert torch.equal(product(deep), product(wide[:6, :320]).reshape(2, 3, out))
    assert product(wide[0, :320]).shape == (out,)
    assert product(wide[:0, :320]).shape == (0, out)
    halves = wide[:, :320].half()
    y = module.product_of(*packed(q, torch.float16), normal(48, seed=1), norm=torch.ones(320), eps=EPS, gate=gate)(
        halves
    )
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), product(halves.float()), rtol=2.0**-10, atol=2.0**-9)


def test_results_are_written_where_they_belong():
    q = weight(parse_scheme("W4A16").weights, (42, 64))
    x, residual = normal(5, 64), normal(5, 42, seed=1)
    for gate, out in ((None, 42), ("silu", 21)):
        product = module.product_of(*packed(q), None, gate=gate)
        added = None if gate else residual
        room = torch.full((5, 50), 7.0)
        product.into(x, room[:, 3 : 3 + out], added)
        assert torch.equal(room[:, 3 : 3 + out], product(x, added))
        assert bool((room[:, :3] == 7).all()) and bool((room[:, 3 + out :] == 7).all())


def test_results_do_not_depend_on_the_number_of_threads():
    q = weight(parse_scheme("W4A16").weights, (300, 512))
    product = module.product_of(*packed(q), None, norm=torch.ones(512), eps=EPS, gate="silu")
    for rows in (1, 5, PORTION):
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(product(normal(rows, 512)))
        assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(2, 63), r"\(\.\.\., 64\).*\(48, 64\), got \(2, 63\)"),
        (torch.zeros(64, 2), r"got \(64, 2\)"),
        (torch.zeros(()), r"got \(\)"),
        (torch.zeros(2, 64, dtype=torch.float64), "float64"),
        (torch.zeros(2, 64, device="meta"), "meta"),
    ],
    ids=["narrow", "flipped", "scalar", "float64", "meta"],
)
def test_an_x_that_does_not_fit(x: torch.Tensor, words: str):
    q = weight(parse_scheme("W4A16").weights, (48, 64))
    for gate in (None, "silu"):
        with pytest.raises(ShapeError, match=words):
            module.product_of(*packed(q), None, gate=gate)(x)


def test_what_a_gate_does_not_go_with():
    scheme = parse_scheme("W4A16").weights
    odd = module.product_of(*packed(weight(scheme, (33, 64))), None, gate="silu")
    with pytest.raises(ValueError, match="as many rows before as behind"):
        odd(torch.ones(1, 64))
    even = module.product_of(*packed(weight(scheme, (32, 64))), None, gate="silu")
    with pytest.raises(ValueError, match="nothing that is added"):
        even(torch.ones(1, 64), torch.ones(1, 16))
    with pytest.raises(SchemeError, match=r"Unknown gate 'relu'.*Known: gelu_tanh, silu"):
        module.product_of(*packed(weight(scheme, (32, 64))), None, gate="relu")


JOINED = (
    *SCHEMES, "w=uint4/g32/offset", "w=int4/channel,a=int8/token", "BINARY", "w=ternary/channel", "W8A8 static",
    "w=lut4/g32/t:int8:16", "w=lut3/channel/t:float16",
)  # fmt: skip


def check_joined(text: str, dtype: torch.dtype) -> None:
    grid = Grid(torch.tensor(0.02)) if text.endswith("static") else None
    scheme = parse_scheme(text if grid is None else "w=int8/channel,a=int8/tensor/static")
    sizes = (48, 16, 32)
    apart = [packed(weight(scheme, (n, 320), seed=n), dtype, scheme.inputs, grid) for n in sizes]
    joined = module.join(apart)
    assert not isinstance(joined, str)
    tensors, meta = joined
    assert meta.shape == (96, 320)
    views = module.pieces(tensors, sizes)
    for name, tensor in tensors.items():
        assert all(view[name].untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for view in views)
        assert name in ("table", "input_scale") or sum(view[name].numel() for view in views) == tensor.numel()
    for rows in (1, 5, 40):
        x = normal(rows, 320, seed=rows).to(dtype)
        before = [module.product_of(t, m, None)(x) for t, m in apart]
        after = [module.product_of(v, m, None)(x) for v, (_, m) in zip(views, apart, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert torch.equal(module.product_of(tensors, meta, None)(x), torch.cat(before, dim=1))


def test_joined_weights_are_read_as_before(path: str):
    for i, text in enumerate(JOINED):
        check_joined(text, TYPES[(i + PATHS.index(path)) % 2])


@pytest.mark.full
@pytest.mark.parametrize("dtype", TYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("text", JOINED)
def test_joined_weights_of_every_scheme_and_type(path: str, text: str, dtype: torch.dtype):
    check_joined(text, dtype)


def test_scales_of_two_types_are_joined_in_the_wider_one():
    scheme = parse_scheme("w=int4/g32/float32").weights
    apart = [packed(weight(scheme, (rows, 64), seed=rows)) for rows in (32, 16)]
    apart[0][0]["scale"] = apart[0][0]["scale"].bfloat16()
    assert {t["scale"].dtype for t, _ in apart} == {torch.bfloat16, torch.float32}
    joined = module.join(apart)
    assert not isinstance(joined, str)
    x = normal(3, 64)
    before = torch.cat([module.product_of(t, m, None)(x) for t, m in apart], dim=1)
    assert torch.equal(module.product_of(*joined, None)(x), before)


def test_weights_that_differ_are_not_joined_and_say_why():
    four, eight = (parse_scheme(text) for text in ("W4A16", "W8A16"))
    one = packed(weight(four.weights, (32, 64)))
    by_hand = {name if name != "zero" else "offset": t for name, t in one[0].items()} | {
        "offset": torch.zeros(2, 1, 16)
    }
    for other, words in (
        (packed(weight(eight.weights, (32, 64))), "have different schemes."),
        (packed(weight(four.weights, (32, 128))), "have different numbers of columns."),
        (packed(weight(four.weights, (24, 64))), "are joined in tiles of 16 rows, and one has 24 rows."),
        (packed(weight(four.weights, (32, 64)), torch.bfloat16), "have different types."),
        (packed(weight(four.weights, (32, 64)), rounding=inputs("int8/token")), "have different ways to round them."),
        ((by_hand, one[1]), "have different ways to keep zero points."),
    ):  # fmt: skip
        for pair in ([one, other], [other, one]):
            assert module.join(pair) == f"Layers that read the same activations {words}"
    assert isinstance(module.join([packed(weight(four.weights, (24, 64)))]), str)
    assert not isinstance(module.join([one, one]), str)
