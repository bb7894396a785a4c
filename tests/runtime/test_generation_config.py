"""generation_config.json of every kind: it is read, or one sentence says what is wrong with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from arrondi.errors import FileFormatError
from arrondi.runtime.generate import generate
from arrondi.runtime.generation_config import read_generation_config

WRONG = {
    "null": "null",
    "list": "[]",
    "text": '"x"',
    "no JSON": "{",
    "no text": "\xff",
    "deep": '{"a":' * 3000 + "1" + "}" * 3000,
    "digits": '{"eos_token_id": ' + "9" * 6000 + "}",
    "nested": '{"eos_token_id": [[0]]}',
    "table": '{"eos_token_id": {"a": 1}}',
    "infinite": '{"eos_token_id": 1e999}',
    "word": '{"eos_token_id": "x"}',
    "fraction": '{"eos_token_id": 2.5}',
    "yes": '{"eos_token_id": true}',
    "cache": '{"cache_implementation": 3}',
    "watermark": '{"watermarking_config": 3}',
}
RIGHT = {
    "nothing": ("{}", None),
    "one": ('{"eos_token_id": 7}', 7),
    "several": ('{"eos_token_id": [7, 9]}', [7, 9]),
    "none": ('{"eos_token_id": null}', None),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_none_is_one_sentence(name: str, tmp_path: Path):
    (tmp_path / "generation_config.json").write_bytes(WRONG[name].encode("latin1"))
    with pytest.raises(FileFormatError, match=r"generation_config\.json") as caught:
        read_generation_config(tmp_path)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", RIGHT)
def test_a_file_is_read(name: str, tmp_path: Path):
    text, wanted = RIGHT[name]
    (tmp_path / "generation_config.json").write_text(text)
    assert read_generation_config(tmp_path).eos_token_id == wanted


def test_without_a_file_there_is_none(tmp_path: Path):
    assert read_generation_config(tmp_path) is None


def test_generating_says_it_and_ends_where_the_file_says(models: Callable[..., Path], tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(models("llama"), folder)
    file = folder / "generation_config.json"
    file.write_text("[]")
    with pytest.raises(FileFormatError, match=r"generation_config\.json"):
        generate(folder, "Hello", max_new_tokens=3)
    file.write_text('{"eos_token_id": ' + str(list(range(2048))) + "}")
    assert generate(folder, "Hello", max_new_tokens=3)["tokens"] == 1
