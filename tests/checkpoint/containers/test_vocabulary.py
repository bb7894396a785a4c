"""Tokenizers as keys of a GGUF header: what llama.cpp cuts as their makers do is written, all else refused."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from arrondi.checkpoint import Checkpoint
from arrondi.checkpoint.containers.gguf.header import Field, read_header
from arrondi.checkpoint.containers.gguf.tokens import caveats_of
from arrondi.checkpoint.containers.gguf.vocabulary import fields_of_tokenizer, named
from arrondi.errors import FileFormatError, SchemeError
from arrondi.pipeline.convert import convert_model
from tests.checkpoint.containers.vocabularies import (
    CUTS,
    DIGITS,
    LETTERS,
    TEXTS,
    WORDS,
    by_name,
    home,
    likely,
    model_file,
    pairs,
    parts_of_words,
    pieces,
    sample,
    scored,
    split_by,
    steps,
)

ALIKE = (
    "tokens",
    "token_type",
    "add_space_prefix",
    "add_bos_token",
    "bos_token_id",
    "eos_token_id",
    "unknown_token_id",
)


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


@pytest.mark.parametrize("name", CUTS)
def test_every_way_to_cut_has_its_name(name: str, tmp_path: Path) -> None:
    fields = fields_of_tokenizer(home(tmp_path / "m", by_name(name)), 0)
    assert fields["tokenizer.ggml.pre"].value == name and fields["tokenizer.ggml.model"].value == "gpt2"


def test_whole_words_are_merged_or_not_where_that_changes_nothing(tmp_path: Path) -> None:
    document = by_name("qwen2")
    document["model"]["ignore_merges"] = True
    assert fields_of_tokenizer(home(tmp_path / "m", document), 0)["tokenizer.ggml.pre"].value == "qwen2"
    document["model"]["merges"] = document["model"]["merges"][1:]  # the first piece is a word that merges do not make
    with pytest.raises(SchemeError, match="no name for"):
        fields_of_tokenizer(home(tmp_path / "m", document), 0)


def changed(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    model = changes.pop("model", {})
    return {**document, **changes, "model": {**document["model"], **model}}


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "another pattern": (lambda: changed(sample(), pre_tokenizer=steps(split_by("."), LETTERS)), "cuts texts in a way that llama.cpp has no name for"),
    "pieces of Falcon's": (lambda: changed(sample(), pre_tokenizer=CUTS["falcon"][0]), "never makes its piece 'Ġ"),
    "another step": (lambda: changed(sample(), pre_tokenizer=steps(WORDS, DIGITS)), "cuts texts in a way that llama.cpp has no name for"),
    "a space before": (lambda: changed(sample(), pre_tokenizer={**WORDS, "add_prefix_space": True}), "cuts texts in a way"),
    "lower case": (lambda: changed(sample(), normalizer={"type": "Lowercase"}), "changes texts by Lowercase"),
    "ends of words": (lambda: changed(sample(), model={"end_of_word_suffix": "</w>"}), "end_of_word_suffix"),
    "a list of words": (lambda: changed(sample(), model={"type": "WordLevel", "unk_token": "a"}), "'WordLevel' is not known to llama.cpp"),
    "pieces in lower case": (lambda: changed(pieces(prefixed=True), normalizer={"type": "Lowercase"}), "changes texts with Lowercase"),
    "early and late": (lambda: early_and_late(), "early and late"),
    "a piece out of reach": (lambda: out_of_reach(), "are not what its merges make"),
    "likely pieces and bytes": (lambda: changed(likely(), model={"byte_fallback": True}), "in bytes"),
    "likely pieces cut at lines": (lambda: changed(scored(), pre_tokenizer=steps({"type": "WhitespaceSplit"}, METASPACE)), "line ends"),
    "a normal form": (lambda: changed(pairs(), normalizer={"type": "NFKC"}), "with NFKC"),
    "digits apart": (lambda: changed(pairs(), pre_tokenizer=DIGITS), "with Digits"),
    "spaces as they are": (lambda: changed(pairs(), normalizer=None), "keeps spaces"),
    "two alike": (lambda: twice(), "'a' under two numbers"),
    "pieces with spaces": (lambda: changed(pieces(prefixed=False), pre_tokenizer={**METASPACE, "split": True, "prepend_scheme": "never"}), "though it splits"),
    "words of another kind": (lambda: changed(parts_of_words(), pre_tokenizer={"type": "Whitespace"}), "otherwise than BERT"),
}  # fmt: skip


def early_and_late() -> dict[str, Any]:
    document = pieces(prefixed=True)
    merges = document["model"]["merges"]
    one, two = next(m for m in merges if len(m[0]) > 1)
    return changed(
        document,
        model={
            "merges": [*merges, [one[0], one[1:] + two]],
            "vocab": {**document["model"]["vocab"], one[1:] + two: 5000},
        },
    )


def out_of_reach() -> dict[str, Any]:
    document = pieces(prefixed=True)
    return changed(document, model={"vocab": {**document["model"]["vocab"], "qz": 5000}})


def twice() -> dict[str, Any]:
    document = pairs()
    added = {
        "id": len(document["model"]["vocab"]),
        "content": "a",
        "special": False,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    return changed(document, added_tokens=[*document["added_tokens"], added])


@pytest.mark.parametrize("kind", REFUSED)
def test_what_llama_cpp_would_cut_otherwise_is_refused(kind: str, tmp_path: Path) -> None:
    make, words = REFUSED[kind]
    with pytest.raises(SchemeError, match=words) as error:
        fields_of_tokenizer(home(tmp_path / "m", make()), 0)
    assert str(error.value).startswith(str(tmp_path / "m/tokenizer.json")) and "--template" in str(error.value)


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


def test_what_a_reader_should_know_of_a_vocabulary(tmp_path: Path) -> None:
    document = pieces(prefixed=True)
    vocabulary = {n: i for i, n in enumerate(n for n in document["model"]["vocab"] if not n.startswith("<0x"))}
    lacking = fields_of_tokenizer(home(tmp_path / "a", changed(document, model={"vocab": vocabulary})), 0)
    assert "no pieces for single bytes" in caveats_of(lacking)[0]
    for whole in (document, sample()):
        assert not caveats_of(fields_of_tokenizer(home(tmp_path / "b", whole), 0))
    assert "no tokenizer" in caveats_of({})[0]


def with_table(units: int) -> dict[str, Any]:
    """Likely pieces after a map of characters that has so many units, and maps nothing."""
    table = base64.b64encode(struct.pack("<I", 4 * units) + bytes(4 * units) + b"\0").decode()
    return changed(scored(), normalizer={"type": "Precompiled", "precompiled_charsmap": table})


def test_a_table_of_letters_travels(tmp_path: Path) -> None:
    fields = fields_of_tokenizer(home(tmp_path / "m", with_table(256)), 0)
    found = bytes(fields["tokenizer.ggml.precompiled_charsmap"].value)
    assert found == struct.pack("<I", 1024) + bytes(1025)


def test_a_table_that_breaks_a_tokenizer_off_is_refused(tmp_path: Path) -> None:
    """The library ends with something that is no Exception."""
    with pytest.raises(FileFormatError, match="the tokenizer cannot be loaded"):
        fields_of_tokenizer(home(tmp_path / "m", with_table(1)), 0)


@pytest.mark.parametrize("prefixed", [True, False])
def test_the_space_before_a_text_comes_back(prefixed: bool, models: Callable[..., Path], tmp_path: Path) -> None:
    """transformers puts one before every text that is cut into pieces of Llama; the header says whether."""
    plain = models("llama")
    folder = tmp_path / "plain"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(plain / name)
    home(folder, pieces(prefixed=prefixed))
    convert_model(folder, tmp_path / "m.gguf", "gguf")
    again = AutoTokenizer.from_pretrained(Checkpoint.open(tmp_path / "m.gguf").folder.home)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        if "<|endoftext|>" not in text:
            assert again(text, add_special_tokens=False)["input_ids"] == own.encode(text).ids, text


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("name", CUTS)
def test_a_way_to_cut_comes_back(name: str, family: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """Whatever tokenizers models of the architecture usually have."""
    plain, folder = models(family), tmp_path / "plain"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / file).symlink_to(plain / file)
    home(folder, by_name(name))
    convert_model(folder, tmp_path / "m.gguf", "gguf")
    again = AutoTokenizer.from_pretrained(Checkpoint.open(tmp_path / "m.gguf").folder.home)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        assert again(text, add_special_tokens=False)["input_ids"] == own.encode(text, add_special_tokens=False).ids, (
            text
        )


def test_no_other_vocabulary_is_taken_for_that_of_phi_3(tmp_path: Path) -> None:
    fields = fields_of_tokenizer(home(tmp_path / "m", sample()), 0)
    assert named("Phi-3-mini", fields) == "Phi_3-mini" and named("Llama", fields) == "Llama"
    tokens = [*fields["tokenizer.ggml.tokens"].value, "<s>", "</s>", "<unk>"]
    assert named("Phi-3-mini", {"tokenizer.ggml.tokens": Field(9, 8, tokens)}) == "Phi-3-mini"
