"""Vision transformers as graphs: what is rounded in them, the methods that are theirs, and grids that are not uniform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import arrondi
from arrondi.errors import SchemeError
from arrondi.graph import Program, product_places, read_graph, tidy, write_graph
from arrondi.graph.ir import QDQ, Graph, Node, Value
from arrondi.graph.uneven import check_grids, on_uneven, uneven
from tests.graph.nets import images, perturbed

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

W3A3 = "w=int3/channel,a=int3/token"


class Encoder(nn.Module):
    """Patches of 4 × 4, two pre-norm blocks of two heads, a class token."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.heads = heads
        self.patch, self.token = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.zeros(1, 1, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        n, t, c = x.shape
        for i in range(2):
            y = self.norms[2 * i](x)
            q, k, v = self.qkv[i](y).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5).softmax(-1)
            x = x + self.out[i]((weights @ v).transpose(1, 2).reshape(n, t, c))
            x = x + self.down[i](nn.functional.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return self.head(self.norms[4](x)[:, 0])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "net.onnx"
    write_graph(read_graph(perturbed(Encoder()), images(2)), path)
    return path


def quantized(file: Path, out: Path, scheme: str = W3A3, **settings: Any) -> dict[str, Any]:
    return arrondi.quantize(
        file, scheme, calibration=images(64), evaluation=images(64, seed=2), out=out, overwrite=True, **settings
    )  # type: ignore[no-any-return]


def in_runtime(path: Path, x: torch.Tensor) -> np.ndarray:
    options = ort.SessionOptions()
    # By itself the runtime rounds floating inputs of products with 4-bit weights to eight bits of its own.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def test_a_bias_belongs_to_its_product_and_blocks_are_units(file: Path, tmp_path: Path) -> None:
    graph = tidy(read_graph(file))
    program, x = Program(graph), images(3, seed=5)
    assert sum(node.op == "MatMul" and len(node.inputs) == 3 for node in graph.nodes) == 8
    assert all(program.get_submodule(path).bias is not None for path in program.layers.values())
    assert len(program) == 6  # patches, two halves of two blocks, the head
    write_graph(graph, tmp_path / "again.onnx")
    assert np.allclose(in_runtime(tmp_path / "again.onnx", x), in_runtime(file, x), atol=1e-5)
    assert np.allclose(program(x).numpy(), in_runtime(file, x), atol=1e-4)


def test_both_sides_of_every_product_are_rounded_and_nothing_else(file: Path, tmp_path: Path) -> None:
    graph = tidy(read_graph(file))
    places = product_places(graph)
    producers = graph.producers
    wanted = {
        n
        for node in graph.nodes
        if node.op in ("MatMul", "Gemm", "Conv")
        for n in node.inputs
        if n not in graph.constants
    }
    assert set(places.values) == wanted and len(wanted) == 1 + 2 * 8 + 1
    assert sum(n in producers and producers[n].op == "Softmax" for n in places.values) == 2
    report = quantized(file, tmp_path / "out.onnx", "W4A4", method="rtn")
    assert report["rounded_values"] == len(wanted)
    every = quantized(file, tmp_path / "all.onnx", "W4A4", method="rtn", rounded="all")
    assert every["rounded_values"] > len(wanted) and every["grids"] < report["grids"] == len(wanted)
    with pytest.raises(SchemeError, match="all or products"):
        quantized(file, tmp_path / "out.onnx", "W4A4", method="rtn", rounded="some")


@pytest.mark.parametrize("method", ["ptq4vit", "liu", "fima-q"])
def test_methods_of_transformers_beat_whole_ranges(file: Path, tmp_path: Path, method: str) -> None:
    options = {"block-fisher.iterations": 40} if method == "fima-q" else {}
    out = tmp_path / "out.onnx"
    given = quantized(file, out, method=method, options=options)["evaluation"]
    plain = quantized(file, tmp_path / "rtn.onnx", method="rtn", options={"range": "absmax"}, observer="min-max")[
        "evaluation"
    ]
    assert given["sqnr_db"] > plain["sqnr_db"] + 0.5
    x = images(8, seed=6)
    assert np.allclose(in_runtime(out, x), Program(read_graph(out))(x).numpy(), atol=1e-3)


@pytest.mark.parametrize("grids", [{"softmax": "twin", "gelu": "twin"}, {"softmax": "log2"}])
def test_files_hold_uneven_grids_in_standard_operators(file: Path, tmp_path: Path, grids: dict[str, str]) -> None:
    out, x = tmp_path / "out.onnx", images(8, seed=6)
    report = quantized(file, out, "W4A4", method="ptq4vit", grids=grids)
    assert report["evaluation"]["sqnr_db"] > 5
    graph = read_graph(out)
    assert sum(node.op == "Where" for node in graph.nodes) >= 2 * len(grids)
    assert np.allclose(in_runtime(out, x), Program(graph)(x).numpy(), atol=1e-3)


@pytest.mark.parametrize(
    ("op", "grid", "bits"),
    [("Softmax", "twin", 4), ("Softmax", "twin", 6), ("Gelu", "twin", 4), ("Softmax", "log2", 4)],
)
def test_an_uneven_grid_is_a_grid_and_its_operators_say_the_same(op: str, grid: str, bits: int, tmp_path: Path) -> None:
    attrs, scale = uneven(op, grid, bits, 3.0)
    generator = torch.Generator().manual_seed(1)
    x = (
        torch.rand(4000, generator=generator) ** 4
        if op == "Softmax"
        else nn.functional.gelu(2 * torch.randn(4000, generator=generator))
    )
    x[0] = 0
    given = on_uneven(attrs, x, torch.from_numpy(scale))
    assert len(given.unique()) <= 2**bits + 1  # zero has two codes, or none beside the powers
    assert given[0] == 0
    kept = given != np.float32(scale[0] * attrs["high"])  # the end of a fine grid is on the coarse one's side
    assert torch.equal(on_uneven(attrs, given, torch.from_numpy(scale))[kept], given[kept])
    assert (given[x.argsort()].diff() >= -1e-7).all()
    constants = {"s": scale, "z": np.zeros((), np.int8)}
    node = Node("g", QDQ, ("x", "s", "z"), ("y",), attrs)
    ends = [(Value(n, np.dtype(np.float32), (4000,)),) for n in ("x", "y")]
    write_graph(Graph("g", (node,), ends[0], ends[1], constants, 21), tmp_path / "g.onnx")
    assert np.mean(np.abs(in_runtime(tmp_path / "g.onnx", x) - given.numpy()) > 1e-6) < 1e-3  # ties of a logarithm


def test_the_grids_of_the_papers_are_nearer_to_what_they_are_for() -> None:
    generator = torch.Generator().manual_seed(2)
    p, v = torch.randn(64, 197, generator=generator).softmax(1), torch.randn(197, 16, generator=generator)

    def error(given: torch.Tensor) -> float:
        return float((given @ v - p @ v).square().mean())

    uniform = error((p * 15).round() / 15)
    for grid in ("twin", "log2"):
        attrs, scale = uneven("Softmax", grid, 4, 1.0)
        assert error(on_uneven(attrs, p, torch.from_numpy(scale))) < uniform


def test_grids_that_are_not_there_are_named() -> None:
    assert check_grids({"softmax": "uniform", "gelu": "twin"}) == {"Gelu": "twin"}
    for asked in ({"relu": "twin"}, {"gelu": "log2"}):
        with pytest.raises(SchemeError, match="softmax=twin, softmax=log2, gelu=twin"):
            check_grids(asked)


def test_grids_of_operators_that_a_network_has_not_are_refused(file: Path, tmp_path: Path) -> None:
    graph = read_graph(file)
    nodes = [Node(n.name, "Tanh", n.inputs, n.outputs) if n.op == "Gelu" else n for n in graph.nodes]
    write_graph(graph.with_nodes(nodes), tmp_path / "net.onnx")
    with pytest.raises(SchemeError, match="has no operator Gelu"):
        quantized(tmp_path / "net.onnx", tmp_path / "out.onnx", "W4A4", grids={"gelu": "twin", "softmax": "twin"})


class Post(Encoder):
    """One head, norms behind the sums, three projections, a GELU that is spelled, and a mean in place of the token."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for i in range(2):
            q, k, v = (
                nn.functional.linear(x, w, b)
                for w, b in zip(self.qkv[i].weight.chunk(3), self.qkv[i].bias.chunk(3), strict=True)
            )  # type: ignore[operator,union-attr]
            y = nn.functional.scaled_dot_product_attention(*(a.unsqueeze(1) for a in (q, k, v))).squeeze(1)
            x = self.norms[2 * i](x + self.out[i](y))
            z = self.up[i](x)
            x = self.norms[2 * i + 1](x + self.down[i](z * 0.5 * (1 + torch.erf(z / 2**0.5))))
        return self.head(x.mean(1))


@pytest.mark.parametrize("method", ["ptq4vit", "liu", "fima-q"])
def test_methods_of_transformers_work_on_others(tmp_path: Path, method: str) -> None:
    source, out, x = tmp_path / "net.onnx", tmp_path / "out.onnx", images(64, seed=2)
    write_graph(read_graph(perturbed(Post()), images(2)), source)
    options = {"block-fisher.iterations": 20} if method == "fima-q" else {}
    report = quantized(source, out, "W4A4", method=method, options=options)
    assert "Shape" not in report["float_operators"] and report["float_operators"]["Erf"] == 2
    assert all(row["status"] == "quantized" for row in report["layers"]) and report["rounded_values"] == 1 + 2 * 8 + 1
    ours, theirs = in_runtime(out, x), in_runtime(source, x)
    wanted = 10 * np.log10((theirs**2).sum() / ((ours - theirs) ** 2).sum())
    assert report["evaluation"]["sqnr_db"] == pytest.approx(wanted, abs=0.1)
    assert report["evaluation"]["agreement"] == pytest.approx((ours.argmax(1) == theirs.argmax(1)).mean(), abs=0.02)
