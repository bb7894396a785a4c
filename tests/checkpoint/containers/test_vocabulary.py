"""Tokenizers as keys of a GGUF header: what llama.cpp cuts as the library tokenizers does is written, all else refused."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from arrondi.checkpoint.containers.gguf.encode import GGUFPlan, GGUFWriter
from arrondi.checkpoint.containers.gguf.header import Field, read_header
from arrondi.checkpoint.containers.gguf.vocabulary import fields_of_tokenizer
from arrondi.errors import FileFormatError, SchemeError
from arrondi.pipeline.convert import convert_model
from tests.checkpoint.containers.vocabularies import likely, model_file, pairs, texts

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
ALIKE = (
    "tokens",
    "token_type",
    "add_space_prefix",
    "add_bos_token",
    "bos_token_id",
    "eos_token_id",
    "unknown_token_id",
)


def home(folder: Path, document: dict[str, Any], file: bytes = b"") -> Path:
    """A directory with this tokenizer: as a tokenizer.model where there is one."""
    folder.mkdir(exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if file:
        (folder / "tokenizer.model").write_bytes(file)
    else:
        (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


def test_both_files_of_a_vocabulary_say_the_same(tmp_path: Path) -> None:
    document = pairs()
    one = fields_of_tokenizer(home(tmp_path / "a", document), 0)
    two = fields_of_tokenizer(home(tmp_path / "b", document, model_file(document)), 0)
    for key in ALIKE:
        assert one[f"tokenizer.ggml.{key}"] == two[f"tokenizer.ggml.{key}"], key
    normal = [t == 1 for t in one["tokenizer.ggml.token_type"].value]
    ranks = [
        sorted((s, i) for i, (s, n) in enumerate(zip(f["tokenizer.ggml.scores"].value, normal, strict=True)) if n)
        for f in (one, two)
    ]
    assert [i for _, i in ranks[0]] == [i for _, i in ranks[1]], "the order in which pairs are joined"
    assert one["tokenizer.ggml.add_space_prefix"].value is True


def test_added_tokens_lie_behind_the_pieces(tmp_path: Path) -> None:
    folder = home(tmp_path / "m", {}, model_file(pairs()))
    count = len(pairs()["model"]["vocab"])
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(count): {"content": "<tool>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    fields = fields_of_tokenizer(folder, count + 3)
    tokens, types = (fields[f"tokenizer.ggml.{k}"].value for k in ("tokens", "token_type"))
    assert tokens[count:] == ["<tool>", f"[PAD{count + 1}]", f"[PAD{count + 2}]"] and types[count:] == [3, 5, 5]


def _nfkc(document: dict[str, Any]) -> None:
    document["normalizer"]["normalizers"].append({"type": "NFKC"})


def _digits(document: dict[str, Any]) -> None:
    document["pre_tokenizer"] = {"type": "Digits", "individual_digits": True}


def _spaces(document: dict[str, Any]) -> None:
    document["normalizer"] = None


def _twice(document: dict[str, Any]) -> None:
    document["added_tokens"].append({"id": len(document["model"]["vocab"]), "content": "a", "special": False})


@pytest.mark.parametrize(
    ("change", "words"),
    [(_nfkc, "with NFKC"), (_digits, "with Digits"), (_spaces, "keeps spaces"), (_twice, "'a' under two numbers")],
)
def test_what_llama_cpp_would_cut_otherwise_is_refused(
    change: Callable[[dict[str, Any]], None], words: str, tmp_path: Path
) -> None:
    document = pairs()
    change(document)
    with pytest.raises(SchemeError, match=words):
        fields_of_tokenizer(home(tmp_path / "m", document), 0)


def test_likely_pieces_with_bytes_are_refused(tmp_path: Path) -> None:
    document = likely()
    document["model"]["byte_fallback"] = True
    with pytest.raises(SchemeError, match="in bytes"):
        fields_of_tokenizer(home(tmp_path / "m", document), 0)


def test_a_damaged_tokenizer_model_is_refused(tmp_path: Path) -> None:
    whole = model_file(pairs())
    for cut in (1, 2, 17, len(whole) // 2 - 1, len(whole) - 1):
        with pytest.raises((FileFormatError, SchemeError), match=r"tokenizer\.model"):
            fields_of_tokenizer(home(tmp_path / "m", {}, whole[:cut]), 0)


def test_a_head_that_is_the_table_of_tokens(models: Callable[..., Path], tmp_path: Path) -> None:
    """A checkpoint of tied weights may hold them under the name of the head alone."""
    plain = models("llama", tie_word_embeddings=True)
    folder = tmp_path / "m"
    folder.mkdir()
    for file in plain.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(plain / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    convert_model(folder, tmp_path / "m.gguf", "gguf")
    assert {"token_embd.weight"} == {
        n for n in read_header(tmp_path / "m.gguf").tensors if not n.startswith("blk.")
    } - {"output_norm.weight"}


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["pairs", "pairs of tokenizer.model", "likely"])
def test_llama_cpp_cuts_texts_alike(kind: str, tmp_path: Path) -> None:
    python = os.environ.get("ARRONDI_LLAMA_CPP", "")
    if not python:
        if os.environ.get("ARRONDI_PEERS"):
            pytest.fail("make peers needs ARRONDI_LLAMA_CPP, an interpreter with llama-cpp-python")
        pytest.skip("ARRONDI_LLAMA_CPP names no interpreter with llama-cpp-python")
    document = likely() if kind == "likely" else pairs()
    folder = home(tmp_path / "m", document, model_file(document) if "model" in kind else b"")
    fields = {"general.architecture": Field(8, None, "llama"), **fields_of_tokenizer(folder, 0)}
    writer = GGUFWriter(tmp_path / "v.gguf", GGUFPlan(fields, {"t": ("F32", (4,))}))
    writer.put("t", torch.zeros(4))
    writer.publish()
    # Likely pieces are trimmed: of new lines at the end by tokenizers only; SentencePiece's map of characters has made spaces of them before.
    cut = [t for t in texts() if kind != "likely" or t.rstrip() == t.rstrip(" ")]
    (tmp_path / "texts.json").write_text(json.dumps(cut))
    script = Path(__file__).with_name("llama_tokens.py")
    command = [python, script, *(tmp_path / n for n in ("v.gguf", "texts.json", "ids.json"))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    own = Tokenizer.from_str(json.dumps(document))
    for text, found in zip(cut, json.loads((tmp_path / "ids.json").read_text()), strict=True):
        assert found == own.encode(text).ids, text
