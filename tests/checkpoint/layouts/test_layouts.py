"""Every layout with every scheme: what it promises is what it writes, what it writes it reads, what it cannot do it says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from arrondi.checkpoint import CHOSEN, LAYOUTS, LayerValues, Layout, ModelFacts, Placed
from arrondi.checkpoint.layouts.arrondi import digest
from arrondi.errors import FileFormatError
from arrondi.formats import (
    FORMATS,
    PRESETS,
    ActivationScheme,
    LayerScheme,
    PerBlock,
    PerGroup,
    PerTensor,
    Scheme,
    codebook,
    parse_scheme,
)
from arrondi.formats.ggml import GGML
from arrondi.tensor.nearest import quantize_tensor
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import Grid
from arrondi.tensor.turned import Sides
from tests.checkpoint.copies import static_grid

GRAMMAR = [
    "w=int4/channel", "w=int4/tensor", "w=int4/channel/asym", "w=int8/channel/asym", "w=int3/g32/asym", "w=int5/g16/bfloat16", "w=int8/g64/float16", "w=int4/b16x32",
    "w=int8/tensor/asym,a=int8/token", "w=int8/g32/asym,a=int8/tensor", "w=int8/channel,a=int8/g32", "w=int8/channel,a=int8/token/asym",
    "w=int8/channel,a=int8/tensor/asym/static", "w=int8/channel,a=int8/tensor/bfloat16/static,o=int8/tensor/static", "w=int4/b16x32/asym",
    "w=uint4/g32", "w=uint8/channel/asym", "w=uint4/g32/asym", "w=uint3/g32/offset", "w=int4/g32/offset", "w=int2/channel/offset", "w=int4/g32/e8m0", "w=int4/token", "w=int4/channel1",
    "w=fp8/tensor,a=fp8/tensor", "w=fp8/g64", "w=fp8_e5m2/channel", "w=fp4/g16", "w=fp4/g16/e8m0", "w=fp6_e2m3/g32/e8m0", "w=nf4/g64/float16",
    "w=ternary/g32", "w=binary/channel", "w=dynamic8/tensor", "w=int8/channel,a=nf4/g32", "w=int8/channel,a=int8/channel", "w=int8/channel,a=fp6/token",
    "w=int8/channel,kv=int8/token", "w=int4/g32/offset/o:bfloat16", "w=int4/g32/offset/s:(uint6/tensor)/o:(int8/tensor)",
]  # fmt: skip

SCHEMES: dict[str, LayerScheme] = {**PRESETS, **{text: parse_scheme(text) for text in GRAMMAR}}
SCHEMES["double-quantized"] = LayerScheme(
    Scheme(FORMATS["nf4"], PerGroup(32), scale=Scheme(FORMATS["int8"], PerTensor()))
)
SCHEMES["learned codebook"] = LayerScheme(Scheme(codebook("mine", [-1.0, 0.5, 2.0]), PerGroup(32)))

GRAPHS = {
    *(f"W{b}A16" for b in (2, 4, 8)), *(f"W{b}A16_ASYM" for b in (2, 4)), "Q4_0", "Q8_0", "w=int4/channel", "w=int4/channel/asym", "w=int4/channel1",
    "w=int4/tensor", "w=int8/channel/asym", "w=int8/g64/float16", "w=uint4/g32", "w=uint8/channel/asym",
    "w=uint4/g32/asym",
}  # fmt: skip
STORED_BY = {
    "compressed-tensors": {
        *(f"W{b}A16" for b in range(2, 9)), *(f"W{b}A16_ASYM" for b in range(2, 8)), "W3A3", "W4A4", "W6A6", "W8A8", "W8A8_STATIC", "W4A8", "W4AFP8", "FP8", "FP8_DYNAMIC", "FP8A16",
        "FP8_BLOCK", "MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16", "NVFP4", "NVFP4A16", "Q4_0", "Q5_0", "Q8_0", "w=int4/channel", "w=int4/tensor", "w=int4/channel/asym",
        "w=int8/channel/asym", "w=int3/g32/asym", "w=int5/g16/bfloat16", "w=int8/g64/float16", "w=int4/b16x32", "w=int8/g32/asym,a=int8/tensor",
        "w=int8/channel,a=int8/g32", "w=int8/channel,a=int8/token/asym", "w=int8/channel,a=int8/tensor/asym/static", "w=fp8/tensor,a=fp8/tensor", "w=fp8/g64",
        "w=int8/channel,a=int8/tensor/bfloat16/static,o=int8/tensor/static", "w=int4/b16x32/asym", "w=int8/tensor/asym,a=int8/token", "w=fp6_e2m3/g32/e8m0",
    },
    "arrondi": set(SCHEMES) - {"learned codebook"},
    "gptq": {
        *(f"W{b}A16" for b in (2, 3, 4, 8)), *(f"W{b}A16_ASYM" for b in (2, 3, 4)), "w=int4/channel", "w=int4/channel/asym", "w=int8/channel/asym",
        "w=int3/g32/asym", "w=int8/g64/float16", "Q4_0", "Q8_0",
    },
    "awq": {"W4A16", "W4A16_ASYM", "w=int4/channel", "w=int4/channel/asym", "Q4_0"},
    "auto-round": {
        *(f"W{b}A16" for b in (2, 3, 4, 8)), *(f"W{b}A16_ASYM" for b in (2, 3, 4)), "w=int4/channel", "w=int4/channel/asym", "w=int8/channel/asym",
        "w=int3/g32/asym", "w=int8/g64/float16", "Q4_0", "Q8_0",
    },
    "fp8": {"FP8_BLOCK", "FP8"},
    "mxfp4": set(),
    "bitsandbytes": {"NF4", "NF4_DQ", "FP4_BNB", "FP4_BNB_DQ", "W8A8", "w=nf4/g64/float16"},
    "gguf": {*GGML, "MXFP4A16"},
    "exl3": {f"EXL3_{bits}" for bits in range(1, 9)},
    "onnx": GRAPHS,
    "onnx-qdq": GRAPHS,
    "modelopt": {
        "W4A16", "W8A8_STATIC", "FP8", "FP8_DYNAMIC", "NVFP4", "NVFP4A16", "MXFP4A16", "MXFP8", "Q4_0",
    },
    "mlx": {"Q4_1", "Q5_1", "MXFP4A16", "MXFP8A16", "w=uint3/g32/offset"},
    "torchao": {
        *(f"W{b}A16" for b in range(2, 9)), *(f"W{b}A16_ASYM" for b in range(2, 8)), "W8A8", "FP8_DYNAMIC", "FP8A16", "Q4_0", "Q5_0", "Q8_0",
        "w=int4/channel", "w=int4/tensor", "w=int4/channel/asym", "w=int8/channel/asym", "w=int3/g32/asym", "w=int5/g16/bfloat16", "w=int8/g64/float16",
        "w=int4/b16x32", "w=int8/channel,a=int8/token/asym", "w=int4/b16x32/asym", "w=fp8/tensor,a=fp8/tensor", "w=fp8/g64", "w=fp8_e5m2/channel",
    },
    "hqq": {"w=uint8/channel/asym", "w=uint4/g32/asym", "w=uint3/g32/offset"},
}  # fmt: skip
"""What each layout can hold, written down by hand: an honest `refuse` says yes to these and no to all else."""

SHAPES = {"even": (128, 256), "ragged": (13, 100)}
"""The second does not fit the words and groups of most schemes; its rows are even, which pairs of FP4 codes need."""

RAGGED = {"W3A16", "w=int4/channel/asym", "FP8_BLOCK", "W8A8_STATIC", "NF4", "T158", "NVFP4", "w=int2/channel/offset"}
"""Schemes that the default run also stores in the second shape."""

CASES = [(layout, scheme) for layout, schemes in STORED_BY.items() for scheme in sorted(schemes)]


def placed(scheme: LayerScheme, shape: tuple[int, ...], name: str = "model.layers.0.q_proj.weight") -> Placed:
    return Placed(name, shape, scheme)


def rounded(p: Placed) -> LayerValues:
    weight = torch.randn(p.matrix_shape, generator=torch.Generator().manual_seed(0))
    weight[0] *= 100  # scales of many sizes
    weight[1] = 0
    outputs = static_grid(replace(p.scheme, inputs=p.scheme.outputs), 7.0)
    if p.scheme.weights.format.trellis is not None:
        return LayerValues(rings(p))
    return LayerValues(quantize_tensor(weight, p.scheme.weights), static_grid(p.scheme, 3.0), outputs)


def rings(p: Placed) -> QTensor:
    """Any codes are rings of a trellis."""
    scheme, (rows, columns) = p.scheme.weights, p.matrix_shape
    assert scheme.format.trellis is not None and scheme.turned is not None
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, scheme.format.levels, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[::2] &= 2 ** scheme.format.trellis.bits[0] - 1
    stored = scheme.turned.seed is None
    scale = torch.ones(1, 1) if stored else torch.rand(rows, 1, generator=generator).half().float()
    numbers = [torch.randn(n, generator=generator).half().float() for n in (rows, columns)]
    return QTensor(codes, scale, None, None, scheme, sides=Sides(*numbers) if stored else None)


def same(a: QTensor, b: QTensor) -> None:
    """Equal in every bit, storage types included."""
    assert a.scheme == b.scheme
    assert (a.sides is None) == (b.sides is None)
    sides = [] if a.sides is None or b.sides is None else list(zip(a.sides, b.sides, strict=True))
    for one, two in (*sides, (a.codes, b.codes), (a.zero_point, b.zero_point), (a.group_index, b.group_index)):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            assert one.dtype == two.dtype
            assert torch.equal(one, two)
    for one, two in ((a.scale, b.scale), (a.offset, b.offset)):
        assert type(one) is type(two)
        if isinstance(one, QTensor) and isinstance(two, QTensor):
            same(one, two)
        elif isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
            assert one.dtype == two.dtype
            assert torch.equal(one, two)


def same_values(a: LayerValues, b: LayerValues) -> None:
    same(a.weight, b.weight)
    for one, two in ((a.inputs, b.inputs), (a.outputs, b.outputs)):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            assert isinstance(one.scale, torch.Tensor) and isinstance(two.scale, torch.Tensor)
            assert torch.equal(one.scale, two.scale)
            assert (one.zero_point is None) == (two.zero_point is None)
            assert one.zero_point is None or torch.equal(one.zero_point, two.zero_point)


def find(layout: Layout, config: dict[str, object], written: Mapping[str, torch.Tensor]) -> list[Placed]:
    from arrondi.checkpoint.containers.tensor_file import DTYPE_NAMES

    names = {n: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in written.items()}
    return layout.find({"model_type": "llama", "quantization_config": config}, names, written.__getitem__)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("layout", CHOSEN)
def test_zero_points_of_few_rows_come_back(layout: str, rows: int) -> None:
    """They fill one word of a column: a matrix that calls itself contiguous in both orientations."""
    p = placed(parse_scheme("w=int4/g32/asym"), (rows, 64))
    values = LayerValues(quantize_tensor(torch.randn(rows, 64), p.scheme.weights))
    form = torch.contiguous_format
    file = {name: value.clone(memory_format=form) for name, value in LAYOUTS[layout].write(p, values).items()}
    same_values(LAYOUTS[layout].read(p, file.__getitem__), values)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_refuse_is_honest(layout: str, scheme: str) -> None:
    reason = LAYOUTS[layout].refuse(placed(LAYOUTS[layout].fit(SCHEMES[scheme]), (128, 256)))
    if scheme in STORED_BY[layout]:
        assert reason is None
    else:
        assert isinstance(reason, str)
        assert reason and reason[0].islower() and not reason.endswith("."), "the plan makes it the end of a sentence"


@pytest.mark.parametrize(
    ("layout", "scheme", "shape"),
    [
        pytest.param(
            *case, shape, id="-".join((*case, shape)),
            marks=[pytest.mark.full] if shape == "ragged" and case[1] not in RAGGED else [],
        )
        for case in CASES for shape in SHAPES
    ],
)  # fmt: skip
def test_what_is_promised_is_written_and_read_again(layout: str, scheme: str, shape: str) -> None:
    p = placed(LAYOUTS[layout].fit(SCHEMES[scheme]), SHAPES[shape])
    size = p.scheme.weights.granularity
    if LAYOUTS[layout].refuse(p):
        if layout not in CHOSEN:
            assert shape == "ragged"
            return
        sizes = [size] if p.scheme.inputs is None else [size, p.scheme.inputs.scheme.granularity]
        misfits = [s for s in sizes if isinstance(s, PerBlock) or (isinstance(s, PerGroup) and 100 % s.size)]
        assert shape == "ragged" and misfits, "nothing else may be refused"
        return
    values = rounded(p)
    if (layout, scheme) == ("bitsandbytes", "W8A8"):  # not every scale is 1/127 of a float32
        assert isinstance(values.weight.scale, torch.Tensor)
        values.weight.scale.copy_((values.weight.scale * 127) / 127)
    if layout == "hqq" and isinstance(values.weight.offset, torch.Tensor):  # of which zero points in 16 bits are made
        scale = values.weight.real_scale
        values.weight.offset.copy_(-(-values.weight.offset / scale).half().float() * scale)
    before = values.weight.codes.clone()
    written = LAYOUTS[layout].write(p, values)
    specs = {name: (dtype, size) for name, dtype, size in LAYOUTS[layout].specs(p)}
    assert specs == {n: (t.dtype, tuple(t.shape)) for n, t in written.items()}
    assert torch.equal(values.weight.codes, before), "writing changed the tensor"
    same_values(LAYOUTS[layout].read(p, written.__getitem__), values)
    config = json.loads(json.dumps(LAYOUTS[layout].config([p], ["lm_head"])))
    assert config["quant_method"] == layout
    if words := LAYOUTS[layout].metadata([p], [], ModelFacts()):
        config["metadata"] = words
    assert find(LAYOUTS[layout], config, written) == [p]


@pytest.mark.parametrize("layout", CHOSEN)
def test_several_schemes_in_one_checkpoint_are_told_apart(layout: str) -> None:
    texts = ["W4A16", "W8A16", "w=int4/channel/asym", "FP8_DYNAMIC", "NVFP4A16", "W4A8", "W8A8_STATIC"]
    all_placed = [placed(SCHEMES[t], (64, 128), f"model.layers.{i}.fc.weight") for i, t in enumerate(texts)]
    all_placed += [
        placed(SCHEMES[t], (64, 128), f"model.layers.{i}.mlp.experts.{i}.w1.weight") for i, t in enumerate(texts)
    ]
    written = {n: t for p in all_placed for n, t in LAYOUTS[layout].write(p, rounded(p)).items()}
    config = LAYOUTS[layout].config(all_placed, [])
    assert sorted(find(LAYOUTS[layout], config, written), key=str) == sorted(all_placed, key=str)


@pytest.mark.parametrize("layout", CHOSEN)
def test_module_paths_and_kinds_are_read_back(layout: str) -> None:
    """Stored names without the model's prefix, under two schemes: targets name modules."""
    first = Placed("layers.0.fc.weight", (64, 128), SCHEMES["W4A16"], module="model.layers.0.fc")
    second = Placed("layers.1.fc.weight", (64, 128), SCHEMES["W8A16"], module="model.layers.1.fc")
    config = LAYOUTS[layout].config([first, second], ["model.layers.2.fc"])
    written = {n: t for p in (first, second) for n, t in LAYOUTS[layout].write(p, rounded(p)).items()}
    assert find(LAYOUTS[layout], config, written) == [first, second]
    if layout == "compressed-tensors":
        assert [g["targets"] for g in config["config_groups"].values()] == [
            ["model.layers.0.fc"],
            ["model.layers.1.fc"],
        ]


