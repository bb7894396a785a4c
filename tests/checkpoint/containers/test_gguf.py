"""GGUF files as model directories: read as gguf's own package wrote them, written so that it and transformers read them, refused when they lie."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from transformers import AutoModelForCausalLM

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.checkpoint.containers.gguf.encode import GGUFPlan
from arrondi.checkpoint.containers.gguf.encode import GGUFWriter as Writer
from arrondi.checkpoint.containers.gguf.header import Field, read_header
from arrondi.checkpoint.layouts.ggml import BLOCKS
from arrondi.errors import ArrondiError, FileFormatError, SchemeError
from arrondi.pipeline.convert import convert_model
from arrondi.pipeline.gguf_out import _file_type
from tests.checkpoint.layouts.test_ggml import random_rows, theirs

LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0],
    "short_factor": [1.0, 1.0, 1.1, 1.1, 1.2, 1.2, 1.3, 1.4],
    "original_max_position_embeddings": 256,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("llama", "qwen3", "gemma2", "gpt2", "mixtral", "qwen2-moe", "gemma", "phi", "stablelm", "falcon", "phi3-fused-qkv")},
    "falcon of groups": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon of heads": ("falcon", {"multi_query": False}),
    "phi3 of two lengths": ("phi3-fused-qkv", {"rope_parameters": LONG, "original_max_position_embeddings": 256, "max_position_embeddings": 512}),
}  # fmt: skip
NORMS = "norm.weight"
"""To Gemma's a number is added in the file and taken away again, which rounds."""


def ids() -> torch.Tensor:
    return torch.arange(1, 13)[None]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_comes_back(name: str, models: Callable[..., Path], tmp_path: Path) -> None:
    model, changes = FAMILIES[name]
    plain, file = models(model, **changes), tmp_path / "m.gguf"
    result = convert_model(plain, file, "gguf")
    assert result["copied"] == len(result["tensors"]) and result["bytes"] == file.stat().st_size
    before, after = Checkpoint.open(plain), Checkpoint.open(file)
    if name == "mixtral":  # its parts have older names in its own checkpoints, which transformers reads as well
        assert len(before.names) == len(after.names)
    else:
        assert before.names == after.names
    for tensor in before.names.keys() & after.names.keys():
        close = name in ("gemma", "gemma2") and tensor.endswith(NORMS)
        torch.testing.assert_close(
            after.dense(tensor), before.dense(tensor), rtol=1e-6 if close else 0, atol=2e-7 if close else 0
        )
    want, have = (arrondi.load(path)(ids()).logits for path in (plain, file))
    torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)


