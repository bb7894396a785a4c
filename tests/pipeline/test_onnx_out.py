"""Graphs with packed weights: ONNX Runtime computes with them what our own dequantization says, and no value is lost on the way there and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.errors import ArrondiError, OutputError, SchemeError
from arrondi.graph.bulk import write_bulk
from arrondi.pipeline.convert import convert_model
from arrondi.pipeline.diff import diff_models
from arrondi.pipeline.inspect import inspect_model
from arrondi.pipeline.onnx_out import dequantize_to_onnx
from tests.checkpoint.containers.onnx_nets import in_blocks, in_four, mlp, values_of

SCHEMES = ["w=int4/g32/asym/float16", "w=int8/g16/float16", "w=int2/g32/asym", "w=int4/channel", "w=int8/tensor/asym"]


def logits(path: Path, ids: torch.Tensor) -> Any:
    """What ONNX Runtime computes in floats."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return session.run(None, {i.name: given[i.name].numpy() for i in session.get_inputs()})[0]


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


@pytest.fixture(scope="module")
def graph(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama as PyTorch exports it, with packed weights: one export for all."""
    out = tmp_path_factory.mktemp("graph") / "out"
    arrondi.quantize(models("llama", torch.float16), "w=int4/g32/asym", out=out.parent / "packed", to="arrondi")
    convert_model(out.parent / "packed", out, "onnx", exact_only=True)
    return out / "model.onnx"


@pytest.mark.parametrize("to", ["onnx", "onnx-qdq"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_runtime_computes_with_what_we_read(scheme: str, to: str, graph: Path, models: Callable[..., Path], tmp_path: Path) -> None:  # fmt: skip
    """Any scheme put into a graph of the model: the runtime's logits are those of the packed model here."""
    arrondi.quantize(models("llama", torch.float16), scheme, out=tmp_path / "q", to="arrondi")
    result = convert_model(tmp_path / "q", tmp_path / "m.onnx", to, template=graph, exact_only=True)
    assert result["exact"] == len(Checkpoint.open(tmp_path / "q").placed) and not result["requantized"]
    assert {row["verdict"] for row in diff_models(tmp_path / "q", tmp_path / "m.onnx")["tensors"]} <= {"same codes", "same values"}  # fmt: skip
    assert ("MatMulNBits" in operators(tmp_path / "m.onnx")) is (to == "onnx" and "/g" in scheme)
    ids = torch.randint(1, 60, (2, 11))
    with torch.no_grad():
        want = arrondi.load(tmp_path / "q", fuse=False)(ids).logits.numpy()
    np.testing.assert_allclose(logits(tmp_path / "m.onnx", ids), want, atol=2e-5 * np.abs(want).max())


def test_there_and_back(graph: Path, models: Callable[..., Path], tmp_path: Path) -> None:
    """GPTQ → AWQ → MatMulNBits → DequantizeLinear → MatMulNBits → GPTQ: the same bytes in every tensor."""
    arrondi.quantize(models("llama", torch.float16), "w=int4/g32/asym/float16", out=tmp_path / "q", to="gptq")
    steps = [("awq", "a", None), ("onnx", "b.onnx", graph), ("onnx-qdq", "c.onnx", None), ("onnx", "d", None), ("gptq", "e", None)]  # fmt: skip
    last = tmp_path / "q"
    for to, name, template in steps:
        result = convert_model(last, tmp_path / name, to, template=template, exact_only=True)
        assert result["exact"] and not result["rescaled"] and not result["requantized"]
        last = tmp_path / name
        if name == "c.onnx":
            assert "MatMulNBits" not in operators(last)
        if name == "d":  # a folder that holds one graph is that graph
            (last / "config.json").write_bytes((graph.parent / "config.json").read_bytes())
    one, two = (load_file(p / "model.safetensors") for p in (tmp_path / "q", tmp_path / "e"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        parted = name.endswith(("qweight", "qzeros", "scales", "g_idx"))
        assert torch.equal(value if parted else value.float(), two[name]), (
            name
        )  # a graph computes in one type of floats


def test_a_folder_that_holds_one_graph_is_that_graph(graph: Path, tmp_path: Path) -> None:
    assert inspect_model(graph.parent) == inspect_model(graph)
    assert {r["verdict"] for r in diff_models(graph.parent, graph)["tensors"]} == {"same codes"}
    for name in ("encoder.onnx", "decoder.onnx"):
        (tmp_path / name).symlink_to(graph)
    with pytest.raises(ArrondiError, match=r"Give one of them, such as decoder\.onnx"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("standard", [False, True])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "NF4"])
def test_other_tools_files(kind: str, standard: bool, tmp_path: Path) -> None:
    """What ONNX Runtime's quantizers wrote, in the other form or as floats, computes what it computed."""
    made = in_four(mlp(), 1) if kind == "NF4" else in_blocks(mlp(), 4, kind == "symmetric", standard=standard)
    onnx.save(made, tmp_path / "q.onnx")
    dequantize_to_onnx(tmp_path / "q.onnx", tmp_path / "float.onnx")
    assert operators(tmp_path / "float.onnx") == {"MatMul", "Add", "Relu"}
    onnx.checker.check_model(tmp_path / "float.onnx", full_check=True)
    want = values_of(tmp_path / "float.onnx")
    if kind == "NF4":
        with pytest.raises(SchemeError, match="Leave --exact-only out"):
            convert_model(tmp_path / "q.onnx", tmp_path / "x.onnx", "onnx", exact_only=True)
        return
    for to in ("onnx", "onnx-qdq"):
        result = convert_model(tmp_path / "q.onnx", tmp_path / f"{to}.onnx", to, exact_only=True)
        assert result["exact"] == 2
        assert all(r["verdict"].startswith("same") for r in diff_models(tmp_path / "q.onnx", tmp_path / f"{to}.onnx")["tensors"])  # fmt: skip
    np.testing.assert_allclose(values_of(tmp_path / "onnx.onnx"), want, rtol=1e-4, atol=1e-4)


def test_a_table_that_is_looked_up(tmp_path: Path) -> None:
    """GatherBlockQuantized becomes a DequantizeLinear before a Gather, which computes the same numbers."""
    onnx.save(in_blocks(mlp(table=True), 4, False, table=True), tmp_path / "q.onnx")
    convert_model(tmp_path / "q.onnx", tmp_path / "o.onnx", "onnx", exact_only=True)
    assert operators(tmp_path / "o.onnx") == {"DequantizeLinear", "Gather", "MatMulNBits", "Add", "Relu"}
    one, two = (values_of(tmp_path / name, ids=True) for name in ("q.onnx", "o.onnx"))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


def test_an_encoder_is_exported(models: Callable[..., Path], tmp_path: Path) -> None:
    plain = models("bert")
    report = arrondi.quantize(plain, "W8A16", group_size=32, out=tmp_path / "m", to="onnx")
    assert report["container"] == "onnx" and sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    assert {"config.json", "model.onnx", "report.json"} <= {p.name for p in (tmp_path / "m").iterdir()}
    ids = torch.randint(1, 60, (2, 9))
    loaded = arrondi.load(tmp_path / "m" / "model.onnx", fuse=False)
    with torch.no_grad():
        want = next(iter(loaded(ids).values())).numpy()
    np.testing.assert_allclose(logits(tmp_path / "m" / "model.onnx", ids), want, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "phi3-fused-qkv", "llama-tied"])
def test_other_families_are_exported(name: str, models: Callable[..., Path], tmp_path: Path) -> None:
    arrondi.quantize(models(name), "w=int4/g32/asym", out=tmp_path / "q", to="arrondi")
    convert_model(tmp_path / "q", tmp_path / "o", "onnx", exact_only=True)
    ids = torch.randint(1, 60, (2, 11))
    with torch.no_grad():
        want = arrondi.load(tmp_path / "q", fuse=False)(ids).logits.numpy()
    np.testing.assert_allclose(logits(tmp_path / "o" / "model.onnx", ids), want, atol=2e-5)


def test_a_model_that_cannot_be_traced_is_refused(models: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match=r"cannot be traced.*--template") as caught:
        convert_model(models("mixtral"), tmp_path / "o", "onnx")
    assert "\x1b" not in str(caught.value) and not list(tmp_path.iterdir())


def test_large_constants_lie_beside(tmp_path: Path) -> None:
    """The same tensors, in a file of their own beside the graph."""
    from arrondi.checkpoint.containers.onnx.view import view_of
    from arrondi.graph.packed import replace_weights

    onnx.save(in_blocks(mlp(), 4, False), tmp_path / "q.onnx")
    view = view_of(tmp_path / "q.onnx")
    model, constants = replace_weights(view, tmp_path / "q.onnx", {}, {})
    nbytes = write_bulk(model, constants, tmp_path / "apart.onnx", apart=0)
    assert nbytes == sum((tmp_path / n).stat().st_size for n in ("apart.onnx", "apart.onnx.data"))
    assert {r["verdict"] for r in diff_models(tmp_path / "q.onnx", tmp_path / "apart.onnx")["tensors"]} == {
        "same codes"
    }
    np.testing.assert_array_equal(values_of(tmp_path / "q.onnx"), values_of(tmp_path / "apart.onnx"))


def test_what_is_in_the_way_is_said(graph: Path, models: Callable[..., Path], tmp_path: Path) -> None:
    onnx.save(in_blocks(mlp(), 4, False), tmp_path / "q.onnx")
    cases: list[tuple[dict[str, Any], type[ArrondiError], str]] = [
        ({"model": tmp_path / "q.onnx", "out": tmp_path / "q.onnx"}, OutputError, "are the same|is there already"),
        ({"model": graph.parent.parent / "packed", "out": tmp_path / "n.onnx", "template": tmp_path / "q.onnx"}, SchemeError, "none of its weights"),
        ({"model": graph.parent.parent / "packed", "out": tmp_path / "n.onnx", "template": graph.parent / "config.json"}, ArrondiError, "is no ONNX file"),
        ({"model": models("t5"), "out": tmp_path / "n"}, SchemeError, "reads more than token ids"),
    ]  # fmt: skip
    for given, error, words in cases:
        with pytest.raises(error, match=words):
            convert_model(to="onnx", **given)
    assert [p.name for p in tmp_path.iterdir()] == ["q.onnx"]
