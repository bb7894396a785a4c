"""Products with trellis weights on every path: exact sums, sides that are turned, rows that are looked up, layers that are joined."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from arrondi.errors import ShapeError
from arrondi.formats import Scheme, parse_scheme, scale_shape
from arrondi.kernels import (
    KERNELS,
    Meta,
    choose,
    decoded,
    decoded_rows,
    explain,
    integer_linear,
    pack_weight,
    rows_at,
    unpack_weight,
)
from arrondi.kernels.native_linear import TRELLIS, ring_rows
from arrondi.native import native
from arrondi.nn import QEmbedding, QLinear, QStack, joined_product
from arrondi.tensor.nearest import quantize_tensor
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.rows import rows_of
from arrondi.tensor.turned import Sides
from tests.kernels.common import PATHS, assert_same, inputs, normal

compiled = pytest.mark.skipif(native is None, reason="arrondi was installed without its compiled kernels")

PLAIN = ("tcq1-l8", "tcq1.5", "tcq2", "tcq2.5-l10", "tcq3", "tcq3.5", "tcq4", "tcq4-l16")
TURNED = ("tcq2/channel/float16/rht128", "tcq2.5/tensor/rht16:3", "tcq3/channel/bfloat16/rht128:7", "tcq3.5/channel/float16/rht256", "tcq4-l16/channel/rht128")  # fmt: skip
SHAPES = ((16, 5), (300, 96), (812, 130), (256, 300))
"""One ring shorter than a slab; rings of 300 and of 256 and 300; sides in blocks of 4, 2 and 128."""
PLAIN_SQUARES = ("tcq1-l16-square", "tcq2.5-square", "tcq4-l8-square")
TURNED_SQUARES = ("tcq2-square/channel/float16/rht128", "tcq3.5-l10-square/channel/rht16:3")
SQUARE_SHAPES = ((16, 16), (272, 304), (144, 1040))
"""One square; parts of slabs; more columns than a panel has."""
TOKENS = (1, 2, 3, 4, 5, 7, 33)


def shapes_of(text: str) -> tuple[tuple[int, int], ...]:
    return SQUARE_SHAPES if "square" in text else SHAPES


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    assert native is not None
    before = native.path()
    native.use_path(request.param)
    yield request.param
    native.use_path(before)


def weight(text: str | Scheme, shape: tuple[int, int], seed: int = 0) -> QTensor:
    """Random codes and scales."""
    scheme = parse_scheme(f"w={text}").weights if isinstance(text, str) else text
    assert scheme.format.trellis is not None
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor([2**bits for bits in scheme.format.trellis.bits])[torch.arange(shape[0]) % 2, None]
    codes = (torch.randint(0, 256, shape, generator=generator) % levels).to(torch.uint8)
    scale = (torch.rand(scale_shape(scheme.granularity, shape), generator=generator) + 0.5).bfloat16().float() / 256
    sides = None
    if scheme.turned is not None and scheme.turned.seed is None:
        sides = Sides(*((torch.rand(n, generator=generator) + 0.5).half().float() for n in shape))
    return QTensor(codes, scale, None, None, scheme, sides=sides)


def of(q: QTensor, dtype: torch.dtype = torch.float32) -> Meta:
    return Meta(q.scheme, (q.shape[0], q.shape[1]), dtype)


@compiled
def test_integer_sums_are_exact(path: str):
    rounding = inputs("int8/token")
    for text in (*PLAIN, *PLAIN_SQUARES):
        for shape in shapes_of(text):
            q = weight(text, shape)
            tensors, meta = TRELLIS.prepack(q, torch.float32), replace(of(q), inputs=rounding)
            for tokens in TOKENS:
                x = normal(tokens, shape[1], seed=tokens)
                wanted = quantize_tensor(x, rounding.scheme).codes.long() @ q.units().long().T
                assert torch.equal(integer_linear(x, tensors, meta).long(), wanted), (text, shape, tokens)


@compiled
def test_sums_are_exact_at_their_longest(path: str):
    """The largest state everywhere, the largest digits: just below 2³¹; more columns are refused."""
    q = weight("tcq4-l8", (16, 32768))
    codes = torch.stack([torch.tensor(15, dtype=torch.uint8).repeat(32768)] * 16)
    q = replace(q, codes=codes)
    meta = replace(of(q), inputs=inputs("int8/token"))
    tensors = TRELLIS.prepack(q, torch.float32)
    for tokens in (1, 5):
        x = torch.full((tokens, 32768), -2.0)
        assert torch.equal(integer_linear(x, tensors, meta).long(), -127 * q.units().long().sum(1).expand(tokens, -1))
    q = weight("tcq4-l8", (16, 32769))
    with pytest.raises(ShapeError, match="32768"):
        integer_linear(
            torch.ones(1, 32769), TRELLIS.prepack(q, torch.float32), replace(of(q), inputs=inputs("int8/token"))
        )


def check_product(q: QTensor, dtype: torch.dtype, tokens: int, *, bias: bool) -> None:
    """Within what digits of x leave, half a step of the largest of a span; and what float32 sums and the type of the result do."""
    rows, columns = q.shape
    x = normal(tokens, columns, seed=tokens).to(dtype)
    added = normal(rows, seed=5).to(dtype) if bias else None
    real = q.dequantize().double()
    exact = x.double() @ real.T + (0 if added is None else added.double())
    found = TRELLIS.linear(x, TRELLIS.prepack(q, dtype), of(q, dtype), added)
    assert found.dtype is dtype and found.shape == (tokens, rows)
    sizes = (
        q.units().double().abs().sum(1).max() * q.real_scale.abs().max()
    )  # the largest sum of sizes of a row, as it is turned
    run = 1 if q.scheme.turned is None else q.scheme.turned.block
    largest = x.double().norm(dim=1).max().clamp(max=float(x.abs().max()) * run**0.5)
    step = largest / 65278 if dtype is not torch.float32 else largest * 2.0**-22
    error = step * sizes * run**0.5 + torch.finfo(dtype).eps * exact.abs()
    assert bool(((found.double() - exact).abs() <= error + 1e-7).all()), (str(q.scheme), q.shape, dtype, tokens)


@compiled
def test_products_are_those_of_the_dequantized_weight(path: str):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for i, text in enumerate((*TURNED, *PLAIN[1::3], *TURNED_SQUARES, *PLAIN_SQUARES[1:])):
        for j, shape in enumerate(shapes_of(text)):
            q = weight(text, shape, seed=j)
            for k, tokens in enumerate(TOKENS):
                check_product(q, dtypes[(i + j + k) % 3], tokens, bias=(i + k) % 2 == 0)


@compiled
def test_x_may_have_another_type_than_the_weight_was_packed_for(path: str):
    """Nothing is rounded then, whatever pairs of bfloat16 the CPU multiplies."""
    for text in ("tcq2/channel/float16/rht128", TURNED_SQUARES[0]):
        q = weight(text, (256, 128))
        tensors = TRELLIS.prepack(q, torch.float32)
        for tokens in (1, 5, 40):
            x = normal(tokens, 128).bfloat16()
            found = TRELLIS.linear(x, tensors, of(q), None)
            torch.testing.assert_close(found, (x.float() @ q.dequantize().T).bfloat16(), rtol=2e-2, atol=2e-2)


@compiled
def test_sides_that_a_tensor_brings_are_used():
    q = weight("tcq3/channel/rht128:sides", (256, 384))
    check_product(q, torch.float32, 1, bias=False)
    check_product(q, torch.float32, 9, bias=True)
    tensors = TRELLIS.prepack(q, torch.float32)
    ids = torch.tensor([0, 255, 31])
    torch.testing.assert_close(ring_rows(tensors, of(q), ids), q.dequantize()[ids], rtol=1e-5, atol=1e-5)


@compiled
def test_packed_is_the_same_again_and_as_small_as_a_file():
    for text in (*PLAIN, *TURNED, "tcq2/channel/rht128:sides", *PLAIN_SQUARES, *TURNED_SQUARES):
        for shape in shapes_of(text):
            q = weight(text, shape)
            again = TRELLIS.unpack(TRELLIS.prepack(q, torch.float32), of(q))
            assert_same(again, q)
            assert q.sides is None or (again.sides is not None and all(map(torch.equal, q.sides, again.sides)))
    for text, more in (("tcq2/channel/float16/rht128", 0.2), (TURNED_SQUARES[0], 0.12)):
        q = weight(text, (1024, 2048))
        bytes_kept = sum(t.numel() * t.element_size() for t in TRELLIS.prepack(q, torch.float32).values())
        assert bytes_kept * 8 / q.codes.numel() < q.bits_per_weight + more


@compiled
def test_rows_are_those_of_the_dequantized_table(path: str):
    for text in (*PLAIN[::3], *TURNED[:3], *PLAIN_SQUARES[1:], *TURNED_SQUARES):
        for shape in shapes_of(text):
            q = weight(text, shape)
            ids = torch.tensor([0, shape[0] - 1, shape[0] // 2, 3, 3])
            found = ring_rows(TRELLIS.prepack(q, torch.float32), of(q), ids)
            wanted = q.dequantize()
            torch.testing.assert_close(found, wanted[ids], rtol=0, atol=4e-6 * float(wanted.abs().max()) + 1e-6)


def test_the_reference_decodes_whole_rings():
    for text in ("tcq2", *TURNED, "tcq2.5/channel/rht128:sides", "tcq2-l16-3inst-tile/channel/rht128", *TURNED_SQUARES):
        for shape in ((816, 48), (256, 48), (48, 16)):
            q = weight(text, shape)
            packed = pack_weight(q)
            assert_same(unpack_weight(packed, q.scheme, shape), q)
            whole = q.dequantize()
            torch.testing.assert_close(decoded(packed, q.scheme, shape, torch.float32), whole)
            rows = list(decoded_rows(packed, q.scheme, shape, torch.float32, 1))
            torch.testing.assert_close(torch.cat([values for _, values in rows]), whole)
            assert [r for part, _ in rows for r in range(shape[0])[part]] == list(range(shape[0]))
            ids = torch.tensor([shape[0] - 1, 0, 17])
            torch.testing.assert_close(rows_at(packed, q.scheme, shape, ids), whole[ids])
            x = normal(3, shape[1])
            found = KERNELS["reference"].linear(x, KERNELS["reference"].prepack(q, torch.float32), of(q), None)
            torch.testing.assert_close(found, x @ whole.T, rtol=1e-4, atol=1e-4)


def test_what_it_does_not_take_is_said():
    def reason(
        text: str, shape: tuple[int, int] = (256, 256), dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> str:
        return dict(explain(parse_scheme(f"w={text}").weights, shape, dtype, device))["trellis"] or ""

    assert "states of trellises" in reason("int4/channel")
    assert "on the CPU" in reason("tcq2", device="cuda")
    if native is None:
        return
    assert reason("tcq2") == ""
    assert "float64" in reason("tcq2", dtype=torch.float64)
    for text in ("tcq2-l16-3inst-tile", "tcq2-mul1", "tcq5"):
        assert "sums of bytes along rows" in reason(text)
    assert "less than a state" in reason("tcq1-l16", (8, 64))
    assert choose(parse_scheme("TCQ2").weights, (256, 256), torch.bfloat16).name == "trellis"
    assert choose(parse_scheme("w=tcq2-l16-3inst-tile").weights, (256, 256), torch.bfloat16).name == "reference"


@compiled
def test_parts_that_do_not_fit_are_refused():
    q = weight(TURNED[0], (256, 64))
    tensors = TRELLIS.prepack(q, torch.float32)
    for name, wrong in (
        ("codes", tensors["codes"][:1]),
        ("row_side", tensors["row_side"][:5]),
        ("column_side", tensors["row_side"]),
    ):
        with pytest.raises(ShapeError, match=name):
            TRELLIS.linear(torch.ones(1, 64), tensors | {name: wrong}, of(q), None)
    with pytest.raises(ShapeError, match="both sides"):
        TRELLIS.linear(torch.ones(1, 64), {n: t for n, t in tensors.items() if n != "row_side"}, of(q), None)


@compiled
def test_layers_that_read_the_same_are_one_product():
    shapes = ((256, 192), (128, 192), (128, 192))
    layers = [QLinear(weight(TURNED[0], shape, seed=i), normal(shape[0], seed=i)) for i, shape in enumerate(shapes)]
    x, norm, residual = normal(3, 192), normal(192, seed=2), normal(3, 256, seed=4)
    alone = [layer(torch.nn.functional.rms_norm(x, (192,), norm, 1e-5)) for layer in layers]
    product = joined_product(layers, norm=norm, eps=1e-5)
    assert not isinstance(product, str)
    torch.testing.assert_close(product(x), torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)
    for layer, y in zip(layers, alone, strict=True):  # each keeps its own as a view
        torch.testing.assert_close(layer(torch.nn.functional.rms_norm(x, (192,), norm, 1e-5)), y, rtol=1e-4, atol=1e-4)
    assert layers[0].kernel == "trellis"
    gated = joined_product(layers[1:], gate="silu")
    assert not isinstance(gated, str)
    for tokens in (1, 3, 6):
        x = normal(tokens, 192, seed=tokens)
        wanted = torch.nn.functional.silu(layers[1](x)) * layers[2](x)
        torch.testing.assert_close(gated(x), wanted, rtol=1e-4, atol=1e-4)
    added = joined_product(layers[:1])
    assert not isinstance(added, str)
    x = normal(3, 192, seed=8)
    torch.testing.assert_close(added(x, residual), layers[0](x) + residual, rtol=1e-5, atol=1e-5)


@compiled
def test_layers_that_cannot_be_joined_say_why():
    def why(*weights: QTensor) -> str:
        found = joined_product([QLinear(q) for q in weights])
        assert isinstance(found, str)
        return found

    one = weight(TURNED[0], (128, 64))
    assert "tiles of 128 rows" in why(one, weight(TURNED[0], (64, 64)))
    assert "different schemes" in why(one, weight("tcq2/channel/float16/rht128:1", (128, 64)))
    other = "tcq2/channel/rht128:sides"
    assert "different ways" in why(weight(other, (128, 64)), weight(other, (128, 64), seed=1))
    wide = "tcq2/channel/rht256"
    assert "different rows" in why(weight(wide, (256, 64)), weight(wide, (128, 64)))


def test_gradients_reach_x():
    q = weight(TURNED[0], (256, 96))
    layer = QLinear(q)
    x = normal(4, 96).requires_grad_()
    layer(x).square().sum().backward()
    real = q.dequantize()
    wanted = 2 * (x.detach() @ real.T) @ real
    assert x.grad is not None
    torch.testing.assert_close(x.grad, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@compiled
def test_the_operator_has_gradients():
    q = weight(TURNED[2], (256, 96))
    x = normal(4, 96).requires_grad_()
    TRELLIS.linear(x, TRELLIS.prepack(q, torch.float32), of(q), None).sum().backward()
    wanted = q.dequantize().sum(0).expand(4, -1)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_rows_are_cut_out_where_rings_end():
    for shape, start, count in (
        ((512, 64), 0, 256),
        ((768, 64), 256, 512),
        ((640, 64), 256, 384),
        ((600, 64), 256, 344),
    ):
        q = weight(TURNED[0], shape)
        torch.testing.assert_close(rows_of(q, start, count).dequantize(), q.dequantize()[start : start + count])
    for shape, start, count in (
        ((600, 64), 0, 300),
        ((600, 64), 300, 300),
        ((400, 64), 0, 256),
        ((512, 64), 128, 256),
    ):
        with pytest.raises(ShapeError, match="on a trellis cannot be cut out"):
            rows_of(weight(TURNED[0], shape), start, count)


def test_tables_and_stacks_hold_trellises():
    for text in (TURNED[0], "tcq3/tensor", "tcq2/channel/rht256"):
        q = weight(text, (512, 96))
        table = QEmbedding(q)
        ids = torch.tensor([[5, 511], [256, 5]])
        wanted = q.dequantize()
        torch.testing.assert_close(table(ids), wanted[ids], rtol=0, atol=1e-5 * float(wanted.abs().max()))
        assert_same(table.unpack(), q)
    q = weight(TURNED[0], (256, 96))
    stack = QStack([[q, q], [q, q]])
    torch.testing.assert_close(stack[1], q.dequantize().repeat(2, 1))
    assert_same(stack.unpack()[0][1], q)