def test_transformers_reads_what_is_written(models: Callable[..., Path], tmp_path: Path) -> None:
    plain = models("llama")
    convert_model(plain, tmp_path / "m.gguf", "gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    torch.testing.assert_close(theirs(ids()).logits, arrondi.load(plain)(ids()).logits, rtol=1e-5, atol=1e-5)


def test_blocks_of_gguf_itself(models: Callable[..., Path], tmp_path: Path) -> None:
    """A file of q8_0 blocks, whose rows of queries and keys are in the order of its makers, means what gguf's package decodes."""
    plain = models("llama")
    convert_model(plain, tmp_path / "plain.gguf", "gguf")
    header = read_header(tmp_path / "plain.gguf")
    reader = GGUFReader(tmp_path / "plain.gguf")
    import gguf

    packed, decoded = {}, {}
    for tensor in reader.tensors:
        values = np.array(tensor.data)
        packed[tensor.name], decoded[tensor.name] = ("F32", values), values
        if values.ndim == 2:
            blocks = gguf.quantize(values, GGMLQuantizationType.Q8_0)
            packed[tensor.name] = "Q8_0", blocks
            decoded[tensor.name] = gguf.dequantize(blocks, GGMLQuantizationType.Q8_0)
    for name, data in (("q8", packed), ("f32", {n: ("F32", v) for n, v in decoded.items()})):
        plan = GGUFPlan(header.fields, {n: (kind, header.tensors[n].shape) for n, (kind, _) in data.items()})
        writer = Writer(tmp_path / f"{name}.gguf", plan)
        for tensor_name, (_, value) in data.items():
            writer.put(tensor_name, torch.from_numpy(np.ascontiguousarray(value)))
        writer.publish()
    ours, theirs = Checkpoint.open(tmp_path / "q8.gguf"), Checkpoint.open(tmp_path / "f32.gguf")
    assert ours.quantized and not theirs.quantized and ours.names == theirs.names
    for tensor_name in ours.names:
        assert torch.equal(ours.dense(tensor_name), theirs.dense(tensor_name)), tensor_name


def test_types_whose_values_are_on_no_grid_are_read_as_gguf_decodes_them(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    """One of each in a file: no matrix of the model has its rows turned but those of queries and keys."""
    convert_model(
        models("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=3), tmp_path / "plain.gguf", "gguf"
    )
    header = read_header(tmp_path / "plain.gguf")
    kinds = [kind for kind in BLOCKS.values() if kind.scheme is None or not kind.written]
    places = [(i, part) for i in range(3) for part in ("gate", "up", "down")][: len(kinds)]
    assert len(kinds) == len(places) == 8
    raw = {
        f"blk.{i}.ffn_{part}.weight": random_rows(kind, 256, 256) for (i, part), kind in zip(places, kinds, strict=True)
    }
    types = dict(zip(raw, kinds, strict=True))
    tensors = {n: (types[n].name, (256, 256)) if n in raw else (s.type, s.shape) for n, s in header.tensors.items()}
    writer = Writer(tmp_path / "some.gguf", GGUFPlan(header.fields, tensors))
    for name in header.tensors:
        writer.put(name, raw[name] if name in raw else header.read(name))
    writer.publish()
    checkpoint = Checkpoint.open(tmp_path / "some.gguf")
    for (i, part), (name, kind) in zip(places, types.items(), strict=True):
        found = checkpoint.dense(f"model.layers.{i}.mlp.{part}_proj.weight")
        assert np.array_equal(found.numpy(), theirs(raw[name], kind)), kind.name


def test_types_of_another_program_are_named(tmp_path: Path) -> None:
    path = header_of(tmp_path, lambda w: w.add_tensor("t", np.zeros((2, 3), dtype=np.float32)))
    raw = bytearray(path.read_bytes())
    at = raw.index(struct.pack("<QQIQ", 3, 2, 0, 0)) + 16
    for number, words in (
        (135, "IQ2_BN of ik_llama.cpp"),
        (999, "type 999, which is not known"),
    ):
        raw[at : at + 4] = struct.pack("<I", number)
        path.write_bytes(raw)
        with pytest.raises(FileFormatError, match=words):
            read_header(path)


def test_a_dequantized_file_is_an_ordinary_directory(models: Callable[..., Path], tmp_path: Path) -> None:
    convert_model(models("gpt2"), tmp_path / "m.gguf", "gguf")
    again = convert_model(tmp_path / "m.gguf", tmp_path / "n.gguf", "gguf")
    assert again["copied"]
    one, two = (read_header(tmp_path / f"{n}.gguf") for n in "mn")
    assert one.fields == two.fields and one.tensors == two.tensors, "what a header says is carried over unchanged"


def header_of(tmp_path: Path, change: Callable[[GGUFWriter], None]) -> Path:
    """A small file of gguf's own writer."""
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "llama")
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_kind_of_value(tmp_path: Path) -> None:
    def fill(writer: GGUFWriter) -> None:
        writer.add_uint8("a", 200)
        writer.add_int64("b", -(2**40))
        writer.add_float64("c", 0.1)
        writer.add_bool("d", True)
        writer.add_string("e", "é\n")
        writer.add_array("f", [1, -2, 3])
        writer.add_array("g", ["x", ""])
        writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))

    path = header_of(tmp_path, fill)
    header = read_header(path)
    values = {k: f.value for k, f in header.fields.items()}
    assert values == {
        "general.architecture": "llama",
        "a": 200,
        "b": -(2**40),
        "c": 0.1,
        "d": True,
        "e": "é\n",
        "f": [1, -2, 3],
        "g": ["x", ""],
    }
    assert header.read("t").tolist() == [[0, 1, 2], [3, 4, 5]]
    writer = Writer(
        tmp_path / "y.gguf", GGUFPlan(header.fields, {n: (s.type, s.shape) for n, s in header.tensors.items()})
    )
    writer.put("t", header.read("t"))
    writer.publish()
    assert (tmp_path / "y.gguf").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("at", "new", "words"),
    [
        (0, b"GGUX", "no such|not|GGUF"),
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "byte order"),
        (8, struct.pack("<Q", 2**60), "declares"),
        (16, struct.pack("<Q", 2**60), "declares"),
        (24, struct.pack("<Q", 2**60), "beyond the end"),
    ],
)
def test_headers_that_lie(at: int, new: bytes, words: str, tmp_path: Path) -> None:
    path = header_of(tmp_path, lambda w: w.add_tensor("t", np.zeros((2, 3), dtype=np.float32)))
    raw = bytearray(path.read_bytes())
    raw[at : at + len(new)] = new
    path.write_bytes(raw)
    with pytest.raises(FileFormatError, match=words):
        read_header(path)


