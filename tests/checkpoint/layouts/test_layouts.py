"""Every layout with every scheme: what it promises is what it writes, what it writes it reads, what it cannot do it says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from arrondi.checkpoint import LAYOUTS, Layout, Placed
from arrondi.errors import FileFormatError
from arrondi.formats import (
    FORMATS,
    PRESETS,
    ActivationScheme,
    LayerScheme,
    PerGroup,
    PerTensor,
    Scheme,
    codebook,
    parse_scheme,
)
from arrondi.tensor.qtensor import QTensor, quantize_tensor

GRAMMAR = [
    "w=int4/channel", "w=int4/tensor", "w=int4/channel/asym", "w=int8/channel/asym", "w=int3/g32/asym", "w=int5/g16/bfloat16", "w=int8/g64/float16", "w=int4/b16x32",
    "w=int8/tensor/asym,a=int8/token", "w=int8/g32/asym,a=int8/tensor", "w=int8/channel,a=int8/g32", "w=int8/channel,a=int8/token/asym",
    "w=uint4/g32", "w=uint8/channel/asym", "w=int4/g32/offset", "w=int2/channel/offset", "w=int4/g32/e8m0", "w=int4/token", "w=int4/channel1",
    "w=fp8/tensor,a=fp8/tensor", "w=fp8/g64", "w=fp8_e5m2/channel", "w=fp4/g16", "w=fp4/g16/e8m0", "w=fp6_e2m3/g32/e8m0", "w=nf4/g64/float16",
    "w=ternary/g32", "w=binary/channel", "w=dynamic8/tensor", "w=int8/channel,a=nf4/g32", "w=int8/channel,a=int8/channel", "w=int8/channel,a=fp6/token",
]  # fmt: skip

SCHEMES: dict[str, LayerScheme] = {**PRESETS, **{text: parse_scheme(text) for text in GRAMMAR}}
SCHEMES["double-quantized"] = LayerScheme(
    Scheme(FORMATS["nf4"], PerGroup(32), scale=Scheme(FORMATS["int8"], PerTensor()))
)
SCHEMES["learned codebook"] = LayerScheme(Scheme(codebook("mine", [-1.0, 0.5, 2.0]), PerGroup(32)))

STORED_BY = {
    "compressed-tensors": {
        *(f"W{b}A16" for b in range(2, 9)), *(f"W{b}A16_ASYM" for b in range(2, 8)), "W8A8", "W4A8", "W4AFP8", "FP8_DYNAMIC", "FP8A16", "FP8_BLOCK",
        "MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16", "NVFP4A16", "w=int4/channel", "w=int4/tensor", "w=int4/channel/asym", "w=int8/channel/asym", "w=int3/g32/asym",
        "w=int5/g16/bfloat16", "w=int8/g64/float16", "w=int4/b16x32", "w=int8/g32/asym,a=int8/tensor", "w=int8/channel,a=int8/g32",
        "w=int8/channel,a=int8/token/asym", "w=fp8/tensor,a=fp8/tensor", "w=fp8/g64",
    },
    "arrondi": set(SCHEMES) - {"learned codebook"},
}  # fmt: skip
"""What each layout can hold, written down by hand: an honest `refuse` says yes to these and no to all else."""

SHAPES = {"even": (128, 256), "ragged": (13, 100)}
"""The second does not fit the words and groups of most schemes; its rows are even, which pairs of FP4 codes need."""

CASES = [(layout, scheme) for layout, schemes in STORED_BY.items() for scheme in sorted(schemes)]


def placed(scheme: LayerScheme, shape: tuple[int, ...], name: str = "model.layers.0.q_proj.weight") -> Placed:
    return Placed(name, shape, scheme)


def rounded(p: Placed) -> QTensor:
    weight = torch.randn(p.matrix_shape, generator=torch.Generator().manual_seed(0))
    weight[0] *= 100  # scales of many sizes
    weight[1] = 0
    return quantize_tensor(weight, p.scheme.weights)


def same(a: QTensor, b: QTensor) -> None:
    """Equal in every bit, storage types included."""
    assert a.scheme == b.scheme
    for one, two in ((a.codes, b.codes), (a.zero_point, b.zero_point), (a.offset, b.offset)):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            assert one.dtype == two.dtype
            assert torch.equal(one, two)
    if isinstance(a.scale, QTensor):
        assert isinstance(b.scale, QTensor)
        same(a.scale, b.scale)
    else:
        assert isinstance(b.scale, torch.Tensor)
        assert a.scale.dtype == b.scale.dtype
        assert torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_refuse_is_honest(layout: str, scheme: str) -> None:
    reason = LAYOUTS[layout].refuse(SCHEMES[scheme], "model.layers.0.q_proj.weight", (128, 256))
    if scheme in STORED_BY[layout]:
        assert reason is None
    else:
        assert isinstance(reason, str)
        assert reason and reason[0].islower() and not reason.endswith("."), "the plan makes it the end of a sentence"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("layout", "scheme"), CASES, ids=[f"{a}-{b}" for a, b in CASES])
def test_what_is_promised_is_written_and_read_again(layout: str, scheme: str, shape: str) -> None:
    p = placed(SCHEMES[scheme], SHAPES[shape])
    q = rounded(p)
    before = q.codes.clone()
    written = LAYOUTS[layout].write(p, q)
    specs = {name: (dtype, size) for name, dtype, size in LAYOUTS[layout].specs(p)}
    assert specs == {n: (t.dtype, tuple(t.shape)) for n, t in written.items()}
    assert torch.equal(q.codes, before), "writing changed the tensor"
    same(LAYOUTS[layout].read(p, written.__getitem__), q)


@pytest.mark.parametrize(("layout", "scheme"), CASES, ids=[f"{a}-{b}" for a, b in CASES])
def test_the_config_finds_what_was_stored(layout: str, scheme: str) -> None:
    p = placed(SCHEMES[scheme], SHAPES["even"])
    written = LAYOUTS[layout].write(p, rounded(p))
    config = json.loads(json.dumps(LAYOUTS[layout].config([p], ["lm_head"], {"model.layers.0.q_proj": "Linear"})))
    assert config["quant_method"] == layout
    assert find(LAYOUTS[layout], config, written) == [p]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_schemes_in_one_checkpoint_are_told_apart(layout: str) -> None:
    texts = ["W4A16", "W8A16", "w=int4/channel/asym", "FP8_DYNAMIC", "NVFP4A16"]
    all_placed = [placed(SCHEMES[t], (64, 128), f"model.layers.{i}.fc.weight") for i, t in enumerate(texts)]
    all_placed += [
        placed(SCHEMES[t], (64, 128), f"model.layers.{i}.mlp.experts.{i}.w1.weight") for i, t in enumerate(texts)
    ]
    written = {n: t for p in all_placed for n, t in LAYOUTS[layout].write(p, rounded(p)).items()}
    config = LAYOUTS[layout].config(all_placed, [], {})
    assert sorted(find(LAYOUTS[layout], config, written), key=str) == sorted(all_placed, key=str)


def find(layout: Layout, config: dict[str, object], written: Mapping[str, torch.Tensor]) -> list[Placed]:
    from arrondi.checkpoint.containers.tensor_file import DTYPE_NAMES

    names = {n: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in written.items()}
    return layout.find(config, names, written.__getitem__)


@pytest.mark.parametrize("scheme", ["W4A16", "NF4", "T158", "NVFP4A16", "FP8_BLOCK"])
def test_a_stack_is_stored_as_one_tall_matrix(scheme: str) -> None:
    p = Placed("experts.gate_up_proj", (4, 128, 256), SCHEMES[scheme])
    assert LAYOUTS["compressed-tensors"].refuse(p.scheme, "experts.weight", p.shape)
    q = rounded(p)
    assert q.shape == (512, 256)
    same(LAYOUTS["arrondi"].read(p, LAYOUTS["arrondi"].write(p, q).__getitem__), q)


def test_compressed_tensors_takes_parameters_named_weight_only() -> None:
    reason = LAYOUTS["compressed-tensors"].refuse(SCHEMES["W4A16"], "mixer.in_proj", (128, 256))
    assert reason == "compressed-tensors stores parameters named weight only"


@pytest.mark.parametrize(
    "scheme", ["W3A16", "W4A16_ASYM", "W8A8", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP8A16", "w=int5/g16/bfloat16"]
)
def test_the_files_hold_no_more_than_the_tensor_says(scheme: str) -> None:
    """`stored_bits` counts what a file needs; the one thing more is the shape that pack-quantized notes (two int64)."""
    for layout in LAYOUTS.values():
        p = placed(SCHEMES[scheme], SHAPES["even"])
        q = rounded(p)
        written = layout.write(p, q)
        bits = 8 * sum(t.nbytes for n, t in written.items() if not n.endswith("weight_shape"))
        slack = 0 if q.zero_point is None else 8 * q.zero_point.numel()  # zero points of arrondi's layout take a byte
        assert q.stored_bits <= bits <= q.stored_bits + slack


def test_every_scheme_can_be_stored_by_some_layout() -> None:
    for name, scheme in PRESETS.items():
        assert any(layout.refuse(scheme, "a.weight", (128, 256)) is None for layout in LAYOUTS.values()), name


def test_codes_packed_by_an_old_version_are_refused() -> None:
    p = placed(SCHEMES["W3A16"], (64, 128))
    layout = LAYOUTS["compressed-tensors"]
    config = {**layout.config([p], [], {}), "version": "0.17.2"}
    with pytest.raises(FileFormatError, match=r"3-bit codes of compressed-tensors 0\.17\.2.*Quantize it again"):
        find(layout, config, layout.write(p, rounded(p)))
    four = placed(SCHEMES["W4A16"], (64, 128))
    config = {**layout.config([four], [], {}), "version": "0.9.0"}
    assert find(layout, config, layout.write(four, rounded(four))) == [four], "whole bytes did not change"


def test_a_later_version_of_our_layout_is_refused() -> None:
    p = placed(SCHEMES["NF4"], (64, 128))
    with pytest.raises(FileFormatError, match=r"version 2.*reads 1"):
        find(LAYOUTS["arrondi"], {**LAYOUTS["arrondi"].config([p], [], {}), "version": 2}, {})


def test_activations_that_the_config_cannot_say_are_refused_not_changed() -> None:
    base = SCHEMES["W8A8"]
    assert base.inputs is not None
    inputs = base.inputs.scheme
    for changed in (
        replace(inputs, format=FORMATS["nf4"], granularity=PerGroup(32)),
        replace(inputs, zero_point="float"),
        replace(inputs, scale="bfloat16"),
    ):
        layer = replace(base, inputs=ActivationScheme(changed))
        reason = LAYOUTS["compressed-tensors"].refuse(layer, "a.weight", (64, 64))
        assert reason and "activations" in reason
