"""Bad input: one clear sentence on stderr, status 2, no traceback, nothing overwritten or lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Cli, refused

Models = Callable[..., Path]


@pytest.fixture
def copy(models: Models, tmp_path: Path) -> Path:
    """A model of its own, to be spoilt."""
    return Path(shutil.copytree(models("llama", num_hidden_layers=1), tmp_path / "model"))


def test_a_missing_text(cli: Cli, copy: Path, tmp_path: Path) -> None:
    arguments = ("quantize", copy, "-o", tmp_path / "x", "--group-size", 32, "--method", "gptq")
    refused(cli(*arguments, "--calibration", tmp_path / "gone.txt"), "gone.txt", "no such file")
    refused(cli(*arguments), "gptq", "--calibration")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81" * 100)
    refused(cli(*arguments, "--calibration", tmp_path / "binary"), "binary", "UTF-8")
    assert not (tmp_path / "x").exists()


def test_a_lying_header(cli: Cli, copy: Path, tmp_path: Path) -> None:
    weights = copy / "model.safetensors"
    raw = weights.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    name = next(n for n in header if n.endswith("q_proj.weight"))
    header[name]["shape"] = [64, 32]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    weights.write_bytes(raw[:8] + text[:length] + raw[8 + length :])
    refused(cli("quantize", copy, "-o", tmp_path / "x", "--group-size", 32), "q_proj.weight")


def test_weights_of_another_config(cli: Cli, copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    refused(cli("quantize", copy, "-o", tmp_path / "x", "--group-size", 32), "mlp", "config.json")


def test_unknown_names_get_a_suggestion(cli: Cli, copy: Path, tmp_path: Path) -> None:
    start = ("quantize", copy, "-o", tmp_path / "x")
    refused(cli(*start, "--method", "gptqq"), "gptqq", "'gptq'")
    refused(cli(*start, "--scheme", "W4A61"), "W4A61", "W4A16")
    refused(cli(*start, "--scheme", "W17Z"), "W17Z", "W4A16")
    refused(cli(*start, "--scheme", "w=itn4/g32"), "itn4", "int4")
    refused(cli(*start, "--option", "dampening=1", "--method", "gptq"), "dampening", "damping")
    refused(cli(*start, "--to", "compressed_tensors"), "compressed-tensors")
    refused(cli(*start, "--group-size", 32, "--ignore", "lm_haed"), "lm_haed", "lm_head")
    refused(cli(*start, "--group-size", 32, "--targets", r"re:model\.layer\.0"), "matches nothing")
    assert not (tmp_path / "x").exists()
    refused(cli("run", copy, "The", "--activations", "itn8/g32"), "itn8", "int8")
    refused(cli("run", copy, "The", "--activations", "int8/g32"), "it is not quantized")


def test_a_group_size_that_does_not_divide(cli: Cli, copy: Path, tmp_path: Path) -> None:
    result = cli("quantize", copy, "-o", tmp_path / "x", "--group-size", 48, "--json")
    notes = [n for n in result.document["notes"] if "g48 does not divide 64 inputs" in n]
    assert result.code == 0 and notes and ".weight" in notes[0], (
        "layer by layer the nearest groups, and the layers are named"
    )


def test_a_calibration_text_shorter_than_one_sample(cli: Cli, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("two words")
    arguments = ("quantize", copy, "-o", tmp_path / "x", "--group-size", 32, "--calibration", tmp_path / "short.txt")
    refused(cli(*arguments, "--method", "gptq"), "short.txt", "tokens")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "infinity"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_that_are_not_finite(bad: float, method: str, cli: Cli, copy: Path, text: Path, tmp_path: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.self_attn.k_proj.weight"][3, 5] = bad
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    more = ("--calibration", text, "--samples", 2, "--seq-len", 32, "--no-eval") if method == "gptq" else ()
    result = cli("quantize", copy, "-o", tmp_path / "x", "--group-size", 32, "--method", method, *more)
    refused(result, "k_proj", "NaN or infinity")
    assert not (tmp_path / "x" / "config.json").exists()


def test_an_output_directory_that_holds_something_else(cli: Cli, copy: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for arguments in (
        ("quantize", copy, "-o", mine, "--group-size", 32),
        ("quantize", copy, "-o", mine, "--group-size", 32, "--overwrite"),
    ):
        refused(cli(*arguments), "mine", "thesis.txt")
    assert cli("quantize", copy, "-o", tmp_path / "q", "--group-size", 32).code == 0
    refused(cli("dequantize", tmp_path / "q", "-o", mine), "mine")
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_a_model_with_no_linear_layer(cli: Cli, copy: Path, tmp_path: Path) -> None:
    refused(cli("quantize", copy, "-o", tmp_path / "x", "--group-size", 32, "--ignore", "Linear"), "--ignore")


def test_what_is_already_quantized_or_is_not(cli: Cli, copy: Path, tmp_path: Path) -> None:
    assert cli("quantize", copy, "-o", tmp_path / "q", "--group-size", 32).code == 0
    refused(cli("quantize", tmp_path / "q", "-o", tmp_path / "x"), "already quantized", "arrondi dequantize")
    refused(cli("dequantize", copy, "-o", tmp_path / "x"), "not quantized")


def test_a_limit_without_a_measurement(cli: Cli, copy: Path, tmp_path: Path) -> None:
    refused(cli("quantize", copy, "-o", tmp_path / "x", "--group-size", 32, "--max-kl", 0.1), "--max-kl", "--eval-text")


def test_a_model_without_tokenizer(cli: Cli, copy: Path, text: Path, tmp_path: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    refused(cli("quantize", copy, "-o", tmp_path / "x", "--group-size", 32, "--calibration", text), "tokenizer")


def test_a_model_compared_with_a_stranger(cli: Cli, copy: Path, models: Models, text: Path) -> None:
    refused(cli("eval", copy, "--against", models("gpt2"), "--text", text), "its own original")


def test_an_encoder_does_not_generate(cli: Cli, models: Models) -> None:
    refused(cli("run", models("bert"), "hello"), "does not generate")


def test_shard_sizes_that_are_none(cli: Cli, copy: Path, tmp_path: Path) -> None:
    for size in ("banana", "0GB", "-5MB"):
        refused(cli("quantize", copy, "-o", tmp_path / "x", "--group-size", 32, "--shard-size", size), "500MB")


def test_torch_is_left_as_it_was(cli: Cli, copy: Path, tmp_path: Path) -> None:
    state, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    cli("quantize", copy, "-o", tmp_path / "q", "--group-size", 32)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype
