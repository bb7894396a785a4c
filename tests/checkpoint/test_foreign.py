"""Files and directories of other tools are named as what they are, with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from arrondi.checkpoint import Checkpoint
from arrondi.errors import FileFormatError


def refusal(path: Path) -> str:
    with pytest.raises(FileFormatError) as caught:
        Checkpoint.open(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and message.endswith(".")
    return message


@pytest.mark.parametrize(("name", "word"), [("model.gguf", "GGUF"), ("model.safetensors", "directory"), ("model.onnx", "ONNX"), ("model.bin", "pickled")])  # fmt: skip
def test_single_files(name: str, word: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert word in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("files", "word"),
    [
        (["model-Q4_K_M.gguf"], "GGUF"),
        (["adapter_config.json", "adapter_model.safetensors"], "PEFT adapter"),
        (["model_index.json"], "diffusers"),
        (["config.json", "pytorch_model.bin"], "pickled"),
        (["config.json", "tf_model.h5"], "TensorFlow"),
        (["config.json", "model.onnx"], "ONNX"),
        (["saved_model.pb"], "TensorFlow"),
        (["config.json"], "no *.safetensors"),
        (["model.safetensors"], "Copy the model's config.json"),
        (
            ["modules.json", "0_Transformer/config.json", "0_Transformer/model.safetensors"],
            "0_Transformer/. Give that folder",
        ),
        (["README.md"], "no config.json and no safetensors files"),
        ([], "an empty directory"),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, list) else "",
)
def test_directories(files: list[str], word: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert word in refusal(tmp_path)


def test_links_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert f"a link to {tmp_path / 'nowhere'}" in refusal(tmp_path / "gone")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "blobs")
    assert "model.safetensors is a link" in refusal(tmp_path / "model")


@pytest.mark.parametrize(("name", "word"), [("", "name is empty"), ("https://huggingface.co/org/model", "an address")])
def test_words_that_are_no_path(name: str, word: str) -> None:
    with pytest.raises(FileFormatError, match=word):
        Checkpoint.open(name)


def test_a_pointer_of_git_lfs_is_no_weight_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in refusal(tmp_path)


def model(folder: Path, quantization: Any, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "llama"} | ({} if quantization is None else {"quantization_config": quantization})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("quantization", "word"),
    [
        ({"quant_method": "quanto"}, "Quanto"), ({"quant_method": "unheard"}, "unheard"),
        ({"quant_method": "quark"}, "Quark"), ({"zzz": 4}, "without quant_method"),
        ([4], "not an object"),
    ],
)  # fmt: skip
def test_quantizations_of_other_tools(quantization: Any, word: str, tmp_path: Path) -> None:
    folder = model(tmp_path, quantization, {"a.weight": torch.zeros(2, 2)})
    with pytest.raises(FileFormatError) as caught:
        Checkpoint.open(folder)
    assert word in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_mlx_says_it_under_a_key_of_its_own(key: str, tmp_path: Path) -> None:
    parts = {
        "a.weight": torch.zeros(2, 8, dtype=torch.uint32),
        "a.scales": torch.ones(2, 1),
        "a.biases": torch.ones(2, 1),
    }
    folder = model(tmp_path, None, parts)
    (folder / "config.json").write_text(f'{{"model_type": "llama", "{key}": {{"group_size": 64, "bits": 4}}}}')
    assert list(Checkpoint.open(folder).placed) == ["a.weight"]


@pytest.mark.parametrize(
    "tensors",
    [
        {"a.qweight": torch.zeros(2, 2, dtype=torch.int32)},
        {"a.weight": torch.zeros(2, 2, dtype=torch.uint8), "a.weight.absmax": torch.zeros(2)},
        {"a.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)},
        {"a.weight_packed": torch.zeros(2, 2, dtype=torch.int32), "a.weight_scale": torch.zeros(2, 1)},
        {"a.weight.codes": torch.zeros(2, 2, dtype=torch.uint8)},
    ],
)
def test_quantized_tensors_that_no_config_explains(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    message = refusal(model(tmp_path, None, tensors))
    assert next(n for n in tensors if n in message)


def test_a_plain_model_with_odd_names_is_read(tmp_path: Path) -> None:
    plain = {"ssm.weight": torch.zeros(2, 2), "ssm.scale": torch.zeros(2), "hash": torch.zeros(3, dtype=torch.int32)}
    assert not Checkpoint.open(model(tmp_path, None, plain)).quantized
