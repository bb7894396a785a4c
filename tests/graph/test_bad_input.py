"""Files, data and options that are wrong: one sentence each, exit status 2, and nothing written."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import arrondi
from arrondi.cli import _run
from arrondi.errors import DEFECT, ArrondiError, FileFormatError, SchemeError, say
from arrondi.graph import read_graph

onnx = pytest.importorskip("onnx")
H, FLOAT = onnx.helper, 1
DRAW = np.random.default_rng(0)
X = DRAW.normal(0, 1, (16, 3, 6, 6)).astype(np.float32)
LABELS = DRAW.integers(0, 10, 16)


def held() -> dict[str, np.ndarray]:
    shapes = {"w": (8, 3, 3, 3), "b": (8,), "v": (10, 8)}
    return {n: np.random.default_rng(1).normal(0, 0.3, s).astype(np.float32) for n, s in shapes.items()}


def node(op: str, inputs: str, output: str, **attrs: Any) -> Any:
    return H.make_node(op, inputs.split(), [output], f"{op.lower()}_{output}", **attrs)


HEAD = [node("GlobalAveragePool", "a", "g"), node("Flatten", "g", "f"), node("Gemm", "f v", "y", transB=1)]
NODES = [node("Conv", "x w b", "c", pads=[1, 1, 1, 1]), node("Relu", "c", "a"), *HEAD]


def model(nodes: list[Any] | None = None, opset: int = 21, **constants: Any) -> Any:
    info = H.make_tensor_value_info
    parts = [onnx.numpy_helper.from_array(v, n) for n, v in {**held(), **constants}.items()]
    graph = H.make_graph(nodes or NODES, "g", [info("x", FLOAT, ["n", 3, 6, 6])], [info("y", FLOAT, ["n", 10])], parts)
    made = H.make_model(graph, opset_imports=[H.make_opsetid("", opset), H.make_opsetid("mine", 1)])
    made.ir_version = 10
    return made


def quantize(folder: Path, network: Path, data: Path, *more: str) -> tuple[int, str]:
    """(exit status, what was said)"""
    out = folder / "out.onnx"
    arguments = ["quantize", network, "-o", out, "--scheme", "W8A8", "--method", "rtn", "--calibration", data, "--quiet", "--json", *more]  # fmt: skip
    try:
        return _run([str(a) for a in arguments]), ""
    except ArrondiError as error:
        assert not out.exists() and not [p for p in folder.iterdir() if p.name.endswith(".part")]
        sentence, status = say(error)
        return status, sentence


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "net.onnx").write_bytes(model().SerializeToString())
    np.savez(tmp_path / "data.npz", inputs=X, labels=LABELS)
    return tmp_path / "net.onnx", tmp_path / "data.npz"


def branch() -> Any:
    info = [H.make_empty_tensor_value_info("t")]
    body = H.make_graph([H.make_node("Neg", ["c"], ["t"])], "body", [], info)
    return H.make_node("If", ["q"], ["a"], "choose", then_branch=body, else_branch=body)


NETWORKS: dict[str, tuple[Callable[[], Any], str]] = {
    "channels": (lambda: model(w=np.ones((8, 4, 3, 3), np.float32)), "conv_c: the operator Conv cannot be computed"),
    "bias": (lambda: model(b=np.ones(7, np.float32)), "conv_c: the operator Conv cannot be computed"),
    "matrix": (lambda: model(v=np.ones((10, 9), np.float32)), "gemm_y: the operator Gemm cannot be computed"),
    "cycle": (lambda: model([node("Add", "x z", "u"), node("Add", "u b", "z"), *NODES]), "cannot be read"),
    "undefined": (lambda: model([node("Add", "x nope", "u"), *NODES]), "cannot be read"),
    "new operators": (lambda: model(opset=99), "operator set 99"),
    "old operators": (lambda: model(opset=5), "cannot be read"),
    "no operator": (lambda: model([NODES[0], node("Frob", "c", "a"), *HEAD]), "Frob"),
    "others' operator": (lambda: model([NODES[0], node("Frob", "c", "a", domain="mine"), *HEAD]), "ONNX Runtime on this machine knows mine.Frob (1)"),
    "not finite": (lambda: model(w=np.full((8, 3, 3, 3), np.nan, np.float32)), "NaN or infinite numbers at"),
    "branches": (
        lambda: model([NODES[0], node("ReduceMax", "c", "m", keepdims=0), node("Greater", "m s", "q"), branch(), *HEAD], s=np.float32(0)),
        "choose is control flow",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_wrong_network_is_one_sentence(files: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    make, said = NETWORKS[kind]
    files[0].write_bytes(make().SerializeToString())
    status, sentence = quantize(tmp_path, *files)
    assert status == 2 and said in sentence and "\n" not in sentence


def test_every_beginning_of_a_file_is_refused(files: tuple[Path, Path]) -> None:
    whole = files[0].read_bytes()
    for part in range(50):
        files[0].write_bytes(whole[: len(whole) * part // 50])
        with pytest.raises(FileFormatError, match=r"^[^\n]+cannot be read[^\n]+$"):
            read_graph(files[0])


def test_flipped_bytes_are_never_a_defect(files: tuple[Path, Path]) -> None:
    whole, draw = files[0].read_bytes(), np.random.default_rng(3)
    ends = [*range(220), *range(len(whole) - 260, len(whole))]  # names, shapes and types
    for _ in range(120):
        changed = bytearray(whole)
        changed[int(draw.choice(ends))] ^= int(draw.integers(1, 256))
        files[0].write_bytes(changed)
        try:
            read_graph(files[0])
        except Exception as error:
            assert say(error)[1] != DEFECT, error


@pytest.mark.parametrize("missing", [True, False])
def test_constants_beside_the_file(files: tuple[Path, Path], tmp_path: Path, missing: bool) -> None:
    onnx.save_model(model(), files[0], save_as_external_data=True, location="ext.bin", size_threshold=0)
    (tmp_path / "ext.bin").unlink() if missing else (tmp_path / "ext.bin").write_bytes(b"\0" * 40)
    status, sentence = quantize(tmp_path, *files)
    assert status == 2 and "cannot be read" in sentence


DATA: dict[str, tuple[dict[str, Any], str]] = {
    "last": ({"inputs": np.moveaxis(X, 1, 3)}, "channels come last"),
    "size": ({"inputs": X[:, :, :5]}, "has the shape (N, 3, 6, 6)"),
    "none": ({"inputs": X[:0]}, "at least one"),
    "few": ({"inputs": X[:2]}, "at least 4"),
    "nan": ({"inputs": np.full_like(X, np.nan)}, "NaN"),
    "large": ({"inputs": X.astype(np.float64) * 1e300}, "too large"),
    "name": ({"pictures": X}, "needs inputs"),
    "objects": ({"inputs": np.array([{}] * 16, object)}, "Python objects"),
    "text": ({"inputs": np.array(["a"] * 16)}, "made of numbers"),
    "labels' number": ({"inputs": X, "labels": LABELS[:9]}, "16 whole numbers"),
    "labels' type": ({"inputs": X, "labels": LABELS.astype(str)}, "16 whole numbers"),
    "float labels": ({"inputs": X, "labels": LABELS.astype(float)}, "16 whole numbers"),
    "one label": ({"inputs": X, "labels": np.int64(1)}, "16 whole numbers"),
    "labels of places": ({"inputs": X, "labels": np.zeros((16, 4), int)}, "labels are 4 classes of every sample"),
    "negative labels": ({"inputs": X, "labels": LABELS - 1}, "counted from 0"),
    "large labels": ({"inputs": X, "labels": LABELS * 0 + 10}, "tells 10 classes apart"),
}


@pytest.mark.parametrize("kind", DATA)
def test_wrong_data_is_one_sentence(files: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    arrays, said = DATA[kind]
    np.savez(files[1], **arrays)
    status, sentence = quantize(tmp_path, *files)
    assert status == 2 and said in sentence and "\n" not in sentence


def test_damaged_archives(files: tuple[Path, Path], tmp_path: Path) -> None:
    whole = files[1].read_bytes()
    for content in (b"", b"x", whole[:900], whole[:300] + b"\xff\xff" + whole[302:]):
        files[1].write_bytes(content)
        status, sentence = quantize(tmp_path, *files)
        assert status == 2 and "cannot be read as an .npz file" in sentence


@pytest.mark.parametrize(
    "option", ["--keep-misfits", "--seq-len 64", "--device cuda", "--max-kl 1", "--all-experts", "--shard-size 1GB"]
)
def test_options_of_language_models_are_refused(files: tuple[Path, Path], tmp_path: Path, option: str) -> None:
    status, sentence = quantize(tmp_path, *files, *option.split())
    assert status == 2 and f"takes no {option.split()[0]}" in sentence
    if option.split()[0] not in ("--keep-misfits", "--all-experts", "--shard-size"):
        with pytest.raises(SchemeError, match=f"takes no {option.split()[0]}"):
            _run(["eval", str(files[0]), "--against", str(files[0]), "--data", str(files[1]), *option.split()])


def test_groups_that_do_not_fit_name_what_does(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match=r"does not divide its shape.*one scale a channel") as said:
        arrondi.quantize(files[0], "w=int4/g32", out=tmp_path / "out.onnx")
    assert "--keep-misfits" not in str(said.value)


def test_no_eval_measures_nothing(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(tmp_path, *files, "--no-eval")[0] == 0
    assert json.loads(capsys.readouterr().out)["evaluation"] is None


def test_what_an_archive_holds_besides_is_said(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(files[1], inputs=X, label=LABELS)
    assert quantize(tmp_path, *files)[0] == 0
    assert any(
        "holds label, which is not read" in s.replace("also ", "") for s in json.loads(capsys.readouterr().out)["notes"]
    )
    assert _run(["eval", str(files[0]), "--against", str(files[0]), "--data", str(files[1]), "--json"]) == 0
    assert "classes are read from labels" in json.loads(capsys.readouterr().out)["notes"][0]


def test_samples_in_another_scale(files: tuple[Path, Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "test.npz", inputs=np.abs(X) * 255, labels=LABELS)
    status, sentence = quantize(tmp_path, *files, "--data", str(tmp_path / "test.npz"))
    assert status == 2 and "own scale" in sentence


@pytest.mark.parametrize("values", [0.0, 1.0])
def test_constant_inputs_and_dead_channels_have_grids(
    files: tuple[Path, Path], tmp_path: Path, values: float, capsys: pytest.CaptureFixture[str]
) -> None:
    constants = held()
    constants["w"][:4], constants["b"][:4] = 0, -1
    files[0].write_bytes(model(**constants).SerializeToString())
    np.savez(files[1], inputs=np.full_like(X, values))
    assert quantize(tmp_path, *files)[0] == 0
    graph = read_graph(tmp_path / "out.onnx")
    assert all(np.isfinite(v).all() and (v > 0).all() for n, v in graph.constants.items() if n.endswith("_scale"))
    assert json.loads(capsys.readouterr().out)["evaluation"]["agreement"] == 1


def test_operators_outside_the_table_are_counted(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files[0].write_bytes(
        model([NODES[0], node("Softsign", "c", "s"), node("Exp", "s", "a"), *HEAD]).SerializeToString()
    )
    assert quantize(tmp_path, *files)[0] == 0
    assert json.loads(capsys.readouterr().out)["float_operators"] == {"Softsign": 1, "Exp": 1}


def test_a_trace_that_ends_says_where(capfd: pytest.CaptureFixture[str]) -> None:
    class Branching(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    level = logging.getLogger("torch.export").disabled
    with pytest.raises(SchemeError, match=r"at .*test_bad_input.py, line \d+: return x \* 2.*in memory"):
        read_graph(Branching(), torch.ones(2, 3))
    assert logging.getLogger("torch.export").disabled == level
    said = capfd.readouterr()
    assert not said.out and not said.err
