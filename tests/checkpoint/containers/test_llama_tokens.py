"""llama.cpp cuts texts by our headers as the makers of a tokenizer do. ARRONDI_LLAMA_CPP names an interpreter with llama-cpp-python."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from arrondi.checkpoint.containers.gguf.encode import GGUFPlan, GGUFWriter
from arrondi.checkpoint.containers.gguf.header import Field
from arrondi.checkpoint.containers.gguf.vocabulary import fields_of_tokenizer
from tests.checkpoint.containers.vocabularies import (
    CUTS,
    TEXTS,
    by_name,
    home,
    likely,
    model_file,
    pairs,
    parts_of_words,
    pieces,
    scored,
    texts,
)

pytestmark = pytest.mark.peer


def file_of(folder: Path, path: Path) -> Path:
    """A GGUF file with nothing but the vocabulary."""
    fields = {"general.architecture": Field(8, None, "llama"), **fields_of_tokenizer(folder, 0)}
    writer = GGUFWriter(path, GGUFPlan(fields, {"t": ("F32", (4,))}))
    writer.put("t", torch.zeros(4))
    writer.publish()
    return path


def theirs(file: Path, texts: list[str]) -> list[list[int]]:
    python = os.environ.get("ARRONDI_LLAMA_CPP", "")
    if not python:
        if os.environ.get("ARRONDI_PEERS"):
            pytest.fail("make peers needs ARRONDI_LLAMA_CPP, an interpreter with llama-cpp-python")
        pytest.skip("ARRONDI_LLAMA_CPP names no interpreter with llama-cpp-python")
    asked, out = file.with_suffix(".texts"), file.with_suffix(".ids")
    asked.write_text(json.dumps(texts), encoding="utf-8")
    command = [python, Path(__file__).with_name("llama_tokens.py"), file, asked, out]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[list[int]] = json.loads(out.read_text(encoding="utf-8"))
    return found


DOCUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    **{name: lambda name=name: by_name(name) for name in CUTS},  # type: ignore[misc]
    "pairs": pairs,
    "pairs of tokenizer.model": pairs,
    "likely": likely,
    "pieces": lambda: pieces(prefixed=False),
    "pieces after a space": lambda: pieces(prefixed=True),
    "pieces cut at spaces": lambda: pieces(prefixed=False, split=True),
    "scores": scored,
    "parts of words": parts_of_words,
    "parts of words with capitals": lambda: parts_of_words(lowercase=False),
}


def fit(name: str, text: str) -> bool:
    """Whether both cut it by one rule."""
    if "words" in name:
        return not any("가" <= c <= "힣" for c in text)  # it takes syllables of Hangul apart
    if (
        name == "likely"
    ):  # new lines at the end are trimmed by tokenizers only; SentencePiece's map of characters has made spaces of them before
        return text.rstrip() == text.rstrip(" ")
    if name == "scores":  # a run of unknown letters is one token or several
        return text.isascii() and not text.startswith(" ")
    return True


@pytest.mark.parametrize("name", DOCUMENTS)
def test_llama_cpp_cuts_texts_alike(name: str, tmp_path: Path) -> None:
    document = DOCUMENTS[name]()
    folder = home(tmp_path / "home", document, model_file(document) if "model" in name else b"")
    cut = [t for t in texts() if fit(name, t)]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    found = theirs(file_of(folder, tmp_path / "v.gguf"), cut)
    apart = [(t, x, tokenizer.encode(t).ids) for t, x in zip(cut, found, strict=True) if x != tokenizer.encode(t).ids]
    assert not apart, apart[:3]


@pytest.mark.parametrize("name", ["tinystories-656k", "books-llama-6m", "minilm-l6"])
def test_real_tokenizers(name: str, data: Path, tmp_path: Path) -> None:
    folder = data / name
    story = (data / "text/tinystories_val_a.txt").read_text(encoding="utf-8")[:20_000].split("\n\n")
    cut = [*story, *(TEXTS if name != "tinystories-656k" else ())]
    cut = [t for t in cut if fit("words" if name == "minilm-l6" else name, t)]
    own = AutoTokenizer.from_pretrained(folder)
    assert theirs(file_of(folder, tmp_path / "v.gguf"), cut) == [own(t)["input_ids"] for t in cut]
