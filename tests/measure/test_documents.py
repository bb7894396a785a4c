"""Records of files and lists: which field is read, conversations, parquet."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from arrondi.errors import DataError, FileFormatError, MissingExtraError
from arrondi.measure.data import read_windows, reads_text
from arrondi.measure.documents import read_documents, write_out
from arrondi.measure.text import load_tokenizer
from arrondi.sample import sample_path
from tests.measure.test_text import Letters, letters

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
WRITTEN = "<user>Hi<assistant>Yo"


class Talker(Letters):
    """One token for each character, and a chat template."""

    chat_template = TEMPLATE
    bos_token = "^"

    def apply_chat_template(self, messages: Any, *, tokenize: bool) -> str:
        assert not tokenize
        return "^" + "".join(f"<{m['role']}>{m['content'] + ''}" for m in messages)


RECORDS: dict[str, tuple[str, str, str | None, str]] = {
    "another column": ("a.jsonl", '{"body": "abc", "text": "no"}', "body", "abc"),
    "messages": ("a.jsonl", json.dumps({"id": 1, "messages": CHAT}), None, WRITTEN),
    "from and value": ("a.jsonl", json.dumps({"conversations": SHARED}), None, WRITTEN),
    "a list of messages": ("a.jsonl", json.dumps(CHAT), None, WRITTEN),
    "text before messages": ("a.jsonl", json.dumps({"messages": CHAT, "text": "abc"}), None, "abc"),
    "messages in a column": ("a.jsonl", json.dumps({"talk": CHAT, "text": "abc"}), "talk", WRITTEN),
    "a list of conversations": ("a.json", json.dumps([CHAT, {"messages": CHAT}]), None, f"{WRITTEN}|{WRITTEN}"),
    "an object of columns": ("a.json", json.dumps({"text": ["ab", "c"], "n": [1, 2]}), None, "ab|c"),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_the_field_that_is_read(kind: str, tmp_path: Path) -> None:
    name, content, column, expected = RECORDS[kind]
    (tmp_path / name).write_text(content)
    windows = read_windows(tmp_path / name, Talker(eos=0), 1, column=column)
    assert letters(windows) == expected
    assert windows.documents == tuple(map(len, expected.split("|")))


@pytest.mark.parametrize(
    ("data", "expected"),
    [([CHAT, "abc"], f"{WRITTEN}|abc"), ([{"messages": CHAT}, {"text": "abc"}], f"{WRITTEN}|abc"), ([tuple(SHARED)], WRITTEN)],
    ids=["conversations and texts", "records", "tuples"],
)  # fmt: skip
def test_lists_of_the_python_api(data: list[Any], expected: str) -> None:
    assert reads_text(data)
    assert letters(read_windows(data, Talker(eos=0), 1)) == expected


def test_a_conversation_is_what_the_tokenizers_own_template_writes() -> None:
    tokenizer = load_tokenizer(sample_path())
    tokenizer.chat_template = TEMPLATE
    whole = tokenizer.apply_chat_template(CHAT, tokenize=True)["input_ids"]
    windows = read_windows([CHAT] * 3, tokenizer, len(whole))
    assert windows.ids[0].tolist() == whole  # its begin token is the window's


def test_a_tokenizer_without_a_template_says_so() -> None:
    with pytest.raises(DataError, match=r"document 2 is a conversation.* no chat template\. Write"):
        read_windows(["abc", CHAT], Letters(), 1)


def test_a_conversation_that_the_template_does_not_take_is_named() -> None:
    bad = [{"role": "user", "content": None}]
    with pytest.raises(DataError, match=r"does not take conversation 2 \(TypeError"):
        write_out([CHAT, bad], Talker(), "x")


@pytest.mark.parametrize(
    ("name", "content", "column", "words"),
    [
        ("a.txt", "abc", "text", "plain text has no column 'text'"),
        (
            "a.jsonl",
            '{"text": "abc"}\n{"txt": "abc"}',
            "text",
            "line 2: an object with the fields 'txt' has no field `text`",
        ),
        ("a.jsonl", '{"text": "abc"}', "body", "line 1: .* has no field `body`"),
        ("a.jsonl", '{"body": 7}', "body", "line 1: the field `body` holds a number"),
    ],
)
def test_columns_that_are_not_there(name: str, content: str, column: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises((DataError, FileFormatError), match=words):
        read_documents(tmp_path / name, "text", column)


def test_parquet_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingExtraError, match=r"pyarrow.*arrondi\[parquet\]"):
        read_documents(tmp_path / "a.parquet", "calibration text")


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(name: str, **columns: Any) -> Path:
        parquet.write_table(pyarrow.table(columns), tmp_path / name)
        return tmp_path / name

    assert read_documents(write("a.parquet", text=["ab", "c"], n=[1, 2]), "text")[0] == ["ab", "c"]
    assert read_documents(write("b.parquet", n=[1, 2], messages=[CHAT, CHAT]), "text")[0] == [CHAT, CHAT]
    assert read_documents(write("c.parquet", body=["x"]), "text", "body")[0] == ["x"]
    bad = {
        "row 2: the field `text` holds null": (write("d.parquet", text=["ab", None]), None),
        "no column `text` among 'body'": (write("e.parquet", body=["x"]), None),
        "column of .*'bdy'": (write("f.parquet", body=["x"]), "bdy"),
        "cannot be read as parquet": (tmp_path / "g.parquet", None),
        "holds no text": (write("h.parquet", text=[" "]), None),
    }
    (tmp_path / "g.parquet").write_bytes(b"PAR1 and nothing else")
    for words, (path, column) in bad.items():
        with pytest.raises((FileFormatError, DataError), match=words):
            read_documents(path, "text", column)
