"""Constants that one file cannot hold lie beside it, and so they may in what is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import arrondi
from arrondi.errors import FileFormatError
from arrondi.graph import Graph, Node, Value, read_graph, write, write_graph
from tests.graph.test_bad_input import model

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
FLOAT = np.dtype(np.float32)


def network() -> Graph:
    """A product of 256 KB and a small one."""
    draw = np.random.default_rng(2)
    held = {n: draw.normal(0, 0.1, s).astype(np.float32) for n, s in {"w": (256, 256), "v": (256, 10)}.items()}
    nodes = (Node("one", "MatMul", ("x", "w"), ("h",)), Node("relu", "Relu", ("h",), ("r",)), Node("two", "MatMul", ("r", "v"), ("y",)))  # fmt: skip
    ends = Value("x", FLOAT, ("n", 256)), Value("y", FLOAT, ("n", 10))
    return Graph("net", nodes, ends[:1], ends[1:], held, 21)


def test_large_networks_have_their_constants_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_graph(network(), tmp_path / "net.onnx")
    monkeypatch.setattr(write, "_MOST", 10_000)
    source, out = tmp_path / "large/net.onnx", tmp_path / "out.onnx"
    write_graph(network(), source)
    assert source.stat().st_size < 15_000 and (tmp_path / "large/net.onnx.data").stat().st_size > 256 * 1024
    for name, value in read_graph(source).constants.items():
        assert np.array_equal(value, network().constants[name])
    x = np.random.default_rng(3).normal(0, 1, (40, 256)).astype(np.float32)
    for _ in range(2):  # again, over what is there
        report = arrondi.quantize(source, "W8A8", calibration=x, evaluation=x, out=out, overwrite=True)
    beside = tmp_path / "out.onnx.data"
    assert report["file_bytes"] == out.stat().st_size + beside.stat().st_size and beside.stat().st_size < 80_000
    assert arrondi.inspect(out)["file_bytes"] == report["file_bytes"]
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".part")]
    ours, theirs, plain = (ort.InferenceSession(p).run(None, {"x": x})[0] for p in (out, source, tmp_path / "net.onnx"))
    assert np.array_equal(theirs, plain)
    wanted = 10 * np.log10((theirs**2).sum() / ((ours - theirs) ** 2).sum())
    assert report["evaluation"]["sqnr_db"] == pytest.approx(wanted, abs=0.3) and wanted > 25


@pytest.mark.parametrize("place", ["../w.bin", "/w.bin", "no.bin", "link.bin"])
def test_constants_elsewhere_are_not_read(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "net"
    folder.mkdir()
    onnx.save_model(model(), folder / "net.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert read_graph(folder / "net.onnx").constants
    (folder / "w.bin").rename(tmp_path / "w.bin")
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    held = onnx.load(folder / "net.onnx", load_external_data=False)
    for entry in (e for tensor in held.graph.initializer for e in tensor.external_data if e.key == "location"):
        entry.value = place if place[0] != "/" else f"{tmp_path}{place}"
    (folder / "net.onnx").write_bytes(held.SerializeToString())
    with pytest.raises(FileFormatError, match=r"^[^\n]+cannot be read[^\n]+$"):
        read_graph(folder / "net.onnx")
