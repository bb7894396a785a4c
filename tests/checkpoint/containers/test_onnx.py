"""ONNX files as model directories: what other tools quantized is read as ONNX Runtime computes it, and what lies is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import AttributeProto, TensorProto, helper, numpy_helper

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.checkpoint.containers.onnx.header import read_model
from arrondi.checkpoint.containers.onnx.view import view_of
from arrondi.errors import FileFormatError
from tests.checkpoint.containers.onnx_nets import MODULES, in_blocks, in_four, mlp
from tests.checkpoint.containers.onnx_values import runtime_values

CASES: dict[str, Callable[[Any], Any]] = {
    **{f"{bits} bits": lambda m, bits=bits: in_blocks(m, bits, True) for bits in (2, 4, 8)},
    **{f"{bits} bits with zero points": lambda m, bits=bits: in_blocks(m, bits, False) for bits in (2, 4, 8)},
    "4 bits, DequantizeLinear": lambda m: in_blocks(m, 4, True, standard=True),
    "4 bits with zero points, DequantizeLinear": lambda m: in_blocks(m, 4, False, standard=True),
    "FP4": lambda m: in_four(m, 0),
    "NF4": lambda m: in_four(m, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_of_the_runtimes_own_quantizers(case: str, tmp_path: Path) -> None:
    """By the names of their modules, (out, in), bit for bit as ONNX Runtime multiplies by them."""
    made = CASES[case](mlp())
    onnx.save(made, tmp_path / "q.onnx")
    checkpoint = Checkpoint.open(tmp_path / "q.onnx")
    assert set(checkpoint.placed) == set(MODULES.values())
    found = _by_constant(tmp_path / "q.onnx")
    for codes, want in runtime_values(made).items():
        ours = checkpoint.dense(found[codes]).numpy()
        want = want.T if want.shape != ours.shape else want  # a DequantizeLinear gives (in, out)
        assert np.array_equal(ours, want), codes


def _by_constant(path: Path) -> dict[str, str]:
    """Constant of codes → name of the weight."""
    return {stored["_quantized"]: name for name, (_, stored) in view_of(path).found.holders.items()}


@pytest.mark.parametrize(
    ("node", "scope", "name"),
    [("/a/b.0/c/MatMul_Q4", None, "a.b.0.c.weight"), ("node_7", "m.c", "m.c.weight"), ("node_7", None, "encoder.layer.0.dense.weight")],
)  # fmt: skip
def test_names_that_exporters_leave(node: str, scope: str | None, name: str, tmp_path: Path) -> None:
    """A constant without a name is called by the path in the operator's name, by the exporter's note, or by what is added to its product."""
    model = mlp()
    model.graph.node[0].name = node
    if scope:
        model.graph.node[0].metadata_props.add(
            key="pkg.torch.onnx.name_scopes", value=f"['', 'm', '{scope}', 'linear']"
        )
    onnx.save(model, tmp_path / "f.onnx")
    assert name in Checkpoint.open(tmp_path / "f.onnx").names


def test_tables_in_blocks(tmp_path: Path) -> None:
    made = in_blocks(mlp(table=True), 4, False, table=True)
    onnx.save(made, tmp_path / "q.onnx")
    checkpoint, found = Checkpoint.open(tmp_path / "q.onnx"), _by_constant(tmp_path / "q.onnx")
    values = {found[codes]: want for codes, want in runtime_values(made).items()}
    assert checkpoint.placed["words.weight"].kind == "Embedding"
    assert np.array_equal(checkpoint.dense("words.weight").numpy(), values["words.weight"])


@pytest.mark.parametrize("per_channel", [False, True])
def test_products_of_codes(per_channel: bool, tmp_path: Path) -> None:
    """Weights of MatMulInteger, whose scale stands behind it, are within half a step of the float ones; zero points are subtracted."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain = mlp(tmp_path / "f.onnx")
    for kind, word in ((QuantType.QInt8, "int8"), (QuantType.QUInt8, "uint8")):
        quantize_dynamic(tmp_path / "f.onnx", tmp_path / "q.onnx", per_channel=per_channel, weight_type=kind)
        checkpoint = Checkpoint.open(tmp_path / "q.onnx")
        for constant, name in MODULES.items():
            weight = next(numpy_helper.to_array(t) for t in plain.graph.initializer if t.name == constant).T
            q = checkpoint.layer(name).weight
            assert q.scheme.format.name == word and (q.real_scale.numel() > 1) is per_channel
            away = (checkpoint.dense(name) - torch.from_numpy(weight.copy())).abs() / q.real_scale
            assert float(away.max()) <= 0.51


