"""config.json and generation_config.json: what cannot be is refused, and infinities are read as transformers reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from arrondi.checkpoint import Checkpoint, ModelDir
from arrondi.checkpoint.containers.config import check_config, decode_floats
from arrondi.errors import FileFormatError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", {"a": 1}), ("architectures", 5), ("architectures", ["LlamaForCausalLM", 3]), ("architectures", "LlamaForCausalLM"),
        ("model_type", 7), ("num_hidden_layers", 2**62), ("num_hidden_layers", -1), ("num_hidden_layers", 2.5), ("num_hidden_layers", 10**7),
        ("n_layer", 10**9), ("hidden_size", -64), ("vocab_size", 2**60), ("text_config", {"num_hidden_layers": 2**62}), ("head_dim", 1e300),
    ],
)  # fmt: skip
def test_facts_that_cannot_be_are_refused_in_one_sentence(key: str, value: Any, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", key: value}))
    with pytest.raises(FileFormatError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert str(folder / "config.json") in message and "\n" not in message and len(message) < 400
    assert next(iter(value)) if isinstance(value, dict) and key == "text_config" else key in message


def test_the_configs_of_transformers_are_not_refused() -> None:
    """The defaults of every eighth model that transformers knows."""
    checked = 0
    for kind in list(transformers.CONFIG_MAPPING)[::8]:
        cls = transformers.CONFIG_MAPPING[kind]
        try:
            config = json.loads(cls().to_json_string(use_diff=False))
        except Exception:  # a config that has no defaults
            continue
        check_config(config, Path(kind))
        checked += 1
    assert checked > 30


@pytest.mark.parametrize(
    "text", ["null", "[]", "{", "3", '{"a": 1, "a": 2}', "[" * 10_000, "1" * 6_000, '"\\ud800', b"\xff\xfe"]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_is_no_object_is_refused(name: str, text: str | bytes, folder: Path) -> None:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FileFormatError, match=name) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_special_floats_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    config = transformers.Mamba2Config(vocab_size=32, hidden_size=64, state_size=16, num_heads=8, head_dim=16, n_groups=1, num_hidden_layers=1)  # fmt: skip
    assert math.isinf(config.time_step_limit[1])
    transformers.Mamba2ForCausalLM(config).save_pretrained(tmp_path)
    model = ModelDir.open(tmp_path)
    assert "__float__" in json.dumps(model.config["time_step_limit"]), "transformers no longer writes it so"
    assert model.model_config["time_step_limit"] == list(config.time_step_limit)
    assert model.config == json.loads((tmp_path / "config.json").read_text()), "and it is written back as it was"


@pytest.mark.parametrize(
    "value", [{"__float__": "NaN"}, {"__float__": "-Infinity"}, {"__float__": "one"}, {"__float__": 1}, {"__float__": "NaN", "b": 1}, [[{"__float__": "Infinity"}]], {}]
)  # fmt: skip
def test_decoding_is_that_of_transformers(value: Any) -> None:
    wanted: Callable[[Any], Any] = transformers.PreTrainedConfig._decode_special_floats
    assert repr(decode_floats({"a": value})) == repr(wanted({"a": value}))
