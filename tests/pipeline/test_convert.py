"""From one layout into another and back: the same values, said truly, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import arrondi
from arrondi.checkpoint import LAYOUTS, Checkpoint, LayerValues, Placed
from arrondi.checkpoint.containers.gguf.header import read_header
from arrondi.errors import ArrondiError, OutputError, SchemeError
from arrondi.formats import parse_scheme
from arrondi.pipeline.convert import convert_model
from arrondi.pipeline.convert_choice import Choice, chosen, converted
from arrondi.pipeline.diff import diff_models
from arrondi.tensor.nearest import quantize_tensor
from arrondi.tensor.qtensor import QTensor

DOUBLE = "w=nf4/g32/s:(dynamic8/flat256/offset/o:(binary/tensor))"
"""Blocks of 256 scales, of which some matrices of the model have three a row."""
CASES = [
    ("w=int4/g32", ("gptq", "awq", "gguf", "compressed-tensors")),
    ("w=int4/g32/asym", ("gptq", "mlx", "hqq", "torchao", "compressed-tensors", "arrondi")),
    ("w=int8/g32", ("gptq", "gguf", "arrondi")),
    ("w=nf4/g64", ("bitsandbytes", "arrondi")),
    (DOUBLE, ("bitsandbytes", "arrondi", "bitsandbytes")),
]


@pytest.fixture(scope="module")
def packed(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(scheme: str) -> Path:
        if scheme not in made:
            made[scheme] = tmp_path_factory.mktemp("packed") / "model"
            arrondi.quantize(models("llama", torch.float16), scheme, out=made[scheme], to="arrondi")
        return made[scheme]

    return get


@pytest.mark.parametrize(("scheme", "targets"), CASES, ids=[c[0] for c in CASES])
def test_there_and_back(scheme: str, targets: tuple[str, ...], packed: Callable[[str], Path], tmp_path: Path) -> None:
    start = last = packed(scheme)
    for target in (*targets, "arrondi"):
        path = tmp_path / (target if target != "gguf" else "m.gguf")
        path = path.with_name(f"{path.name}-{len(list(tmp_path.iterdir()))}") if target != "gguf" else path
        result = convert_model(last, path, target, exact_only=True)
        assert result["exact"] and not result["rescaled"] and not result["requantized"]
        last = path
    one, two = Checkpoint.open(start), Checkpoint.open(last)
    assert one.names == two.names
    for name in one.names:
        a, b = one.read(name), two.read(name)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a.float(), b.float() if isinstance(b, torch.Tensor) else b.dequantize())
        else:
            assert torch.equal(a.dequantize(), b.dequantize()), name
            assert torch.equal(a.codes, b.codes), name


@pytest.mark.parametrize(
    ("layout", "scheme", "via"),
    [("hqq", "w=uint4/g32/asym", "mlx"), ("compressed-tensors", "w=int4/g32/asym/bfloat16", "mlx"), ("torchao", "w=int4/g32/float16", "hqq")],
)  # fmt: skip
def test_what_a_layout_widens_comes_back_as_it_was(
    layout: str, scheme: str, via: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """Zero points become float32 offsets where there are none; back in the first, every byte is the old one."""
    arrondi.quantize(models("llama"), scheme, out=tmp_path / "a", to=layout)
    convert_model(tmp_path / "a", tmp_path / "b", via, exact_only=True)
    convert_model(tmp_path / "b", tmp_path / "c", layout, exact_only=True)
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in "ac")
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.dtype == two[name].dtype and torch.equal(
            *(t.reshape(-1).view(torch.uint8) for t in (value, two[name]))
        ), name


def test_blocks_larger_than_a_matrix_become_rows_and_blocks_again() -> None:
    """compressed-tensors has no smaller last block, fp8 no scales of rows."""
    scheme = parse_scheme("FP8_BLOCK")
    placed = Placed("a.weight", (64, 256), scheme)
    values = LayerValues(
        quantize_tensor(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), scheme.weights)
    )
    rows = chosen(values, placed, LAYOUTS["compressed-tensors"])
    assert isinstance(rows, Choice) and rows.verdict == "exact" and rows.scheme != scheme
    held = LayerValues(converted(values.weight, rows))
    assert chosen(held, replace(placed, scheme=rows.scheme), LAYOUTS["fp8"]) == Choice(scheme, "exact")


def test_a_refusal_says_what_the_target_lacks_and_what_helps(packed: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match=r"fp8 stores fp8_e4m3 under float32 scales, not int4/g32"):
        convert_model(packed("w=int4/g32"), tmp_path / "no", "fp8")
    with pytest.raises(
        SchemeError,
        match=r"moves values by at most .*: leave --exact-only out, or quantize with --scheme w=uint4/g32/offset",
    ):
        convert_model(packed("w=int4/g32/asym"), tmp_path / "no.gguf", "gguf", exact_only=True)


def test_what_changed_is_said(packed: Callable[[str], Path], tmp_path: Path) -> None:
    """Offsets in float16 are other numbers than zero points: said, with the largest difference that there is."""
    result = convert_model(packed("w=int4/g32/asym"), tmp_path / "m.gguf", "gguf")
    assert result["rescaled"] and not result["requantized"]
    one, two = Checkpoint.open(packed("w=int4/g32/asym")), Checkpoint.open(tmp_path / "m.gguf")
    for row in result["tensors"]:
        if row["verdict"] == "rescaled":
            found = (one.dense(row["name"]) - two.dense(row["name"])).abs().max()
            assert float(found) == row["max_error"] > 0


def test_rounded_anew_with_what_it_cost(packed: Callable[[str], Path], tmp_path: Path) -> None:
    result = convert_model(packed("w=nf4/g64"), tmp_path / "gptq", "gptq", scheme="w=int8/g32")
    one, two = Checkpoint.open(packed("w=nf4/g64")), Checkpoint.open(tmp_path / "gptq")
    rows = [row for row in result["tensors"] if row["verdict"] == "requantized"]
    assert rows and all(row["sqnr_db"] > 35 for row in rows)
    for row in rows:
        old, new = one.dense(row["name"]).double(), two.dense(row["name"]).double()
        assert row["sqnr_db"] == pytest.approx(
            float(10 * torch.log10(old.square().sum() / (old - new).square().sum())), abs=0.01
        )


def test_exact_only_refuses_before_anything_is_written(packed: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match=r"cannot hold every value as it is: .*requantized.*Leave --exact-only out"):
        convert_model(packed("w=nf4/g64"), tmp_path / "x", "gptq", exact_only=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["gguf", "gptq"])
def test_what_is_there_stays(to: str, packed: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / ("there.gguf" if to == "gguf" else "there")
    if to == "gguf":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    with pytest.raises(OutputError):
        convert_model(packed("w=int4/g32"), out, to)
    assert (out if to == "gguf" else out / "mine").read_text() == "mine"


def test_a_word_that_is_no_layout(packed: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ArrondiError, match=r"Unknown layout 'gguff'.*gguf"):
        convert_model(packed("w=int4/g32"), tmp_path / "x", "gguff")


def test_types_of_a_file(packed: Callable[[str], Path], tmp_path: Path) -> None:
    convert_model(packed("w=int4/g32"), tmp_path / "m.gguf", "gguf")
    header = read_header(tmp_path / "m.gguf")
    kinds = {
        name.split(".")[2] if name.startswith("blk") else name: stored.type for name, stored in header.tensors.items()
    }
    assert (
        kinds["attn_q"] == kinds["ffn_down"] == "Q4_0"
        and kinds["attn_norm"] == "F32"
        and kinds["token_embd.weight"] == "F16"
    )
    assert header.value("general.file_type") == 2


def test_what_differs_between_two_layouts(
    packed: Callable[[str], Path], models: Callable[..., Path], tmp_path: Path
) -> None:
    convert_model(packed("w=int4/g32"), tmp_path / "awq", "awq")
    same = diff_models(packed("w=int4/g32"), tmp_path / "awq")
    assert not same["different"] and same["same_codes"]
    assert same["same_values"] + same["same_codes"] == len(same["tensors"])
    lost = diff_models(models("llama", torch.float16), packed("w=int4/g32"))
    one, two = Checkpoint.open(models("llama", torch.float16)), Checkpoint.open(packed("w=int4/g32"))
    rows = [row for row in lost["tensors"] if row["verdict"] == "different"]
    assert len(rows) == 21 and lost["same_codes"] == len(lost["tensors"]) - 21
    for row in rows:
        a, b = (c.dense(row["name"]).double() for c in (one, two))
        assert row["max_error"] == float((a - b).abs().max())
        assert row["sqnr_db"] == pytest.approx(
            float(10 * torch.log10(a.square().sum() / (a - b).square().sum())), abs=0.006
        )
    other = diff_models(models("llama", torch.float16), models("gpt2"))
    assert other["only_in_the_first"] and other["only_in_the_second"] and not other["different"]


def test_scattered_groups_go_along_or_are_refused(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    settings = {"method": "gptq", "calibration": text, "samples": 4, "seq_len": 32, "options": {"order": "dynamic"}}
    arrondi.quantize(models("llama", torch.float16), "w=int4/g32", out=tmp_path / "ours", to="arrondi", **settings)
    result = convert_model(tmp_path / "ours", tmp_path / "gptq", "gptq", exact_only=True)
    assert result["exact"]
    one, two = (Checkpoint.open(tmp_path / name) for name in ("ours", "gptq"))
    scattered = [name for name in one.placed if one.placed[name].indexed]
    assert scattered and all(
        two.placed[name].indexed and torch.equal(one.dense(name), two.dense(name)) for name in scattered
    )
    with pytest.raises(SchemeError, match="requantized"):
        convert_model(tmp_path / "ours", tmp_path / "m.gguf", "gguf", exact_only=True)


def test_scales_that_the_files_of_a_target_round_are_not_called_exact(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    """bitsandbytes stores 127 times the scale of int8, which has not always a float32 that gives the scale back."""
    arrondi.quantize(models("llama"), "w=int8/channel,a=int8/token", out=tmp_path / "ours", to="arrondi")
    result = convert_model(tmp_path / "ours", tmp_path / "bnb", "bitsandbytes")
    one, two = (Checkpoint.open(tmp_path / name) for name in ("ours", "bnb"))
    for row in result["tensors"]:
        if row["verdict"] != "copied":
            same = torch.equal(one.dense(row["name"]), two.dense(row["name"]))
            assert (row["verdict"] == "exact") is same, row["name"]


def test_a_layer_that_no_scheme_of_the_target_holds_is_refused_by_its_own_scheme() -> None:
    scheme = parse_scheme("TCQ2S")
    codes = torch.zeros(128, 128, dtype=torch.uint8)
    values = LayerValues(QTensor(codes, torch.ones(128, 1), None, None, scheme.weights))
    found = chosen(values, Placed("a.weight", (128, 128), scheme), LAYOUTS["exl3"])
    assert str(found).startswith(f"exl3 has no format for w={scheme.weights.format}")