def test_convolutions_and_biases(tmp_path: Path) -> None:
    """QLinearConv: a kernel with a scale a channel; its bias is whole numbers under the product of two scales."""
    rng = np.random.default_rng(2)
    kernel, bias = rng.integers(-127, 128, (6, 3, 3, 3)).astype(np.int8), rng.integers(-999, 999, 6).astype(np.int32)
    scales = rng.uniform(0.01, 0.1, 6).astype(np.float32)
    held = {
        "xs": np.float32(0.05), "xz": np.int8(3), "conv.weight_quantized": kernel, "ws": scales, "wz": np.zeros(6, np.int8),
        "ys": np.float32(0.5), "yz": np.int8(0), "conv.bias_quantized": bias,
    }  # fmt: skip
    names = ["x", "xs", "xz", "conv.weight_quantized", "ws", "wz", "ys", "yz", "conv.bias_quantized"]
    node = helper.make_node("QLinearConv", names, ["y"], "conv")
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.INT8, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.INT8, None)], [numpy_helper.from_array(np.asarray(v), n) for n, v in held.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), tmp_path / "q.onnx")
    checkpoint = Checkpoint.open(tmp_path / "q.onnx")
    assert (
        str(checkpoint.placed["conv.weight"].scheme) == "w=int8/channel"
        and checkpoint.placed["conv.weight"].kind == "Conv2d"
    )
    assert torch.equal(checkpoint.dense("conv.weight"), torch.from_numpy(kernel * scales[:, None, None, None]))
    want = bias * (np.float32(0.05) * scales).astype(np.float64)
    assert torch.equal(checkpoint.dense("conv.bias"), torch.from_numpy(want.astype(np.float32)))
    assert set(checkpoint.names) == {"conv.weight", "conv.bias"}, "scales of what flows are no weights"


@pytest.mark.parametrize("kind", ["INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2", "INT16", "INT32"])
@pytest.mark.parametrize("grid", ["tensor", "axis 0", "axis 1", "blocks of axis 0", "blocks of axis 1"])
def test_every_grid_of_dequantize_linear(kind: str, grid: str, tmp_path: Path) -> None:
    """Codes of every type under scales of every shape, stored as bytes or as varints, beside ONNX's own reference."""
    from onnx.reference import ReferenceEvaluator

    rng = np.random.default_rng(3)
    dtype = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, kind))
    bits = int(kind.removeprefix("U").removeprefix("INT"))
    low = 0 if kind[0] == "U" else -(2 ** (min(bits, 8) - 1))
    shape = (12, 20)
    axis = int(grid[-1]) if grid != "tensor" else 0
    of_scale = {
        "tensor": (),
        "axis 0": (12,),
        "axis 1": (20,),
        "blocks of axis 0": (3, 20),
        "blocks of axis 1": (12, 5),
    }[grid]
    codes = rng.integers(low, low + 2 ** min(bits, 8), shape).astype(dtype)
    scale = rng.uniform(0.01, 0.1, of_scale).astype(np.float32)
    zero = rng.integers(low, low + 2 ** min(bits, 8), of_scale).astype(dtype)
    held = [numpy_helper.from_array(codes, "w_quantized"), numpy_helper.from_array(scale, "s")]
    if kind != "INT32":  # which has no zero points
        held.append(numpy_helper.from_array(zero, "z"))
    attrs = {"block_size": 4} if "blocks" in grid else {}
    node = helper.make_node("DequantizeLinear", [t.name for t in held], ["w"], "dq", axis=axis, **attrs)
    product = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    graph = helper.make_graph(
        [node, product], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None), helper.make_tensor_value_info("w", TensorProto.FLOAT, None)], held,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)])
    want = ReferenceEvaluator(model).run(None, {"x": np.zeros((1, 12), np.float32)})[1]
    for typed in (False, True):
        if typed:
            for tensor in model.graph.initializer:
                _as_numbers(tensor)
        onnx.save(model, tmp_path / f"{typed}.onnx")
        checkpoint = Checkpoint.open(tmp_path / f"{typed}.onnx")
        np.testing.assert_allclose(checkpoint.dense("w").numpy(), want.T, rtol=2e-7)
        assert ("w" in checkpoint.placed) is (bits <= 8)


