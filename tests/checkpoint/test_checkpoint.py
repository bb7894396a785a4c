"""A checkpoint, plain or quantized: names and numbers of the original, and quantizations that lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.errors import FileFormatError
from arrondi.tensor.qtensor import QTensor


@pytest.fixture(scope="module")
def quantized(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small Llama in both layouts."""
    made = {}
    for layout, scheme in (("compressed-tensors", "W4A16"), ("arrondi", "NVFP4A16")):
        made[layout] = tmp_path_factory.mktemp("quantized") / layout
        group = 32 if scheme == "W4A16" else None
        recipe = arrondi.Recipe.simple(scheme, group_size=group)
        arrondi.quantize_model(models("llama", num_hidden_layers=1), made[layout], recipe, layout=layout)
    return made


def copied(source: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy whose quantization_config was changed."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    config = json.loads((source / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("layout", ["compressed-tensors", "arrondi"])
def test_names_and_shapes_are_those_of_the_original(
    layout: str, quantized: dict[str, Path], models: Callable[..., Path]
) -> None:
    original, packed = Checkpoint.open(models("llama", num_hidden_layers=1)), Checkpoint.open(quantized[layout])
    assert not original.quantized and packed.quantized
    assert packed.names == original.names
    for name in original.names:
        value = packed.read(name)
        assert isinstance(value, QTensor) == (name in packed.placed)
        dense = packed.dense(name)
        assert dense.shape == original.read(name).shape  # type: ignore[union-attr]
        if isinstance(value, QTensor):
            assert torch.equal(dense, value.dequantize())
        else:
            assert torch.equal(dense, original.read(name))  # type: ignore[arg-type]


def test_integers_stay_integers_when_read_as_numbers(tmp_path: Path) -> None:
    save_file({"steps": torch.tensor([1, 2]), "x": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.dense("steps").dtype == torch.int64
    assert checkpoint.dense("x").dtype == torch.float32


def set_method(value: object) -> Callable[[dict[str, Any]], object]:
    return lambda config: config.update(quant_method=value)


def group(config: dict[str, Any]) -> dict[str, Any]:
    return config["config_groups"]["group_0"]  # type: ignore[no-any-return]


LIES: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "another method": ("compressed-tensors", set_method("gptq"), "'gptq'"),
    "no method": ("compressed-tensors", lambda c: c.pop("quant_method"), "None"),
    "method no word": ("compressed-tensors", set_method(["x"]), "x"),
    "no groups": ("compressed-tensors", lambda c: c.pop("config_groups"), "config_groups"),
    "groups no object": ("compressed-tensors", lambda c: c.update(config_groups=[1]), "list"),
    "group no object": ("compressed-tensors", lambda c: c["config_groups"].update(group_0=3), "int"),
    "group for nothing here": ("compressed-tensors", lambda c: group(c).update(targets=["model.other"]), "no group for module"),
    "pattern that is none": ("compressed-tensors", lambda c: group(c).update(targets=["re:("]), "error"),
    "targets no words": ("compressed-tensors", lambda c: group(c).update(targets=[5]), ""),
    "99 bits": ("compressed-tensors", lambda c: group(c)["weights"].update(num_bits=99), "99"),
    "bits a word": ("compressed-tensors", lambda c: group(c)["weights"].update(num_bits="four"), ""),
    "5-bit float": ("compressed-tensors", lambda c: group(c)["weights"].update(num_bits=5, type="float"), "5-bit float"),
    "no strategy": ("compressed-tensors", lambda c: group(c)["weights"].pop("strategy"), "strategy"),
    "strategy unknown": ("compressed-tensors", lambda c: group(c)["weights"].update(strategy="spiral"), "spiral"),
    "groups of 0": ("compressed-tensors", lambda c: group(c)["weights"].update(group_size=0), "0"),
    "groups of a word": ("compressed-tensors", lambda c: group(c)["weights"].update(group_size="all"), ""),
    "another group size": ("compressed-tensors", lambda c: group(c)["weights"].update(group_size=16), "weight_scale"),
    "other bits": ("compressed-tensors", lambda c: group(c)["weights"].update(num_bits=8), "weight_packed"),
    "zero points that are not there": ("compressed-tensors", lambda c: group(c)["weights"].update(symmetric=False), "weight_zero_point"),
    "blocks of three": ("compressed-tensors", lambda c: group(c)["weights"].update(strategy="block", block_structure=[1, 2, 3]), ""),
    "version no number": ("compressed-tensors", lambda c: (c.update(version="?"), group(c)["weights"].update(num_bits=3)), ""),
    "a later version": ("arrondi", lambda c: c.update(version=2), "version 2"),
    "no tensors": ("arrondi", lambda c: c.pop("tensors"), "tensors"),
    "tensors a list": ("arrondi", lambda c: c.update(tensors=["a"]), "list"),
    "scheme unknown": ("arrondi", lambda c: c["tensors"]["model.layers.0.mlp.up_proj.weight"].update(scheme="W5Z"), "W5Z"),
    "scheme no word": ("arrondi", lambda c: c["tensors"]["model.layers.0.mlp.up_proj.weight"].update(scheme=4), ""),
    "shape empty": ("arrondi", lambda c: c["tensors"]["model.layers.0.mlp.up_proj.weight"].update(shape=[]), ""),
    "shape negative": ("arrondi", lambda c: c["tensors"]["model.layers.0.mlp.up_proj.weight"].update(shape=[-96, 64]), "up_proj"),
    "shape huge": ("arrondi", lambda c: c["tensors"]["model.layers.0.mlp.up_proj.weight"].update(shape=[10**12, 64]), "up_proj"),
    "a tensor that is not there": ("arrondi", lambda c: c["tensors"].update(ghost={"shape": [4, 4], "scheme": "w=int4/channel"}), "ghost.codes"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_a_config_that_does_not_describe_the_files_is_refused(
    case: str, quantized: dict[str, Path], tmp_path: Path
) -> None:
    layout, change, named = LIES[case]
    folder = copied(quantized[layout], tmp_path / "lie", change)
    with pytest.raises(FileFormatError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert str(folder) in message and named in message and "\n" not in message, message


def test_a_config_that_is_no_object_is_refused(quantized: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(quantized["arrondi"], tmp_path / "lie", lambda c: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": "gptq"}))
    with pytest.raises(FileFormatError, match="Known: arrondi, compressed-tensors"):
        Checkpoint.open(folder)


def without(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {n: t for n, t in tensors.items() if not n.endswith(name)}


def changed(
    name: str, to: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {n: to(t) if n.endswith(name) else t for n, t in tensors.items()}


FILES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "no codes": (without("up_proj.weight_packed"), "up_proj.weight_packed"),
    "scale too long": (changed("up_proj.weight_scale", lambda t: torch.cat([t, t])), "up_proj.weight_scale"),
    "scale of integers": (changed("up_proj.weight_scale", lambda t: t.view(torch.int32)), "up_proj.weight_scale"),
    "shape of three": (changed("up_proj.weight_shape", lambda t: torch.tensor([2, 48, 64])), ""),
    "shape negative": (changed("up_proj.weight_shape", lambda t: -t), "up_proj"),
    "shape too wide": (changed("up_proj.weight_shape", lambda t: t * 10**9), "up_proj"),
}


@pytest.mark.parametrize("case", FILES)
def test_packed_tensors_that_do_not_fit_together_are_refused(
    case: str, quantized: dict[str, Path], tmp_path: Path
) -> None:
    change, named = FILES[case]
    folder = copied(quantized["compressed-tensors"], tmp_path / "lie", lambda c: None)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t.contiguous() for n, t in change(tensors).items()}, folder / "model.safetensors")
    with pytest.raises(FileFormatError) as caught:
        Checkpoint.open(folder)
    assert str(folder) in str(caught.value) and named in str(caught.value)


def test_the_copy_that_the_lies_are_made_from_is_read(quantized: dict[str, Path], tmp_path: Path) -> None:
    for layout, source in quantized.items():
        assert Checkpoint.open(copied(source, tmp_path / layout, lambda c: None)).placed
