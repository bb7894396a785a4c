"""What a copy of a model takes along."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import transformers

from arrondi.checkpoint.containers.side_files import copy_side_files, side_files

TAKEN = [
    "1_Pooling/config.json", "LICENSE", "LICENSE.md", "additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja",
    "chat_template.jinja", "config_sentence_transformers.json", "generation_config.json", "merges.txt", "modeling_x.py", "modules.json",
    "sentencepiece.bpe.model", "qwen.tiktoken", "source.spm", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "vocab.bpe",
    "2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "assets/vocab.txt", "tokenizer.model.v3", "bpe.codes", "NOTICE.rst",
    "USE_POLICY.md", "Merges.TXT",
]  # fmt: skip
LEFT = [
    "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "report.json", "manifest.json", "README.md", "notes",
    ".gitattributes", ".cache/huggingface/download/x.json", "onnx/model.onnx", "onnx/config.json", "original/params.json", "original/consolidated.00.pth",
    "checkpoint-500/model.safetensors", "checkpoint-500/trainer_state.json", "logo.png", "quantize_config.json", "model.safetensors.partial",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "model"
    for name in [*TAKEN, *LEFT]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"{{{name}}}")
    modules = [
        {"path": ""},
        {"path": "1_Pooling"},
        {"path": "2_Dense"},
        {"path": "../elsewhere"},
        {"path": "."},
        {"path": "./"},
        {"path": 3},
        None,
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "a folder.json").mkdir()
    return source


def test_the_rule(folder: Path) -> None:
    assert [str(p) for p in side_files(folder)] == sorted(TAKEN)


def test_copies_lie_at_the_same_places(folder: Path, tmp_path: Path) -> None:
    copied = copy_side_files(folder, tmp_path / "out")
    assert [str(p) for p in copied] == sorted(TAKEN)
    for name in TAKEN:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_a_broken_list_of_modules_stops_nothing(folder: Path) -> None:
    (folder / "modules.json").write_text("[")
    assert Path("1_Pooling/config.json") in side_files(folder)
    assert Path("2_Dense/model.safetensors") not in side_files(folder)


def test_every_vocabulary_of_transformers_travels(tmp_path: Path) -> None:
    """The names that the tokenizers of transformers give their files."""
    found: set[str] = set()
    for file in (Path(transformers.__file__).parent / "models").rglob("tokenization_*.py"):
        code = file.read_text(encoding="utf-8")
        words = dict(re.findall(r'^([A-Z_]+) = "([^"]+)"', code, re.MULTILINE))
        for table in re.findall(r"^VOCAB_FILES_NAMES = (\{.*?\})", code, re.MULTILINE | re.DOTALL):
            found |= {v.strip('"') for v in (words.get(v, v) for v in re.findall(r":\s*(\"[^\"]+\"|\w+)", table))}
    assert len(found) > 20 and "prophetnet.tokenizer" in found
    for name in found:
        (tmp_path / name).write_text(name)
    assert {str(p) for p in side_files(tmp_path)} == found


def test_links(folder: Path, tmp_path: Path) -> None:
    """Files and parts of a model may be links, as in the cache of the Hub; other folders are not followed, and no circle is."""
    for name in ("tokenizer.json", "1_Pooling"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    (folder / "1_Pooling" / "up").symlink_to(folder)
    (folder / "here").symlink_to(folder)
    (folder / "lost.json").symlink_to(tmp_path / "nowhere")
    assert [str(p) for p in side_files(folder)] == sorted(TAKEN)


def test_a_folder_that_cannot_be_read_is_not_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refused(path: str) -> object:
        if Path(path).name == "1_Pooling":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError):
        side_files(folder)
