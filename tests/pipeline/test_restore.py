"""Back to ordinary weights, and looking into a checkpoint without reading them."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import arrondi
from arrondi.checkpoint import WORK, Checkpoint, ShardWriter
from arrondi.errors import OutputError, SchemeError
from arrondi.pipeline import dequantize_model, inspect_model, quantize_model, restore
from arrondi.tensor.qtensor import QTensor
from tests.pipeline.killer import digest
from tests.pipeline.stopping import DAMAGES, stopped_after

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module")
def packed(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized Llama of bfloat16, with zero points."""
    out = tmp_path_factory.mktemp("packed") / "out"
    source = models("llama", torch.bfloat16, num_hidden_layers=2)
    quantize_model(source, out, arrondi.Recipe.simple("W4A16_ASYM", group_size=32))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_those_of_dequantize_bit_for_bit(dtype: str, packed: Path, tmp_path: Path) -> None:
    result = dequantize_model(packed, tmp_path / "plain", dtype)
    checkpoint, found = Checkpoint.open(packed), load_file(tmp_path / "plain" / "model.safetensors")
    assert found.keys() == checkpoint.names.keys()
    for name, tensor in found.items():
        value = checkpoint.read(name)
        expected = value.dequantize(DTYPES[dtype]) if isinstance(value, QTensor) else value.to(DTYPES[dtype])
        assert tensor.dtype == DTYPES[dtype]
        assert torch.equal(tensor, expected), name
    assert result == {"restored": 14, "copied": 7, "bytes": sum(t.nbytes for t in found.values()), "dtype": dtype}
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == dtype
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert model.dtype == DTYPES[dtype]
    assert (tmp_path / "plain" / "tokenizer.json").exists()


