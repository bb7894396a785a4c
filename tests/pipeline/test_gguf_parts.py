"""What a GGUF file has no place for is left out by rule and named; nothing else is, and nothing becomes zero."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from safetensors.torch import load_file, save_file

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.checkpoint.containers.gguf.naming import gguf_places
from arrondi.checkpoint.imatrix import Importance, ImportanceMatrix, read_imatrix, write_imatrix
from arrondi.errors import SchemeError
from arrondi.pipeline.convert import convert_model
from arrondi.pipeline.importance import make_imatrix

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}


def with_tensors(plain: Path, folder: Path, more: dict[str, torch.Tensor]) -> Path:
    """A copy of a model that holds more than it builds."""
    folder.mkdir()
    for file in plain.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file({**load_file(plain / "model.safetensors"), **more}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "name", ["mtp.fc.weight", "model.layers.9.eh_proj.weight", "model.layers.9.mlp.up_proj.weight"]
)
def test_draft_layers_that_are_not_built(name: str, models: Callable[..., Path], tmp_path: Path) -> None:
    plain = models("llama", **WIDE)
    model = with_tensors(plain, tmp_path / "m", {name: torch.ones(4, 256)})
    result = convert_model(model, tmp_path / "c.gguf", "gguf")
    assert result["left_out"] == 1 and {"name": name, "verdict": "left out"} in result["tensors"]
    report = arrondi.quantize(model, "Q4_K_M", out=tmp_path / "m.gguf", to="gguf")
    for notes in (result["notes"], report["notes"]):
        assert any(n.startswith(f"{name} is left out: the model does not build") for n in notes)
    arrondi.quantize(plain, "Q4_K_M", out=tmp_path / "plain.gguf", to="gguf")
    one, two = (GGUFReader(tmp_path / f).tensors for f in ("m.gguf", "plain.gguf"))
    assert [(t.name, t.data.tobytes()) for t in one] == [(t.name, t.data.tobytes()) for t in two]


def test_a_tensor_that_is_read_is_never_left_out(models: Callable[..., Path]) -> None:
    config = Checkpoint.open(models("llama")).folder.model_config
    own = transformers.CONFIG_MAPPING[config["model_type"]](**config)
    shapes = {"model.embed_tokens.weight": (2048, 64), "model.layers.0.self_attn.gate.weight": (64, 64)}
    with pytest.raises(SchemeError, match=r"self_attn\.gate\.weight: GGUF has no name for it"):
        gguf_places(own, shapes, ["mtp.fc.weight"])


DRAFT = "blk.9.nextn.eh_proj.weight"


def with_draft(plain: Path, file: Path, kind: GGMLQuantizationType) -> np.ndarray:
    """Writes a GGUF file of a model and a tensor of a draft layer that it does not build, whose numbers are returned."""
    convert_model(plain, file.with_name("without.gguf"), "gguf")
    reader, writer = GGUFReader(file.with_name("without.gguf")), GGUFWriter(file, "llama")
    for key, field in reader.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    raw = quantize(np.linspace(-1, 1, 4 * 256, dtype=np.float32).reshape(4, 256), kind)
    writer.add_tensor(DRAFT, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return np.asarray(dequantize(raw, kind))


def test_what_is_not_built_stays_in_a_gguf_file(models: Callable[..., Path], tmp_path: Path) -> None:
    """Under its own name, in its own type."""
    values = with_draft(models("llama", **WIDE), tmp_path / "more.gguf", GGMLQuantizationType.F32)
    arrondi.quantize(tmp_path / "more.gguf", "Q4_K_M", out=tmp_path / "m.gguf", to="gguf")
    found = {t.name: t for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert np.array_equal(found[DRAFT].data, values)
    assert found["blk.0.ffn_up.weight"].tensor_type == GGMLQuantizationType.Q4_K
    assert Checkpoint.open(tmp_path / "m.gguf").dense(DRAFT).equal(torch.from_numpy(values))


def test_blocks_that_are_not_built_go_from_file_to_file(models: Callable[..., Path], tmp_path: Path) -> None:
    values = with_draft(models("llama", **WIDE), tmp_path / "m.gguf", GGMLQuantizationType.Q8_0)
    result = convert_model(tmp_path / "m.gguf", tmp_path / "again.gguf", "gguf", exact_only=True)
    assert result["left_out"] == 0
    found = {t.name: t for t in GGUFReader(tmp_path / "again.gguf").tensors}[DRAFT]
    assert found.tensor_type == GGMLQuantizationType.Q8_0
    assert np.array_equal(dequantize(found.data, found.tensor_type), values)
    convert_model(tmp_path / "m.gguf", tmp_path / "ct", "compressed-tensors")
    assert Checkpoint.open(tmp_path / "ct").dense(DRAFT).float().equal(torch.from_numpy(values))


def test_towers_that_text_does_not_reach(models: Callable[..., Path], tmp_path: Path) -> None:
    small = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
        "head_dim": 16,
    }
    text = {
        **small,
        "num_hidden_layers": 6,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 16,
        "max_position_embeddings": 256,
        "sliding_window": 8,
    }
    plain = models("gemma3-vlm", text_config=text)
    report = arrondi.quantize(plain, "Q8_0", out=tmp_path / "m.gguf", to="gguf")
    said = next(n for n in report["notes"] if "mmproj" in n)
    assert "multi_modal_projector" in said and "text does not reach them" in said
    source, reader = Checkpoint.open(plain), GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["general.architecture"].contents() == "gemma3"
    found = {t.name: t for t in reader.tensors}
    words = [n for n in source.names if "language_model" in n]
    assert len(found) == len(words)
    up = torch.from_numpy(dequantize(found["blk.0.ffn_up.weight"].data, found["blk.0.ffn_up.weight"].tensor_type))
    own = source.dense(next(n for n in words if n.endswith("layers.0.mlp.up_proj.weight")))
    assert 0 < (up - own).abs().max() < own.abs().max() / 100


def test_weights_that_an_importance_matrix_lacks(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    plain = models("llama", **WIDE)
    make_imatrix(plain, text, tmp_path / "all.gguf", samples=4, seq_len=32)
    whole = read_imatrix(tmp_path / "all.gguf")
    lacking = {n: e for n, e in whole.entries.items() if n != "blk.1.ffn_up.weight"}
    empty = Importance(torch.zeros_like(lacking["blk.0.ffn_up.weight"].sums), torch.zeros(1))
    quiet = Importance(empty.sums, torch.ones(1))
    changed = {"blk.0.ffn_up.weight": empty, "blk.0.ffn_gate.weight": quiet}
    write_imatrix(tmp_path / "some.gguf", ImportanceMatrix({**lacking, **changed}))
    for kind in ("all", "some"):
        report = arrondi.quantize(
            plain,
            "Q4_K_M",
            method="imatrix",
            out=tmp_path / f"{kind}-m.gguf",
            to="gguf",
            imatrix=tmp_path / f"{kind}.gguf",
        )
    notes = " ".join(report["notes"])
    assert "has nothing of lm_head.weight, model.layers.1.mlp.up_proj.weight; they are" in notes
    assert "saw no token for model.layers.0.mlp.up_proj.weight" in notes
    found = {
        k: {t.name: t.data.tobytes() for t in GGUFReader(tmp_path / f"{k}-m.gguf").tensors} for k in ("all", "some")
    }
    apart = {n for n in found["all"] if found["all"][n] != found["some"][n]}
    assert apart == {"blk.0.ffn_up.weight", "blk.0.ffn_gate.weight", "blk.1.ffn_up.weight"}
    before, after = Checkpoint.open(plain), Checkpoint.open(tmp_path / "some-m.gguf")
    for name in before.names:
        own, rounded = before.dense(name).float(), after.dense(name)
        assert (rounded - own).norm() < 0.15 * own.norm(), name
