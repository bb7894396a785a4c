"""Every command at every wrong door: a path that is no model, or an output that would spoil one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import Cli, refused

Models = Callable[..., Path]


def nothing(folder: Path) -> Path:
    return folder / "nowhere"


def a_file(folder: Path) -> Path:
    (folder / "note.txt").write_text("hello")
    return folder / "note.txt"


def a_gguf_file(folder: Path) -> Path:
    (folder / "model.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(64))
    return folder / "model.gguf"


def an_empty_directory(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def a_directory_without_weights(folder: Path) -> Path:
    (folder / "bare").mkdir()
    (folder / "bare" / "config.json").write_text('{"model_type": "llama"}')
    return folder / "bare"


DOORS = [nothing, a_file, a_gguf_file, an_empty_directory, a_directory_without_weights]

COMMANDS: dict[str, Callable[[Path, Path, Path, Path], tuple[object, ...]]] = {
    "plan": lambda bad, good, text, out: (bad,),
    "quantize": lambda bad, good, text, out: (bad, "-o", out),
    "quantize --dry-run": lambda bad, good, text, out: (bad, "-o", out, "--dry-run"),
    "quantize gptq": lambda bad, good, text, out: (bad, "-o", out, "--method", "gptq", "--calibration", text),
    "eval": lambda bad, good, text, out: (bad, "--against", good, "--text", text),
    "eval --against": lambda bad, good, text, out: (good, "--against", bad, "--text", text),
    "inspect": lambda bad, good, text, out: (bad,),
    "inspect --folds": lambda bad, good, text, out: (bad, "--folds"),
    "dequantize": lambda bad, good, text, out: (bad, "-o", out),
    "run": lambda bad, good, text, out: (bad, "Once"),
    "verify": lambda bad, good, text, out: (bad,),
}
"""What is run → its arguments from a bad model, a good one, a text and an output."""


@pytest.mark.parametrize("door", DOORS, ids=lambda d: d.__name__)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_door_is_one_sentence(
    command: str, door: Callable[[Path], Path], cli: Cli, models: Models, text: Path, tmp_path: Path
) -> None:
    bad, out = door(tmp_path), tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    arguments = COMMANDS[command](bad, models("llama", num_hidden_layers=1), text, out)
    refused(cli(command.split()[0], *arguments), bad.name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("where", ["", "sub", "sub/deeper", "../model/sub"])
@pytest.mark.parametrize("command", ["quantize", "dequantize"])
def test_an_output_in_the_model_is_refused(command: str, where: str, cli: Cli, models: Models, tmp_path: Path) -> None:
    model = Path(shutil.copytree(models("llama", num_hidden_layers=1), tmp_path / "model"))
    if command == "dequantize":
        assert cli("quantize", model, "-o", tmp_path / "q", "--group-size", 32).code == 0
        model = Path(shutil.move(tmp_path / "q", tmp_path / "quantized"))
        where = where.replace("../model", "../quantized")
    before = {p: p.read_bytes() for p in model.rglob("*") if p.is_file()}
    more = ("--group-size", 32) if command == "quantize" else ()
    refused(cli(command, model, "-o", model / where, *more), str(model))
    assert {p: p.read_bytes() for p in model.rglob("*") if p.is_file()} == before
    assert not [p for p in model.rglob("*") if p.is_dir()]


def test_a_config_that_is_no_json(cli: Cli, tmp_path: Path) -> None:
    bad = an_empty_directory(tmp_path)
    (bad / "config.json").write_text("{not json")
    refused(cli("inspect", bad), "config.json", "JSON")
    (bad / "config.json").write_text('{"model_type": "llama"}')
    (bad / "pytorch_model.bin").write_bytes(b"pickle")
    refused(cli("inspect", bad), "pytorch_model.bin", "save_pretrained")


@pytest.mark.parametrize("command", COMMANDS)
def test_pickled_weights_are_opened_by_every_command_if_the_user_says_so(
    command: str, cli: Cli, models: Models, text: Path, tmp_path: Path
) -> None:
    good = models("llama", num_hidden_layers=1)
    if command in ("dequantize", "verify"):  # of what is quantized
        assert cli("quantize", good, "-o", tmp_path / "q", "--group-size", 32).code == 0
        good = tmp_path / "q"
    bad = Path(shutil.copytree(good, tmp_path / "pickled"))
    torch.save(load_file(bad / "model.safetensors"), bad / "pytorch_model.bin")
    (bad / "model.safetensors").unlink()
    arguments = [*COMMANDS[command](bad, good, text, tmp_path / "out")]
    arguments += ["--group-size", 32] if command.startswith(("plan", "quantize")) else []
    refused(cli(command.split()[0], *arguments), "pytorch_model.bin", "--allow-torch-load")
    done = cli(command.split()[0], *arguments, "--allow-torch-load")
    assert done.code == 0 or (command == "verify" and "not installed" in done.err), done.err


@pytest.mark.parametrize("command", ["plan", "quantize", "run", "inspect"])
def test_a_truncated_file(command: str, cli: Cli, models: Models, text: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(models("llama", num_hidden_layers=1), tmp_path / "model"))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    refused(cli(command, *COMMANDS[command](model, model, text, tmp_path / "x")), "model.safetensors", "truncated")
    assert not (tmp_path / "x").exists()


def test_an_architecture_that_nobody_knows(cli: Cli, models: Models, tmp_path: Path) -> None:
    model = Path(shutil.copytree(models("llama", num_hidden_layers=1), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    for command in ("plan", "quantize", "run"):
        refused(cli(command, *COMMANDS[command](model, model, model, tmp_path / "x")), "lama")
