"""Folders of pictures as samples: every kind of picture, every layout of a network, and every folder that is none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arrondi.cli import _run
from arrondi.errors import ArrondiError, DataError, FileFormatError
from arrondi.graph import Graph, Value
from arrondi.measure.arrays import read_arrays
from arrondi.measure.pictures import samples_of
from tests.graph.test_bad_input import model

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("onnx")
SHAPE = ("n", 3, 6, 6)
DRAW = np.random.default_rng(4)
PIXELS = DRAW.integers(0, 256, (6, 6, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]


def network(shape: tuple[Any, ...] = SHAPE, kind: Any = np.float32, inputs: int = 1) -> Graph:
    values = tuple(Value(f"x{i}", np.dtype(kind), shape) for i in range(inputs))
    return Graph("net", (), values, (), {}, 21)


def alpha() -> Any:
    return Image.fromarray(np.dstack([PIXELS, GREY]), "RGBA")


KINDS: dict[str, tuple[str, Any, np.ndarray]] = {
    "png": ("a.png", lambda: Image.fromarray(PIXELS), PIXELS),
    "alpha": ("a.PNG", alpha, PIXELS),
    "grey": ("a.bmp", lambda: Image.fromarray(GREY), np.dstack([GREY] * 3)),
    "sixteen bits": ("a.png", lambda: Image.fromarray(GREY.astype(np.uint16) * 257), np.dstack([GREY] * 3)),
    "palette": ("a.png", lambda: Image.fromarray(GREY).convert("P"), np.dstack([GREY] * 3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_has_its_pixels(tmp_path: Path, kind: str) -> None:
    name, make, wanted = KINDS[kind]
    make().save(tmp_path / name)
    found = samples_of(tmp_path, SHAPE)
    assert np.abs(found[0].permute(1, 2, 0).numpy() * 255 - wanted).max() < 1e-3


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_files_are_nearly_their_pixels(tmp_path: Path, mode: str) -> None:
    plain = Image.new("RGB", (6, 6), (200, 120, 40))
    plain.convert(mode).save(tmp_path / "a.jpeg", quality=95)
    wanted = np.asarray(plain.convert("L").convert("RGB") if mode == "L" else plain, float)
    assert np.abs(samples_of(tmp_path, SHAPE)[0].permute(1, 2, 0).numpy() * 255 - wanted).max() < 4


def test_layouts_sizes_and_normalization(tmp_path: Path) -> None:
    wide = np.zeros((12, 20, 3), np.uint8)
    wide[:, 4:16] = np.repeat(np.repeat(PIXELS, 2, 0), 2, 1)  # what is cut out, twice as large
    Image.fromarray(wide).save(tmp_path / "a.png")
    first = samples_of(tmp_path, SHAPE)
    last = samples_of(tmp_path, ("n", 6, 6, 3))
    assert torch.equal(first, last.permute(0, 3, 1, 2))
    plain = samples_of(tmp_path, ("n", 12, 12, 3))
    assert np.array_equal((plain[0].numpy() * 255).round(), wide[:, 4:16])
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    moved = samples_of(tmp_path, SHAPE, mean, std)
    wanted = (first - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(moved, wanted, atol=1e-6)
    assert samples_of(tmp_path, ("n", 1, 6, 6)).shape == (1, 1, 6, 6)


def test_folders_of_labels_are_mixed_and_only_so_many_are_read(tmp_path: Path) -> None:
    for label in range(4):
        (tmp_path / f"set/{label}").mkdir(parents=True)
        for i in range(10):
            Image.new("L", (6, 6), 60 * label).save(tmp_path / f"set/{label}/{i}.png")
    (tmp_path / "set/README.txt").write_text("no picture")
    (tmp_path / "set/0/._0.png").write_bytes(b"\0\5\x16\7")  # what file managers leave beside pictures
    every = samples_of(tmp_path / "set", SHAPE)
    assert len(every) == 40 and len(every[-10:, 0, 0, 0].unique()) > 2
    assert torch.equal(samples_of(tmp_path / "set", SHAPE, most=7), every[:7])
    assert not torch.equal(samples_of(tmp_path / "set", SHAPE, seed=1), every)


def test_folders_that_hold_no_samples_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no images in it"):
        read_arrays(tmp_path, network())
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    cases: list[tuple[Any, Graph, dict[str, Any], str]] = [
        (tmp_path / "a.png", network(), {}, "is one image. Give a folder"),
        (tmp_path, network(("n", 3, "h", "w")), {}, "how large images are"),
        (tmp_path, network(("n", 4, 6, 6)), {}, "how large images are"),
        (tmp_path, network(("n", 3)), {}, "one input"),
        (tmp_path, network(kind=np.int64), {}, "takes int64"),
        (tmp_path, network(inputs=2), {}, "has 2 inputs"),
        (tmp_path, network(), {"mean": (0.5,)}, "3 positive numbers"),
        (tmp_path, network(), {"std": (1.0, 0.0, 1.0)}, "3 positive numbers"),
    ]
    for data, graph, more, said in cases:
        with pytest.raises(DataError, match=f"^[^\n]*{said}[^\n]*$"):
            read_arrays(data, graph, **more)
    whole = (tmp_path / "a.png").read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"text", whole[:20] + b"\xff" * 40 + whole[60:]):
        (tmp_path / "b.png").write_bytes(broken)
        with pytest.raises(FileFormatError, match=r"b\.png: cannot be read as an image"):
            read_arrays(tmp_path, network())


def test_commands_take_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(30):
        (tmp_path / f"images/{i % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(DRAW.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(tmp_path / f"images/{i % 3}/{i}.png")
    net, out, images = tmp_path / "net.onnx", tmp_path / "out.onnx", str(tmp_path / "images")
    net.write_bytes(model().SerializeToString())
    normal = ["--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2"]
    arguments = ["quantize", str(net), "-o", str(out), "--scheme", "W8A8", "--calibration", images, "--json", *normal]
    assert _run(arguments) == 0
    assert '"samples": 27' in capsys.readouterr().out
    assert _run(["eval", str(out), "--against", str(net), "--data", images, "--json", *normal]) == 0
    assert '"samples": 30' in capsys.readouterr().out
    np.savez(tmp_path / "data.npz", inputs=np.zeros((8, 3, 6, 6), np.float32))
    shutil.rmtree(images)
    for data, said in ((tmp_path / "data.npz", "mean and std are of images"), (images, "does not exist")):
        for command in ([*arguments[:7], str(data), "--overwrite", *normal], ["eval", str(out), "--against", str(net), "--data", str(data), *normal]):  # fmt: skip
            with pytest.raises(ArrondiError, match=said):
                _run(command)