def _as_numbers(tensor: Any) -> None:
    """A tensor whose numbers lie in the typed fields of a file."""
    if tensor.data_type == TensorProto.FLOAT:
        tensor.float_data.extend(np.frombuffer(tensor.raw_data, np.float32).tolist())
    else:
        width = {TensorProto.INT16: np.int16, TensorProto.INT32: np.int32, TensorProto.INT8: np.int8}
        tensor.int32_data.extend(np.frombuffer(tensor.raw_data, width.get(tensor.data_type, np.uint8)).tolist())
    tensor.ClearField("raw_data")


def test_weights_beside_the_file(tmp_path: Path) -> None:
    made = in_blocks(mlp(), 4, False)
    onnx.save(made, tmp_path / "whole.onnx")
    onnx.save(made, tmp_path / "apart.onnx", save_as_external_data=True, location="apart.data", size_threshold=0)
    assert all(row["verdict"] == "same codes" for row in arrondi_diff(tmp_path / "whole.onnx", tmp_path / "apart.onnx"))
    (tmp_path / "apart.data").rename(tmp_path / "elsewhere.data")
    _refused(tmp_path / "apart.onnx", "apart.data, which is not there")


def arrondi_diff(one: Path, two: Path) -> list[dict[str, Any]]:
    from arrondi.pipeline.diff import diff_models

    rows: list[dict[str, Any]] = diff_models(one, two)["tensors"]
    return rows


@pytest.mark.parametrize(
    ("location", "offset", "length", "word"),
    [
        ("../secret", 0, 0, "no file beside"),
        ("/etc/passwd", 0, 0, "no file beside"),
        ("link", 0, 0, "a link to a file of another folder"),
        ("d", 1 << 40, 0, "lies at the bytes"),
        ("d", -8, 0, "lies at the bytes"),
        ("d", 0, 3, "lies at the bytes"),
        ("d", "x", 0, "no number"),
    ],
)
def test_numbers_outside_are_refused(location: str, offset: Any, length: int, word: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(1 << 16))
    (folder / "d").write_bytes(bytes(1 << 16))
    (folder / "link").symlink_to(tmp_path / "secret")
    model = mlp()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length or 64 * 48 * 4))):
        tensor.external_data.add(key=key, value=value)
    (folder / "q.onnx").write_bytes(model.SerializeToString())
    _refused(folder / "q.onnx", word)


def _refused(path: Path, word: str) -> None:
    with pytest.raises(FileFormatError) as caught:
        Checkpoint.open(path)
    assert word in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def _changed(change: Callable[[Any], None]) -> Any:
    model = in_blocks(mlp(), 4, False)
    change(model)
    return model


def _set(node: int, key: str, value: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        products = [n for n in model.graph.node if n.op_type == "MatMulNBits"]
        next(a for a in products[node].attribute if a.name == key).i = value

    return change


def _without(key: str) -> Callable[[Any], None]:
    """An attribute that says no number, which is 0 then and not the operator's default."""

    def change(model: Any) -> None:
        for node in model.graph.node:
            for a in node.attribute:
                if a.name == key:
                    a.ClearField("i")

    return change


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (_set(0, "block_size", 24), "blocks of 24"),
        (_set(0, "block_size", 32), "are needed"),
        (_set(0, "bits", 3), "3 bits"),
        (_without("bits"), "0 bits"),
        (_set(0, "N", 49), "are needed"),
        (_set(0, "K", 2**40), "are needed"),
        (_set(1, "K", -1), "(40, -1)"),
        (lambda m: m.graph.initializer[0].dims.append(2**39), "needs"),
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, 99), "needs"),
        (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "twice"),
        (lambda m: m.graph.ClearField("node"), "no weight"),
    ],
)
def test_files_that_lie_are_refused(change: Callable[[Any], None], word: str, tmp_path: Path) -> None:
    (tmp_path / "q.onnx").write_bytes(_changed(change).SerializeToString())
    _refused(tmp_path / "q.onnx", word)


