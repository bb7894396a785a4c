"""The contract of every method in the table: shapes, types, determinism, input untouched, named errors."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

from arrondi.calibration import SecondMoment
from arrondi.errors import DataError, SchemeError
from arrondi.formats import PRESETS, LayerScheme, Scheme, parse_scheme, scale_shape
from arrondi.rounding import METHODS, check_options, get_method
from arrondi.tensor.encoding import code_dtype
from arrondi.tensor.qtensor import QTensor

SCHEMES = {
    "W4A16": PRESETS["W4A16"].with_group_size(16),
    "W4A16_ASYM": PRESETS["W4A16_ASYM"].with_group_size(16),
    "W8A8": PRESETS["W8A8"],
    "int3-offset-bf16": parse_scheme("w=uint3/g16/offset/bfloat16"),
    "MXFP4": PRESETS["MXFP4"],
    "NVFP4A16": PRESETS["NVFP4A16"],
    "NF4": PRESETS["NF4"],
    "FP8_BLOCK": PRESETS["FP8_BLOCK"],
    "TERNARY": PRESETS["TERNARY"],
    "BINARY": PRESETS["BINARY"],
    "TCQ3": parse_scheme("w=tcq3-l8/channel/rht64"),
}
PAIRS = [
    (name, word)
    for name, method in METHODS.items()
    for word, scheme in SCHEMES.items()
    if method.refuse(scheme.weights, {}) is None and "cross moment" not in method.needs
]
CONTRACT = pytest.mark.parametrize(
    ("method", "scheme"), [pytest.param(*p, marks=() if i % 3 == 0 else pytest.mark.full) for i, p in enumerate(PAIRS)]
)
"""Every scheme meets one method or two, every method at least two schemes; `make test-full` does the rest."""


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(12, 72, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def moment() -> SecondMoment:
    made = SecondMoment(72)
    made.update(torch.randn(200, 72, generator=torch.Generator().manual_seed(1)))
    return made


def apply(method: str, scheme: LayerScheme, w: torch.Tensor) -> QTensor:
    return METHODS[method].run(w, scheme.weights, moment(), name="model.layer")


@CONTRACT
def test_shapes_and_types(method: str, scheme: str) -> None:
    wanted = METHODS[method].makes(SCHEMES[scheme].weights, {})
    q = apply(method, SCHEMES[scheme], weight())
    assert replace(q.scheme, apart=wanted.apart) == wanted, "but for how many numbers of this weight are kept apart"
    assert METHODS[method].makes(wanted, {}) == wanted
    assert q.shape == (12, 72)
    assert q.codes.dtype == code_dtype(wanted.format)
    assert q.codes.is_contiguous()
    assert q.real_scale.dtype == torch.float32
    assert tuple(q.real_scale.shape) == scale_shape(wanted.granularity, (12, 72))
    assert isinstance(q.scale, QTensor) == isinstance(wanted.scale, Scheme)
    assert q.group_index is None
    if q.zero_point is not None:
        assert q.zero_point.dtype == torch.int32
    if q.offset is not None:
        assert q.offset.dtype == torch.float32
    back = q.dequantize()
    assert back.dtype == torch.float32
    assert bool(torch.isfinite(back).all())
    assert float((back - weight()).norm() / weight().norm()) < (0.8 if wanted.format.bits < 3 else 0.35)


@CONTRACT
def test_the_same_input_gives_the_same_bits(method: str, scheme: str) -> None:
    state = torch.get_rng_state()
    first, second = (apply(method, SCHEMES[scheme], weight()) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.real_scale, second.real_scale)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is not touched"


@CONTRACT
def test_the_input_is_untouched_and_not_shared(method: str, scheme: str) -> None:
    w = weight()
    q = apply(method, SCHEMES[scheme], w)
    assert torch.equal(w, weight())
    before = q.dequantize()
    w.zero_()
    assert torch.equal(q.dequantize(), before)


@CONTRACT
def test_strides_and_parameters_do_not_matter(method: str, scheme: str) -> None:
    wanted = apply(method, SCHEMES[scheme], weight())
    for other in (
        weight().T.contiguous().T,
        torch.stack([weight(), weight()], -1)[..., 0],
        torch.nn.Parameter(weight()),
    ):
        q = apply(method, SCHEMES[scheme], other)
        assert torch.equal(q.codes, wanted.codes)
        assert not q.real_scale.requires_grad
        assert not q.dequantize().requires_grad


@CONTRACT
def test_half_precision_weights_are_computed_in_float32(method: str, scheme: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        q, wanted = apply(method, SCHEMES[scheme], weight(dtype)), apply(method, SCHEMES[scheme], weight(dtype).float())
        assert torch.equal(q.codes, wanted.codes)
        assert torch.equal(q.real_scale, wanted.real_scale)


@CONTRACT
def test_float64_weights_are_taken(method: str, scheme: str) -> None:
    q = apply(method, SCHEMES[scheme], weight().double())
    assert q.dequantize().dtype == torch.float32
    assert float((q.codes == apply(method, SCHEMES[scheme], weight()).codes).float().mean()) > 0.99


@CONTRACT
def test_nan_and_infinity_are_refused_by_name(method: str, scheme: str) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        w = weight()
        w[5, 70] = bad
        with pytest.raises(DataError, match=r"^model\.layer: .*NaN or infinity"):
            apply(method, SCHEMES[scheme], w)


@CONTRACT
def test_tensors_are_made_where_the_weight_is(method: str, scheme: str) -> None:
    # Any factory call that names no device would land on the default one, here one without memory.
    wanted = apply(method, SCHEMES[scheme], weight())
    w, statistics = weight(), moment()
    with torch.device("meta"):
        q = METHODS[method].run(w, SCHEMES[scheme].weights, statistics)
        back = q.dequantize()
    assert torch.equal(q.codes, wanted.codes)
    assert torch.equal(back, wanted.dequantize())


@CONTRACT
def test_one_row_and_one_column(method: str, scheme: str) -> None:
    least = 3 if SCHEMES[scheme].weights.format.trellis is not None else 1  # rows that hold a state
    for shape in ((least, 72), (12, 1), (least, 1)):
        made = SecondMoment(shape[1])
        made.update(torch.ones(3, shape[1]))
        w = weight()[: shape[0], : shape[1]]
        q = METHODS[method].run(w, SCHEMES[scheme].weights, made)
        assert q.shape == shape
        assert bool(torch.isfinite(q.dequantize()).all())


@pytest.mark.parametrize("method", METHODS)
def test_a_method_works_without_a_moment_or_says_that_it_needs_one(method: str) -> None:
    scheme = SCHEMES["TCQ3" if method.startswith("trellis") else "W4A16"].weights
    if METHODS[method].needs & {"moment", "importance"}:
        with pytest.raises(DataError, match=r"^model\.layer: .*needs the second moment"):
            METHODS[method].run(weight(), scheme, None, name="model.layer")
    else:
        assert METHODS[method].run(weight(), scheme, None).shape == (12, 72)
        assert METHODS[method].run(weight(), scheme).shape == (12, 72)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_the_agreed_signature(method: str) -> None:
    parameters = list(inspect.signature(METHODS[method].run).parameters.values())
    assert [p.name for p in parameters[:3]] == ["weight", "scheme", "moment"]
    assert parameters[2].default is None
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters[3:])
    assert {"name", "facts"} <= {p.name for p in parameters[3:]}


@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_the_table_is_filled_in(method: str) -> None:
    row = METHODS[method]
    assert row.source
    assert row.seconds_per_gigaweight > 0
    assert not {"name", "facts"} & row.options.keys()
    assert get_method(method.upper()) is row


def test_the_options_of_the_methods() -> None:
    assert {"rtn", "hqq", "gptq", "awq"} <= set(METHODS)
    assert METHODS["rtn"].options == {"range": "auto", "power": 2.5}
    assert METHODS["gptq"].options == {
        "damping": 0.01,
        "block_size": 128,
        "order": "static",
        "range": "search",
        "power": 4.0,
        "refine": 0,
        "sweeps": 1,
    }
    assert set(METHODS["hqq"].options) == {"p", "beta", "kappa", "iterations", "normalize"}


def test_unknown_methods_and_options_are_answered_with_the_nearest() -> None:
    with pytest.raises(SchemeError, match=r"Unknown method 'gptqq'. Did you mean 'gptq'\? Known: "):
        get_method("gptqq")
    with pytest.raises(SchemeError, match=r"Unknown option of gptq 'dampning'. Did you mean 'damping'\?"):
        check_options("gptq", METHODS["gptq"].run, {"order": "none", "dampning": 0.1})
    check_options("gptq", METHODS["gptq"].run, {"order": "none", "damping": 0.1})
    with pytest.raises(SchemeError, match="Unknown method"):
        get_method("spqr")