def test_no_truncation_is_read(tmp_path: Path) -> None:
    path = header_of(tmp_path, lambda w: w.add_tensor("t", np.ones((2, 4), dtype=np.float32)))
    raw = path.read_bytes()
    for length in range(len(raw)):
        (tmp_path / "cut.gguf").write_bytes(raw[:length])
        with pytest.raises(FileFormatError):
            read_header(tmp_path / "cut.gguf")


def test_tensors_that_overlap(tmp_path: Path) -> None:
    def fill(writer: GGUFWriter) -> None:
        writer.add_tensor("one", np.zeros((2, 4), dtype=np.float32))
        writer.add_tensor("two", np.zeros((2, 4), dtype=np.float32))

    path = header_of(tmp_path, fill)
    raw = path.read_bytes().replace(struct.pack("<IQ", 0, 32), struct.pack("<IQ", 0, 0))
    path.write_bytes(raw)
    with pytest.raises(FileFormatError, match="'one' and 'two' overlap"):
        read_header(path)


def test_a_part_of_a_split_model_that_is_not_there(models: Callable[..., Path], tmp_path: Path) -> None:
    convert_model(models("llama"), tmp_path / "m-00001-of-00002.gguf", "gguf")
    with pytest.raises(FileFormatError, match=r"m-00002-of-00002\.gguf: this part"):
        Checkpoint.open(tmp_path / "m-00001-of-00002.gguf")


def test_positions_of_llama_3(models: Callable[..., Path], tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = models("llama", rope_parameters=rope)
    convert_model(plain, tmp_path / "m.gguf", "gguf")
    assert Checkpoint.open(tmp_path / "m.gguf").folder.config["rope_parameters"] == rope


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("gemma3", {}, "layer_types"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping"),
    ],
)
def test_what_a_header_cannot_say_is_refused(
    name: str, changes: dict[str, object], word: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(SchemeError, match=f"GGUF says nothing of {word}: "):
        convert_model(models(name, **changes), tmp_path / "m.gguf", "gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "words"), [("bert", "GGUF|vocabulary|text"), ("mamba2", "GGUF")])
def test_models_that_gguf_has_no_words_for(name: str, words: str, models: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ArrondiError, match=words):
        convert_model(models(name), tmp_path / "m.gguf", "gguf")
    assert not list(tmp_path.iterdir()), "nothing is left of what was not finished"


def test_a_template_of_another_architecture(models: Callable[..., Path], tmp_path: Path) -> None:
    convert_model(models("gpt2"), tmp_path / "gpt2.gguf", "gguf")
    with pytest.raises(SchemeError, match="of the architecture 'gpt2', and the model is 'llama'"):
        convert_model(models("llama"), tmp_path / "m.gguf", "gguf", template=tmp_path / "gpt2.gguf")


def test_a_field_keeps_its_type() -> None:
    head, _ = GGUFPlan({"k": Field(10, None, 2**40)}, {}).header()
    assert struct.pack("<IQ", 10, 2**40) in head


def test_names_of_one_architecture_are_not_those_of_another(models: Callable[..., Path], tmp_path: Path) -> None:
    """The package gguf mixes its tables when it is asked for several; a norm of Llama is called like one of Gemma then."""
    convert_model(models("gemma2"), tmp_path / "gemma2.gguf", "gguf")
    convert_model(models("llama"), tmp_path / "llama.gguf", "gguf")
    assert "blk.0.ffn_norm.weight" in read_header(tmp_path / "llama.gguf").tensors


@pytest.mark.parametrize(
    ("base", "others", "name"),
    [
        ("Q4_K", (), "Q4_K_S"),
        ("Q4_K", ("Q6_K",), "Q4_K_M"),
        ("Q3_K", ("Q5_K", "Q4_K"), "Q3_K_M"),
        ("Q3_K", ("Q5_K",), "Q3_K_L"),
        ("Q2_K", ("Q3_K",), "Q2_K"),
        ("MXFP4", ("Q8_0",), "MXFP4_MOE"),
        ("Q8_0", (), "Q8_0"),
    ],
)
def test_a_file_is_called_by_its_mix(base: str, others: tuple[str, ...], name: str) -> None:
    layout = {f"blk.{i}.ffn_up.weight": (base, (256, 256)) for i in range(4)}
    layout |= {f"blk.{i}.attn_v.weight": (kind, (256, 256)) for i, kind in enumerate(others)}
    assert LlamaFileType(_file_type(layout)).name == f"MOSTLY_{name}"