TRANSPOSED = {
    "compressed-tensors": ["W4A16", "W8A8", "w=int4/channel/asym", "w=int3/g32/asym", "w=int8/tensor", "FP8_BLOCK", "FP8", "w=fp8/g32"],
    "arrondi": ["W4A16", "NF4", "NVFP4", "w=int3/g32/asym", "w=int4/channel", "MXFP4", "FP8_BLOCK"],
    "gguf": ["Q4_K", "Q5_0", "IQ4_NL"],
    "onnx": ["W4A16", "W4A16_ASYM", "w=int8/channel"],
    "onnx-qdq": ["W4A16", "W4A16_ASYM", "w=int8/channel"],
}  # fmt: skip


@pytest.mark.parametrize(("layout", "scheme"), [(n, s) for n, schemes in TRANSPOSED.items() for s in schemes])
def test_a_transposed_weight_is_rounded_as_any_other(layout: str, scheme: str) -> None:
    """The file says (in, out), the tensor is (out, in), its groups run along the inputs."""
    p = Placed("h.0.c_fc.weight", (256, 384), parse_scheme(scheme), kind="Conv1D", transposed=True)
    assert LAYOUTS[layout].refuse(p) is None
    values = rounded(p)
    assert values.weight.shape == (384, 256)
    written = LAYOUTS[layout].write(p, values)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in written.items()} == {
        n: (d, s) for n, d, s in LAYOUTS[layout].specs(p)
    }
    (found,) = find(LAYOUTS[layout], json.loads(json.dumps(LAYOUTS[layout].config([p], []))), written)
    assert found == p
    back = LAYOUTS[layout].read(found, written.__getitem__)
    same_values(back, values)
    assert torch.equal(found.restored(back.weight.dequantize()), values.weight.dequantize().T)