def test_shards_and_progress(packed: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    dequantize_model(
        packed, tmp_path / "plain", shard_bytes=200_000, progress=lambda done, total, what: calls.append((done, total))
    )
    assert calls == [(i, 21) for i in range(21)]
    assert len(list(tmp_path.glob("plain/model-*-of-*.safetensors"))) > 2
    whole = tmp_path / "whole"
    dequantize_model(packed, whole)
    one, two = Checkpoint.open(tmp_path / "plain"), Checkpoint.open(whole)
    assert all(torch.equal(one.dense(n), two.dense(n)) for n in two.names)


def test_integers_are_not_turned_into_floats(packed: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((packed / "config.json").read_bytes())
    tensors = load_file(packed / "model.safetensors") | {"steps": torch.tensor([7]), "mask": torch.tensor([True])}
    save_file(tensors, source / "model.safetensors")
    dequantize_model(source, tmp_path / "plain", "float32")
    found = load_file(tmp_path / "plain" / "model.safetensors")
    assert found["steps"].dtype == torch.int64 and found["mask"].dtype == torch.bool


def test_what_cannot_be_restored_is_refused(packed: Path, models: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="is not quantized"):
        dequantize_model(models("llama"), tmp_path / "plain")
    with pytest.raises(SchemeError, match="Cannot write 'int8'"):
        dequantize_model(packed, tmp_path / "plain", "int8")
    assert not (tmp_path / "plain").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"already holds thesis\.txt and maybe more\. Nothing was touched"):
        dequantize_model(packed, tmp_path / "mine")
    with pytest.raises(OutputError, match="same directory"):
        dequantize_model(packed, packed)
    with pytest.raises(OutputError, match="inside the model"):
        dequantize_model(packed, packed / "plain")
    with pytest.raises(OutputError, match=r"a file\. Give a directory"):
        dequantize_model(packed, tmp_path / "mine" / "thesis.txt")


# ── a restoration that was killed ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups of tensors, as a large model has them."""
    monkeypatch.setattr(restore, "_GROUP_BYTES", 50_000)


@pytest.mark.parametrize("damage", [None, "deleted", "one bit"])
@pytest.mark.parametrize("step", ["tensors 0", "tensors 2"])
def test_a_restoration_that_was_stopped_goes_on_and_ends_with_the_same_bytes(
    step: str, damage: str | None, small_steps: None, packed: Path, tmp_path: Path
) -> None:
    with stopped_after(step):
        dequantize_model(packed, tmp_path / "plain")
    assert {p.name for p in (tmp_path / "plain").iterdir()} == {WORK}, "nothing has its final name"
    if damage:
        DAMAGES[damage](tmp_path / "plain" / WORK / "model.safetensors.partial")
    done: list[int] = []
    dequantize_model(packed, tmp_path / "plain", progress=lambda i, total, what: done.append(i))
    dequantize_model(packed, tmp_path / "whole")
    assert digest(tmp_path / "plain") == digest(tmp_path / "whole")
    assert (done[0] == 0) == (damage == "deleted"), "what is whole is not done again"


def test_other_types_and_two_at_once_do_not_mix(small_steps: None, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    with stopped_after("tensors 1"):
        dequantize_model(packed, out, "float32")
    with (out / WORK / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another run is writing here"):
            dequantize_model(packed, out, "float32")
    dequantize_model(packed, out, "float16")
    dequantize_model(packed, tmp_path / "whole", "float16")
    assert digest(out) == digest(tmp_path / "whole")


def test_a_finished_restoration_is_left_alone_unless_it_is_damaged_or_another(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "plain"
    first = dequantize_model(packed, out)
    whole = digest(out)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "put", None)
        assert dequantize_model(packed, out) == first
    with pytest.raises(OutputError, match=r"finished model of another run.*--overwrite"):
        dequantize_model(packed, out, "float32")
    DAMAGES["cut"](out / "model.safetensors")
    with pytest.raises(OutputError, match=r"model\.safetensors: has .* bytes, .* were written"):
        dequantize_model(packed, out)
    dequantize_model(packed, out, overwrite=True)
    assert digest(out) == whole


# ── inspect ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_inspect_counts_every_stored_bit(packed: Path) -> None:
    found = inspect_model(packed)
    tensors = load_file(packed / "model.safetensors")
    assert found["bytes"] == sum(t.nbytes for t in tensors.values()) == sum(t["bytes"] for t in found["tensors"])
    quantized = [t for t in found["tensors"] if t["quantized"]]
    own = sum(t.nbytes for n, t in tensors.items() if ".weight_" in n)
    weights = sum(t["shape"][0] * t["shape"][1] for t in quantized)
    assert found["quantized_parameters"] == weights
    assert found["bits_per_weight"] == round(8 * own / weights, 4)
    # 4 bits, a bfloat16 scale and a 4-bit zero point for 32 weights, and the shape of each tensor.
    assert found["bits_per_weight"] == pytest.approx(4 + 16 / 32 + 4 / 32 + 128 * len(quantized) / weights, abs=0.01)
    assert found["container"] == "safetensors" and found["layout"] == "compressed-tensors"
    assert any(r["reader"].startswith("transformers") and r["ok"] for r in found["readers"])
    assert found["file_bytes"] == (packed / "model.safetensors").stat().st_size > found["bytes"]
    assert {t["format"] for t in quantized} == {"w=int4/g32/asym/bfloat16"}


def test_inspect_of_a_plain_model(models: Callable[..., Path]) -> None:
    found = inspect_model(models("llama"))
    assert found["layout"] is None and found["bits_per_weight"] is None
    assert found["container"] == "safetensors" and ["safetensors" in r["reader"] for r in found["readers"]] == [True]
    assert found["model_bits_per_weight"] == 32
    assert found["parameters"] == found["bytes"] // 4
    assert not any(t["quantized"] for t in found["tensors"])


def test_inspect_counts_what_no_model_tensor_needs(packed: Path, tmp_path: Path) -> None:
    """A tensor that the layout does not know is a tensor of its own, and its bits count."""
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(packed / "model.safetensors") | {"extra.table": torch.zeros(7, dtype=torch.int16)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = inspect_model(tmp_path)
    assert found["bytes"] == sum(t.nbytes for t in tensors.values()) == inspect_model(packed)["bytes"] + 14
    assert [t["bytes"] for t in found["tensors"] if t["name"] == "extra.table"] == [14]
