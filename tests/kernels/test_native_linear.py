"""The compiled products: exact sums, every path, every awkward input. Errors over all schemes: test_differential.py."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import warnings
from typing import Any

import pytest
import torch

from arrondi.errors import ArrondiError, SchemeError, ShapeError
from arrondi.formats import FORMATS, ActivationScheme, PerChannel, Scheme, parse_scheme
from arrondi.kernels import KERNELS, integer_linear
from arrondi.kernels import native_linear as module
from arrondi.kernels.native_linear.coding import KIND, packing_of
from arrondi.native import native
from arrondi.nn import QLinear
from arrondi.tensor.nearest import fake_quantize, quantize_tensor, quantize_with
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import Grid
from tests.kernels.common import PATHS, inputs, normal, packed, weight

pytestmark = pytest.mark.skipif(native is None, reason="arrondi was installed without its compiled kernels")

INT8_TOKENS = inputs("int8/token")
TOKEN_SCHEMES = (INT8_TOKENS, inputs("int8/token/asym"), inputs("uint4/token/asym"))
STATIC_SCHEMES = (
    (inputs("int8/tensor/static"), Grid(torch.tensor(0.013))),
    (inputs("int8/tensor/asym/static"), Grid(torch.tensor(0.02), torch.tensor(-90))),
    (inputs("uint4/tensor/asym/static"), Grid(torch.tensor(0.4), torch.tensor(7))),
)
TOKENS = (1, 2, 3, 4, 5, 7, 16, 65)
SHAPES = ((1, 1), (16, 32), (17, 33), (130, 300), (5, 1030))
INTEGERS = (
    "w=int8/channel", "w=uint8/channel/asym", "w=int4/channel", "w=uint4/channel/asym", "w=int3/channel", "w=int2/channel",
    "w=int5/tensor", "w=int6/channel", "w=int7/channel",
)  # fmt: skip


def test_integer_sums_are_exact(path: str):
    for text, (rows, columns) in itertools.product(INTEGERS, SHAPES):
        q = weight(text, (rows, columns))
        for rounding, grid in (*((scheme, None) for scheme in TOKEN_SCHEMES), *STATIC_SCHEMES):
            tensors, meta = packed(q, rounding=rounding, grid=grid)
            for tokens in (1, 3, 5, 16, 65):
                x = normal(tokens, columns, seed=tokens)
                assert torch.equal(integer_linear(x, tensors, meta).long(), exact_sums(x, rounding, grid, q)), (
                    text, rows, columns, tokens, str(rounding),
                )  # fmt: skip


def exact_sums(x: torch.Tensor, rounding: ActivationScheme, grid: Grid | None, q: QTensor) -> torch.Tensor:
    """Σ (code(x) - zero point) · (code(w) - zero point) in int64."""
    scheme = rounding.scheme
    rounded = quantize_tensor(x, scheme) if grid is None else quantize_with(x, scheme, grid)
    of_x, of_w = (0 if t.zero_point is None else t.zero_point.long() for t in (rounded, q))
    return (rounded.codes.long() - of_x) @ (q.codes.long() - of_w).T


def test_sums_with_two_zero_points_are_exact_at_their_longest(path: str):
    """All of them 255 · 255 · 32768: just below 2³¹."""
    q = quantize_tensor(torch.full((17, 32768), 3.0), "w=uint8/channel/asym")
    rounding = inputs("uint8/token/asym")
    for x in (torch.full((2, 32768), 0.5), torch.full((5, 32768), -0.5)):
        tensors, meta = packed(q, rounding=rounding)
        sums = integer_linear(x, tensors, meta)
        assert torch.equal(sums.long(), exact_sums(x, rounding, None, q))
        assert int(sums[0, 0].abs()) == 255 * 255 * 32768


ROUNDED = (
    "W8A8", "W4A8", "w=int4/g32,a=int8/token", "w=int2/g64/asym,a=int8/token/bfloat16", "w=int8/channel,a=int8/token/asym",
    "w=int4/g32/asym,a=uint8/token/asym/bfloat16", "w=uint4/g64/offset,a=int8/token/asym", "w=int4/g32,a=int4/token",
    "w=int4/g128,a=int8/g32", "w=int3/g32,a=int8/g128/asym", "w=int8/channel,a=int8/g64",
    "w=int5/g16/asym,a=uint4/g32/asym/bfloat16", "w=int2/tensor,a=int8/g512", "w=int8/channel,a=int8/tensor/static",
    "w=int4/g32/asym,a=int8/tensor/static", "w=ternary/channel,a=uint8/tensor/asym/static", "w=nf4/g64,a=int8/tensor/static",
    "w=lut4/channel,a=int8/token", "w=lut3/g64,a=int8/g64/asym", "w=lut2/channel/t:float16,a=int8/token",
)  # fmt: skip


def check_rounded(text: str, dtype: torch.dtype) -> None:
    scheme = parse_scheme(text)
    assert scheme.inputs is not None
    grid = None
    if not scheme.inputs.dynamic:
        grid = Grid(torch.tensor(0.017), torch.tensor(130) if scheme.inputs.scheme.zero_point == "integer" else None)
    for (rows, columns), tokens in itertools.product(SHAPES, TOKENS):
        q = weight(text, (rows, columns), seed=1)
        x = normal(tokens, columns, seed=tokens, dtype=dtype)
        values = fake_quantize(x.float(), scheme.inputs.scheme, grid).double()
        if module.rounds(q.scheme, scheme.inputs):
            y = module.linear(x, *packed(q, dtype, scheme.inputs, grid), None)
        else:  # codes that are no integers: the layer rounds
            y = QLinear(q, inputs=scheme.inputs, input_grid=grid, dtype=dtype)(x)
            values = values if dtype == torch.float32 else values.to(dtype).double()
        wanted = values @ q.dequantize(torch.float64).T
        bound = values.abs() @ q.dequantize(torch.float64).abs().T
        roundoff = 2.0**-20 if dtype == torch.float32 else 2.0**-7
        assert bool(((y.double() - wanted).abs() <= roundoff * bound + 1e-30).all()), (
            text,
            dtype,
            rows,
            columns,
            tokens,
        )


def test_rounded_activations_are_those_of_the_reference(path: str):
    for i, text in enumerate(ROUNDED):
        check_rounded(text, (torch.float32, torch.bfloat16)[(i + PATHS.index(path)) % 2])


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", ROUNDED)
def test_rounded_activations_of_every_scheme_and_type(path: str, text: str, dtype: torch.dtype):
    check_rounded(text, dtype)


CODINGS = (
    "W4A16", "W3A16", "W2A16_ASYM", "W5A16", "W6A16", "W8A16", "NF4", "FP8A16", "NVFP4A16", "MXFP6", "BINARY", "T158",
    "w=fp8_e5m2/channel", "w=fp6_e2m3/g32", "w=uint4/g32/offset", "w=lut4/channel", "w=lut3/g32/t:int8:16", "w=lut2/g64/t:int8:all",
    "w=lut4/g128/t:float16", "w=lut3/channel/offset/t:bfloat16:5", "w=lut2/tensor/t:float32", "Q2_K", "Q4_K", "Q6_K", "IQ4_XS",
)  # fmt: skip
"""One for each way in which codes are kept."""


def test_every_path_agrees_with_the_reference(path: str):
    types = (torch.float32, torch.bfloat16)
    for text, (rows, columns), dtype in itertools.product(CODINGS, SHAPES, types):
        q = weight(text, (rows, columns))
        tensors, meta = packed(q, dtype)
        bias = normal(rows, seed=3, dtype=dtype)
        for tokens in TOKENS:
            x = normal(tokens, columns, seed=tokens, dtype=dtype)
            y = module.linear(x, tensors, meta, bias)
            wanted = x.double() @ q.dequantize(torch.float64).T + bias.double()
            bound = x.double().abs() @ q.dequantize(torch.float64).abs().T + bias.double().abs()
            roundoff = 2.0**-20 if dtype == torch.float32 else 2.0**-7
            assert y.dtype == dtype
            assert bool(((y.double() - wanted).abs() <= roundoff * bound + 1e-30).all()), (
                text,
                rows,
                columns,
                tokens,
                dtype,
            )


def test_the_codings_are_all_there():
    kinds = {packing_of(parse_scheme(text).weights, (16, 64)).kind for text in CODINGS}
    assert kinds | {KIND["table4"], KIND["float4"], KIND["ring"]} == set(KIND.values())


def test_the_error_in_float32_is_that_of_a_few_roundings(path: str):
    """In units of 2⁻²⁴ of the root of the sum of squares of all terms: steps of the digits, one for each product, some for the
    sums of spans. A plain product in float32 has 9 to 13."""
    x = normal(8, 4096)
    for text in ("W4A16", "W8A16", "W2A16", "NF4", "w=lut4/channel", "w=lut4/g128/t:float16"):
        q = weight(text, (64, 4096))
        w = q.dequantize(torch.float64)
        error = module.linear(x, *packed(q), None).double() - x.double() @ w.T
        terms = (x.double().square() @ w.square().T).sum().sqrt()
        assert error.norm() <= 16 * 2.0**-24 * terms, text


def test_outliers_do_not_cost_the_other_columns_their_digits():
    x = torch.randn(4, 1024, generator=torch.Generator().manual_seed(0))
    x[:, 7] *= 1e4
    q = weight("W4A16", (32, 1024))
    q.codes[:, 7] = 0  # the outlier meets a zero weight
    tensors, meta = packed(q)
    exact = x.double() @ q.dequantize(torch.float64).T
    rest = x.clone()
    rest[:, 7] = 0
    near = (rest[:, :256].abs().sum() + 0.0).item()
    error = (module.linear(x, tensors, meta, None).double() - exact).abs().max().item()
    assert error < 1e4 * 2.0**-22 * near


def test_views_strides_and_many_axes():
    q = weight("W4A16", (48, 320))
    tensors, meta = packed(q)
    wide = torch.randn(7, 640, generator=torch.Generator().manual_seed(0))
    plain = module.linear(wide[:, 5:325].contiguous(), tensors, meta, None)
    assert torch.equal(module.linear(wide[:, 5:325], tensors, meta, None), plain)
    every_other = wide[:, ::2]
    assert torch.equal(
        module.linear(every_other, tensors, meta, None), module.linear(every_other.contiguous(), tensors, meta, None)
    )
    flipped = torch.randn(320, 9, generator=torch.Generator().manual_seed(1)).T
    assert torch.equal(
        module.linear(flipped, tensors, meta, None), module.linear(flipped.contiguous(), tensors, meta, None)
    )
    deep = wide[:, :320].reshape(7, 1, 320).expand(7, 3, 320)
    assert module.linear(deep, tensors, meta, None).shape == (7, 3, 48)
    assert module.linear(wide[0, :320], tensors, meta, None).shape == (48,)
    assert module.linear(wide[:0, :320], tensors, meta, None).shape == (0, 48)


def test_nan_and_infinity_reach_only_their_own_row(path: str):
    whole = ((torch.float32, None), (torch.bfloat16, None), (torch.float32, INT8_TOKENS))
    cases = {"W4A16": whole, "w=lut4/channel": whole, "w=lut3/channel/t:float16": whole[:2]}
    for q, dtype, activations in ((weight(text, (20, 300)), *case) for text, some in cases.items() for case in some):
        tensors, meta = packed(q, dtype, activations)
        x = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
        clean = module.linear(x, tensors, meta, None)
        x[2, 17], x[4, 200] = torch.nan, torch.inf
        dirty = module.linear(x, tensors, meta, None)
        assert not bool(torch.isfinite(dirty[[2, 4]]).any())
        assert torch.equal(dirty[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


def test_nan_scales_and_nan_codes_show():
    q = weight("W4A16", (20, 256))
    q.scale[3, 1] = torch.nan
    tensors, meta = packed(q)
    y = module.linear(torch.ones(2, 256), tensors, meta, None)
    assert bool(torch.isnan(y[:, 3]).all())
    assert bool(torch.isfinite(y[:, :3]).all())
    q = weight("FP8A16", (20, 256))
    q.codes[5, 9] = 0x7F
    tensors, meta = packed(q)
    y = module.linear(torch.ones(2, 256), tensors, meta, None)
    assert bool(torch.isnan(y[:, 5]).all())
    assert bool(torch.isfinite(y[:, 6:]).all())


def test_zeros_and_the_smallest_numbers():
    q = weight("W4A16", (16, 64))
    for dtype, activations in ((torch.float32, None), (torch.bfloat16, None), (torch.float32, INT8_TOKENS)):
        tensors, meta = packed(q, dtype, activations)
        assert not bool(module.linear(torch.zeros(3, 64, dtype=dtype), tensors, meta, None).any())
        tiny = torch.full((1, 64), 1e-38).to(dtype)
        assert bool(torch.isfinite(module.linear(tiny, tensors, meta, None)).all())


def test_what_it_refuses():
    refuse = KERNELS["native"].refuse
    w4, cpu = parse_scheme("W4A16").weights, torch.device("cpu")
    assert "not empty" in (refuse(w4, (16, 0), torch.float32, cpu) or "")
    assert "not empty" in (refuse(w4, (16,), torch.float32, cpu) or "")
    assert "float64" in (refuse(w4, (16, 128), torch.float64, cpu) or "")
    assert "meta" in (refuse(w4, (16, 128), torch.float32, torch.device("meta")) or "")
    assert "24" in (refuse(parse_scheme("w=int4/g24").weights, (16, 96), torch.float32, cpu) or "")
    assert "65536" in (refuse(w4, (16, 131072), torch.float32, cpu) or "")
    assert "dynamic8" in (refuse(Scheme(FORMATS["dynamic8"], PerChannel()), (16, 96), torch.float32, cpu) or "")


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(2, 63)}, r"\(2, 63\)"),
    ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "float64"),
    ({"x": torch.zeros(64, 2)}, r"\(64, 2\)"),
    ({"bias": torch.zeros(17)}, r"bias must be \(16,\).*got \(17,\)"),
    ({"codes": torch.zeros(3, dtype=torch.uint8)}, r"codes .*got \(3,\)"),
    ({"codes": None}, "codes .* missing"),
    ({"scale": torch.zeros(1, 3, 16)}, r"scale .*got \(1, 3, 16\)"),
    ({"scale": torch.zeros(1, 2, 16, dtype=torch.float64)}, "scale .*float64"),
    ({"scale": torch.zeros(1, 2, 16, device="meta")}, "one device"),
    ({"zero": torch.zeros(5, dtype=torch.uint8)}, r"zero .*got \(5,\)"),
    ({"input_scale": torch.zeros(2)}, r"input_scale .*got \(2,\)"),
    ({"facts": {"groups": 3}}, "2 groups, got 3"),
    ({"facts": {"kind": 99}}, "kind"),
    ({"facts": {"columns": -64}}, "positive"),
    ({"facts": {"rows": 2**31}}, "positive"),
    ({"facts": {"counted": 4}}, "kind"),
    ({"facts": {"counted": 2}, "scale": torch.zeros(1, 2, 16, dtype=torch.uint8)}, "unit .* missing"),
    ({"facts": {"counted": 2}, "unit": torch.zeros(1, 2, 16)}, "scale .* in uint8"),
    ({"facts": {"run": 0}}, "positive"),
    ({"facts": None}, "17 facts, got"),
]


def test_bad_arguments_of_the_operator_are_exceptions():
    for change, words in BAD_ARGUMENTS:
        tensors, meta = packed(weight("w=int4/g32", (16, 64)))
        facts = module.facts_of(tensors, meta)
        given = {"x": torch.zeros(2, 64), "bias": None, "facts": {}} | change
        numbers = [3, 16] if given["facts"] is None else facts._replace(**given["facts"])
        parts = module.parts_of(tensors)._replace(**{n: t for n, t in change.items() if n in module.Parts._fields})
        with pytest.raises(ShapeError, match=words):
            torch.ops.arrondi.linear(given["x"], parts, numbers, given["bias"], 3, None)


BAD_ROUNDINGS: list[list[int]] = [
    [-128, 127, 0],
    [0, 256, 0, 0],
    [5, 5, 0, 0],
    [-300, 0, 0, 0],
    [-128, 127, 0, 48],
    [-128, 127, 0, -32],
    [-128, 127, 0, 1024],
    [-128, 127, 2, 0],
    [-128, 127, 7, 0],
    [-1, 2**31 - 1, 0, 0],
    [-128, 2**32 + 127, 0, 0],
    [-128, 127, 0, 2**32],
    [1, 127, 0, 0],
]


def test_bad_codes_of_activations_are_exceptions():
    tensors, meta = packed(weight("w=int4/g32", (16, 64)))
    parts, facts = module.parts_of(tensors), module.facts_of(tensors, meta)
    for rounding, digits in itertools.product(BAD_ROUNDINGS, (1, 2)):
        with pytest.raises(ShapeError, match="rounding of activations"):
            torch.ops.arrondi.linear(torch.zeros(2, 64), parts, facts, None, digits, rounding)
    with pytest.raises(ShapeError, match="2 or 3 digits, got 1"):
        torch.ops.arrondi.linear(torch.zeros(2, 64), parts, facts, None, 1, None)


@pytest.mark.parametrize("text", ["w=int4/g32,a=int8/g48", "w=int4/g64,a=int8/g96", "TERNARY,a=int8/g64",
                                  "w=int4/g32,a=int8/token/offset", "w=int4/g32,a=uint8/token", "NF4,a=int8/token",
                                  "w=int4/g32,a=ternary/token", "w=int4/g32,a=ternary/g64"])  # fmt: skip
def test_what_the_kernel_does_not_round(text: str):
    """And the layer rounds instead."""
    weights, _, activations = text.partition(",a=")
    rounding = inputs(activations)
    q = weight(weights, (17, 192))
    assert not module.rounds(q.scheme, rounding)
    x = normal(3, 192)
    wanted = fake_quantize(x, rounding.scheme).double() @ q.dequantize(torch.float64).T
    assert torch.allclose(QLinear(q, inputs=rounding)(x).double(), wanted, rtol=1e-4, atol=1e-4)


def test_exact_sums_need_rounded_activations_and_one_group():
    tensors, meta = packed(weight("w=int4/g32", (16, 64)), rounding=INT8_TOKENS)
    with pytest.raises(SchemeError, match="one scale a row"):
        integer_linear(torch.zeros(1, 64), tensors, meta)
    tensors, meta = packed(weight("w=int4/channel", (16, 32769)), rounding=TOKEN_SCHEMES[1])
    with pytest.raises(SchemeError, match="up to 32768 columns"):
        integer_linear(torch.zeros(1, 32769), tensors, meta)


def test_the_operator_can_be_traced():
    q = weight("W4A16", (16, 128))
    tensors, meta = packed(q)
    arguments = (
        torch.randn(3, 128),
        list(module.parts_of(tensors)),
        list(module.facts_of(tensors, meta)),
        torch.randn(16),
        3,
        None,
    )
    torch.library.opcheck(
        torch.ops.arrondi.linear, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )


def test_a_layer_is_exported_with_its_operator():
    layer = QLinear(weight("W4A16", (16, 128)), torch.randn(16))
    x = torch.randn(3, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(layer, (x,))
    assert "arrondi.linear" in str(exported.graph)
    assert torch.equal(exported.module()(x), layer(x))


def test_a_layer_forgets_addresses_when_it_is_copied_or_changed():
    import copy
    import pickle

    layer = QLinear(weight("W4A16", (16, 128)), torch.randn(16))
    x = torch.randn(3, 128)
    wanted = layer(x)
    copied = copy.deepcopy(layer)
    again = pickle.loads(pickle.dumps(layer))
    layer.packed_codes.zero_()
    assert torch.equal(copied(x), wanted)
    assert torch.equal(again(x), wanted)
    assert not torch.equal(layer(x), wanted)


def test_several_threads_may_call_at_once():
    q = weight("W4A16", (256, 512))
    tensors, meta = packed(q)
    x = torch.randn(70, 512, generator=torch.Generator().manual_seed(0))
    wanted = module.linear(x, tensors, meta, None)
    wrong = []

    def work() -> None:
        for _ in range(20):
            if not torch.equal(module.linear(x, tensors, meta, None), wanted):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def test_results_do_not_depend_on_the_number_of_threads():
    q = weight("W4A16", (300, 512))
    tensors, meta = packed(q)
    before = torch.get_num_threads()
    try:
        for tokens in (1, 5, 40):
            x = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(0))
            results = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(module.linear(x, tensors, meta, None))
            assert all(torch.equal(r, results[0]) for r in results)
    finally:
        torch.set_num_threads(before)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False
    )


def test_the_environment_names_a_path():
    code = "from arrondi.native import native; print(native.path())"
    assert run_python(code, ARRONDI_CPU="portable").stdout.strip() == "portable"


def test_the_environment_names_a_path_that_cannot_run(monkeypatch: pytest.MonkeyPatch):
    import arrondi.native as where

    assert native is not None
    before = native.path()
    monkeypatch.setenv(where.FORCE, "portible")
    with pytest.raises(ArrondiError, match="Did you mean 'portable'"):
        where._load()
    for name in [name for name, why in native.paths() if why is not None]:
        monkeypatch.setenv(where.FORCE, name)
        with pytest.raises(ArrondiError, match="cannot run here"):
            where._load()
    assert native.path() == before


def test_without_the_extension_everything_goes_to_pytorch():
    code = (
        "import torch, arrondi\n"
        "from arrondi.formats import parse_scheme\n"
        "from arrondi.kernels import choose\n"
        "from arrondi.nn import QLinear\n"
        "from arrondi.tensor.nearest import quantize_tensor\n"
        "scheme = parse_scheme('W4A16').weights\n"
        "print(choose(scheme, (16, 128), torch.float32).name)\n"
        "print(QLinear(quantize_tensor(torch.randn(16, 128), scheme))(torch.ones(1, 128)).shape)\n"
    )
    answer = run_python(code, ARRONDI_CPU="none")
    assert answer.stdout.split("\n")[0] == "reference", answer.stderr
    assert "slower" not in answer.stderr


def test_a_missing_extension_is_said_once(monkeypatch: pytest.MonkeyPatch):
    import arrondi.native as where

    monkeypatch.setattr(where, "native", None)
    monkeypatch.setattr(where, "_warned", False)
    monkeypatch.delenv(where.FORCE, raising=False)
    with pytest.warns(RuntimeWarning, match="slower"):
        assert not where.available()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not where.available()


def test_unknown_paths_are_python_errors():
    assert native is not None
    with pytest.raises(ValueError, match="no such path"):
        native.use_path("sse9")
    assert issubclass(ShapeError, ArrondiError)