def test_transposed_weights_of_several_heights_have_one_scheme() -> None:
    """transformers turns weights back by one scheme; channels of 128 and of 512 inputs must not be two."""
    both = [Placed(f"h.0.{i}.weight", (n, 128), parse_scheme("W8A8"), kind="Conv1D", transposed=True) for i, n in enumerate((128, 512))]  # fmt: skip
    config = LAYOUTS["compressed-tensors"].config(both, [])
    assert len(config["config_groups"]) == 1 and config["dequantize"]
    written = {n: t for p in both for n, t in LAYOUTS["compressed-tensors"].write(p, rounded(p)).items()}
    assert find(LAYOUTS["compressed-tensors"], config, written) == both


@pytest.mark.parametrize("scheme", ["MXFP4A16", "NVFP4A16", "NF4"])
def test_a_transposed_weight_of_blocks_that_cannot_be_turned_is_refused(scheme: str) -> None:
    p = Placed("h.0.c_fc.weight", (256, 384), parse_scheme(scheme), kind="Conv1D", transposed=True)
    assert LAYOUTS["compressed-tensors"].refuse(p)


def indexed(p: Placed) -> LayerValues:
    """Groups of columns that are scattered, as dynamic act-order leaves them."""
    q = rounded(p).weight
    size = p.scheme.weights.granularity
    assert isinstance(size, PerGroup)
    order = torch.randperm(p.matrix_shape[1], generator=torch.Generator().manual_seed(2))
    return LayerValues(QTensor(q.codes, q.scale, q.zero_point, q.offset, q.scheme, (order // size.size).int()))


@pytest.mark.parametrize("scheme", ["w=int4/g32", "w=int3/g64/asym", "w=nf4/g32"])
def test_scattered_groups_are_stored_in_our_layout(scheme: str) -> None:
    p = Placed("a.weight", (64, 128), parse_scheme(scheme), indexed=True)
    assert LAYOUTS["compressed-tensors"].refuse(p), "its package has given them up"
    values = indexed(p)
    written = LAYOUTS["arrondi"].write(p, values)
    (found,) = find(LAYOUTS["arrondi"], LAYOUTS["arrondi"].config([p], []), written)
    assert found == p
    same_values(LAYOUTS["arrondi"].read(p, written.__getitem__), values)


@pytest.mark.parametrize("index", ["negative", "beyond", "lopsided"])
def test_an_index_of_groups_that_cannot_be_is_refused(index: str) -> None:
    p = Placed("a.weight", (64, 128), parse_scheme("w=int4/g32"), indexed=True)
    written = LAYOUTS["arrondi"].write(p, indexed(p))
    groups = written["a.weight.group_index"]
    groups[0] = {"negative": -1, "beyond": 4, "lopsided": (int(groups[0]) + 1) % 4}[index]
    with pytest.raises(FileFormatError, match=r"a\.weight"):
        LAYOUTS["arrondi"].read(p, written.__getitem__)


@pytest.mark.parametrize("scheme", ["W4A16", "NF4", "T158", "NVFP4A16", "FP8_BLOCK"])
def test_a_stack_is_stored_as_one_tall_matrix(scheme: str) -> None:
    p = Placed("experts.gate_up_proj", (4, 128, 256), SCHEMES[scheme])
    assert LAYOUTS["compressed-tensors"].refuse(p)
    values = rounded(p)
    assert values.weight.shape == (512, 256)
    same_values(LAYOUTS["arrondi"].read(p, LAYOUTS["arrondi"].write(p, values).__getitem__), values)
    turned = Placed("experts.gate_up_proj", (4, 256, 128), SCHEMES[scheme], transposed=True)
    values = rounded(turned)
    assert values.weight.shape == (512, 256)
    dense = turned.restored(values.weight.dequantize())
    assert dense.shape == (4, 256, 128)
    assert torch.equal(dense[1], values.weight.dequantize()[128:256].T)


def test_kernels_of_convolutions_are_rows() -> None:
    p = Placed("conv.weight", (8, 4, 3, 3), SCHEMES["W4A16"], kind="Conv2d")
    assert p.matrix_shape == (8, 36)
    assert LAYOUTS["compressed-tensors"].refuse(p) and LAYOUTS["arrondi"].refuse(p) is None
    matrix = torch.arange(8 * 36.0).reshape(8, 36)
    assert torch.equal(p.restored(matrix), matrix.reshape(8, 4, 3, 3))


def test_compressed_tensors_takes_parameters_named_weight_only() -> None:
    reason = LAYOUTS["compressed-tensors"].refuse(placed(SCHEMES["W4A16"], (128, 256), "mixer.in_proj"))
    assert reason == "compressed-tensors stores parameters named weight only"


@pytest.mark.parametrize("scheme", ["W3A16", "W4A16_ASYM", "W8A8", "W4A8", "W4AFP8", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP8A16", "w=int5/g16/bfloat16"])  # fmt: skip
def test_the_files_hold_no_more_than_the_tensor_says(scheme: str) -> None:
    """`stored_bits` counts what a file needs; the one thing more is the shape that pack-quantized notes (two int64)."""
    for layout in map(LAYOUTS.__getitem__, CHOSEN):
        p = placed(SCHEMES[scheme], SHAPES["even"])
        values = rounded(p)
        written = layout.write(p, values)
        bits = 8 * sum(t.nbytes for n, t in written.items() if not n.endswith("weight_shape"))
        zero = values.weight.zero_point
        slack = 0 if zero is None else 8 * zero.numel()  # zero points of arrondi's layout take a byte
        assert values.weight.stored_bits <= bits <= values.weight.stored_bits + slack


def test_every_scheme_can_be_stored_by_some_layout() -> None:
    for name, scheme in PRESETS.items():
        assert any(layout.refuse(placed(scheme, (128, 256))) is None for layout in LAYOUTS.values()), name


def test_codes_packed_by_an_old_version_are_refused() -> None:
    p = placed(SCHEMES["W3A16"], (64, 128))
    layout = LAYOUTS["compressed-tensors"]
    config = {**layout.config([p], []), "version": "0.17.2"}
    with pytest.raises(FileFormatError, match=r"3-bit codes of compressed-tensors 0\.17\.2.*Quantize it again"):
        find(layout, config, layout.write(p, rounded(p)))
    four = placed(SCHEMES["W4A16"], (64, 128))
    config = {**layout.config([four], []), "version": "0.9.0"}
    assert find(layout, config, layout.write(four, rounded(four))) == [four], "whole bytes did not change"


def test_a_format_that_the_package_refuses_is_refused() -> None:
    """No format at all is inferred; null is none that the package takes."""
    p = placed(SCHEMES["W4A16"], (64, 128))
    layout = LAYOUTS["compressed-tensors"]
    config, written = layout.config([p], []), layout.write(p, rounded(p))
    with pytest.raises(FileFormatError, match="format is null"):
        find(layout, {**config, "format": None}, written)
    for group in config["config_groups"].values():
        group.pop("format", None)
    assert find(layout, {k: v for k, v in config.items() if k != "format"}, written) == [p]


def test_a_later_version_of_our_layout_is_refused() -> None:
    p = placed(SCHEMES["NF4"], (64, 128))
    with pytest.raises(FileFormatError, match=r"version 2.*reads 1"):
        find(LAYOUTS["arrondi"], {**LAYOUTS["arrondi"].config([p], []), "version": 2}, {})


def test_another_scheme_that_fits_the_same_bytes_is_noticed() -> None:
    """NF4 and bitsandbytes' FP4, int4 and uint4 have equal files; the digest tells them apart."""
    p = placed(parse_scheme("w=int4/g32"), (64, 128))
    written, config = LAYOUTS["arrondi"].write(p, rounded(p)), LAYOUTS["arrondi"].config([p], [])
    config["tensors"][p.name]["scheme"] = "w=uint4/g32"
    with pytest.raises(FileFormatError, match="digest"):
        find(LAYOUTS["arrondi"], config, written)
    config["digest"] = digest(config["tensors"])
    assert find(LAYOUTS["arrondi"], config, written) == [placed(parse_scheme("w=uint4/g32"), (64, 128))]


def test_activations_that_the_config_cannot_say_are_refused_not_changed() -> None:
    base = SCHEMES["W8A8"].inputs
    assert base is not None
    for scheme in (
        replace(base.scheme, format=FORMATS["nf4"], granularity=PerGroup(32)),
        replace(base.scheme, zero_point="float"),
        replace(base.scheme, scale="bfloat16"),
        SCHEMES["NVFP4"].weights,  # wholly dynamic: the package knows it with a static outer scale only
    ):
        p = placed(replace(SCHEMES["W8A8"], inputs=ActivationScheme(scheme)), (64, 64))
        reason = LAYOUTS["compressed-tensors"].refuse(p)
        assert reason and "activations" in reason


@pytest.mark.parametrize(
    ("layout", "scheme"), [("compressed-tensors", "W4A16"), ("compressed-tensors", "W8A8"), ("arrondi", "NF4")]
)
def test_scales_may_be_negative(layout: str, scheme: str) -> None:
    p = placed(SCHEMES[scheme], (64, 128))
    q = rounded(p).weight
    assert isinstance(q.scale, torch.Tensor)
    mirrored = replace(q, scheme=q.scheme, scale=torch.where(torch.arange(64)[:, None] % 2 == 0, q.scale, -q.scale))
    back = LAYOUTS[layout].read(p, LAYOUTS[layout].write(p, LayerValues(mirrored)).__getitem__).weight
    same(back, mirrored)
    assert torch.equal(back.dequantize()[1], -q.dequantize()[1])


@pytest.mark.parametrize("layout", CHOSEN)
def test_numbers_that_cannot_be_are_refused_with_the_name_of_their_tensor(layout: str) -> None:
    p = placed(SCHEMES["W8A8_STATIC"], (64, 128))
    good = rounded(p)
    assert isinstance(good.weight.scale, torch.Tensor) and good.inputs is not None
    broken = {
        "scale NaN": LayerValues(replace(good.weight, scale=good.weight.scale * float("nan")), good.inputs),
        "scale infinite": LayerValues(replace(good.weight, scale=good.weight.scale * float("inf")), good.inputs),
        "input scale zero": LayerValues(good.weight, Grid(torch.zeros(1, 1), None, None)),
        "input scale negative": LayerValues(good.weight, Grid(-torch.ones(1, 1), None, None)),
    }
    for values in broken.values():
        written = LAYOUTS[layout].write(p, values)
        with pytest.raises(FileFormatError, match="q_proj"):
            LAYOUTS[layout].read(p, written.__getitem__)