def _as_text(model: Any) -> None:
    held = next(t for t in model.graph.initializer if t.data_type not in (TensorProto.FLOAT, TensorProto.INT64))
    held.ClearField("raw_data")
    held.data_type = TensorProto.STRING


def _of_several_kinds(model: Any) -> None:
    model.graph.node[0].attribute.add(name="axis", type=AttributeProto.INT, i=1, ints=[1, 2])


@pytest.mark.parametrize(("change", "word"), [(_as_text, "holds text"), (_of_several_kinds, "not a whole number")])
def test_values_of_another_kind_are_no_traceback(change: Callable[[Any], None], word: str, tmp_path: Path) -> None:
    model = in_blocks(mlp(), 4, True, standard=True)
    change(model)
    (tmp_path / "q.onnx").write_bytes(model.SerializeToString())
    _refused(tmp_path / "q.onnx", word)


def test_numbers_of_any_length_are_counted(tmp_path: Path) -> None:
    """Varints may be longer than a byte each, so their count is known only when they are read."""
    model = mlp()
    bias = next(t for t in model.graph.initializer if t.name.endswith("bias"))
    bias.CopyFrom(helper.make_tensor(bias.name, TensorProto.FLOAT16, [47], [1.5] * 47))
    bias.dims[0] = 48
    (tmp_path / "q.onnx").write_bytes(model.SerializeToString())
    checkpoint = Checkpoint.open(tmp_path / "q.onnx")
    with pytest.raises(FileFormatError, match="47 numbers are stored"):
        checkpoint.dense("encoder.layer.0.dense.bias")


def test_every_cut_is_refused(tmp_path: Path) -> None:
    whole = in_blocks(mlp(), 4, False).SerializeToString()
    for stop in (0, 1, 7, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "q.onnx").write_bytes(whole[:stop])
        with pytest.raises(FileFormatError, match=r"q\.onnx"):
            Checkpoint.open(tmp_path / "q.onnx")


def test_the_header_is_that_of_the_package(tmp_path: Path) -> None:
    """Operators, attributes, constants and ends as the package onnx parses them."""
    made = in_blocks(mlp(), 4, False)
    onnx.save(made, tmp_path / "q.onnx")
    model = read_model(tmp_path / "q.onnx")
    assert [n.op.rpartition(".")[2] for n in model.nodes] == [n.op_type for n in made.graph.node]
    for ours, theirs in zip(model.nodes, made.graph.node, strict=True):
        assert ours.inputs == tuple(theirs.input) and ours.outputs == tuple(theirs.output)
        assert ours.attrs == {a.name: a.i for a in theirs.attribute}
    assert {n: c.shape for n, c in model.constants.items()} == {t.name: tuple(t.dims) for t in made.graph.initializer}
    assert model.inputs == {"x": ("F32", ("n", 64))} and model.opsets == {"": 21, "com.microsoft": 1}


def test_inspect_and_dequantize(tmp_path: Path) -> None:
    onnx.save(in_blocks(mlp(), 4, False), tmp_path / "q.onnx")
    document = arrondi.inspect(tmp_path / "q.onnx")
    assert document["container"] == "onnx" and document["layout"] == "onnx" and document["opset"] == 21
    rows = {row["name"]: row for row in document["tensors"]}
    assert rows["head.weight"]["format"] == "w=int4/g16/asym" and rows["head.weight"]["bits_per_weight"] == pytest.approx(4 + 2 + 1 / 3, abs=0.1)  # fmt: skip
    arrondi.dequantize(tmp_path / "q.onnx", tmp_path / "plain", "float32")
    assert {row["verdict"] for row in arrondi_diff(tmp_path / "q.onnx", tmp_path / "plain")} == {
        "same values",
        "same codes",
    }
