"""Files and lists → documents: texts, or conversations that a tokenizer's chat template writes out.

Owns: `Document`, `read_documents` (files), `is_document` and `as_document` (what a caller gives in a list), and `with_text`. Which
field of a record is read is said by `column`; without it the field `text` is taken, else a conversation under one of its usual
names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from arrondi.checkpoint.containers.descriptors import reraise_exhaustion
from arrondi.errors import ArrondiError, DataError, FileFormatError, MissingExtraError, unknown

Conversation: TypeAlias = list[dict[str, Any]]
"""Messages in order, each with `role` and `content`, as chat templates take them."""

Document: TypeAlias = str | Conversation

_PACKED: Final = frozenset({".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".7z", ".lz4"})
_TABLES: Final = frozenset({".arrow", ".feather", ".csv", ".tsv", ".xlsx", ".npy", ".npz", ".pkl", ".pt"})
_LAID_OUT: Final = frozenset({".pdf", ".docx", ".odt", ".epub", ".rtf", ".doc"})
_CHATS: Final = ("messages", "conversations", "conversation")
"""Fields under which data sets keep conversations."""
_ROLES: Final = {"human": "user", "gpt": "assistant"}
"""Roles of records that say `from` and `value`, where they are called otherwise."""


def read_documents(path: Path, purpose: str, column: str | None = None) -> tuple[list[Document], bytes]:
    """The documents of a file, and its bytes: one text, or the records of a `.jsonl`, `.json` or `.parquet` file.

    A record is a string, a list of messages, or an object of which one field is read (see `column`); a `.json` file is a list of
    records, or an object whose `column` is a list. A byte-order mark is not text, and lines end as in Python's text files, however
    they were written. Documents of nothing but white space are left out.

    Args:
        path: the file; its name says what kind it is.
        purpose: what the data are for, as errors should say it.
        column: the field of records that is read; None: `text`, or else `messages`, `conversations` or `conversation`.

    Raises:
        FileFormatError: the file is missing, is not UTF-8, is none of text, or holds a record of another shape, which is named.
        DataError: it holds no text, or there are no records to choose a column of.
        MissingExtraError: a parquet file, and no package that reads it.
    """
    _check_name(path, purpose)
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise FileFormatError(f"{path}: no such file. Give a UTF-8 text file as {purpose}.") from error
    except IsADirectoryError as error:
        raise FileFormatError(f"{path}: a directory. Give a UTF-8 text file as {purpose}.") from error
    kind = path.suffix.lower()
    if kind == ".parquet":
        rows = enumerate(_parquet(path, column), 1)
        return with_text(
            [as_document(row, f"{path}, row {n}", column) for n, row in rows], f"{path}: this {purpose}"
        ), raw
    text = _decoded(path, raw, purpose)
    if kind in (".jsonl", ".ndjson"):
        found = [as_document(line, f"{path}, line {n}", column) for n, line in _lines(path, text)]
    elif kind == ".json":
        found = [as_document(item, f"{path}, item {n}", column) for n, item in enumerate(_list(path, text, column), 1)]
    elif column is not None:
        raise DataError(
            f"{path}: plain text has no column {column!r}. Leave --column out, or give a .jsonl, .json or .parquet file."
        )
    else:
        found = [text]
    documents = with_text(found, f"{path}: this {purpose}")
    if found == [text] and "\0" in text:
        raise FileFormatError(
            f"{path}: holds NUL characters, so it is no UTF-8 text. Give a plain text file as {purpose}; UTF-16 must be converted."
        )
    return documents, raw


def is_document(item: Any) -> bool:
    """Whether an item of a caller's list is to be read as text: a string, a conversation, or a record that has one of them."""
    if isinstance(item, Mapping):
        return "input_ids" not in item and any(name in item for name in ("text", *_CHATS))
    return isinstance(item, str) or _is_conversation(item)


def as_document(record: Any, place: str, column: str | None = None) -> Document:
    """What a record has to be read; `place` names it in errors.

    Raises:
        FileFormatError: nothing, or not in the field `column`.
    """
    if isinstance(record, Mapping):
        name = column or next((n for n in ("text", *_CHATS) if n in record), None)
        if name is None or name not in record:
            hint = "Say which field holds text with --column, or write objects with a field `text`."
            raise FileFormatError(f"{place}: {_named(record)} has no field `{column or 'text'}`. {hint}")
        value, where = record[name], f"the field `{name}` holds "
    else:
        value, where = record, ""
    if isinstance(value, str):
        return value
    if _is_conversation(value):
        return _conversation(value, place)
    if isinstance(value, list) and not value and (where == "" or name != "text"):
        raise FileFormatError(f"{place}: {where}a conversation without messages. Remove the record.")
    if where:
        raise FileFormatError(
            f"{place}: {where}{_named(value)}. Give a string, or a list of messages with role and content."
        )
    raise FileFormatError(f"{place}: {_named(value)} is no text. Give a string, or an object with a field `text`.")


def with_text(documents: Sequence[Document], what: str) -> list[Document]:
    """The documents that have something to read in them; conversations are looked at when they are written out.

    Raises:
        DataError: none has, or one holds half a character.
    """
    for document in documents:
        for text in [document] if isinstance(document, str) else _texts(document):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{what} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is no character. Remove it."
                ) from error
    found = [d for d in documents if not isinstance(d, str) or any(c.isprintable() and not c.isspace() for c in d)]
    if not found:
        raise DataError(f"{what} holds no text, only white space. Give a text of some thousand words.")
    return found


def write_out(documents: Sequence[Document], tokenizer: Any, what: str) -> list[str]:
    """Documents as texts: conversations by the tokenizer's own chat template.

    The begin token that a template puts in front is left out: windows begin with one of their own.

    Raises:
        DataError: the tokenizer has no chat template, or it does not take a conversation, which is named.
    """
    begin = getattr(tokenizer, "bos_token", None)
    texts = []
    for n, document in enumerate(documents, 1):
        if isinstance(document, str):
            texts.append(document)
            continue
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{what}: document {n} is a conversation, and the model's tokenizer has no chat template. "
                "Write conversations out as texts, or put chat_template.jinja beside the tokenizer."
            )
        try:
            text = str(tokenizer.apply_chat_template(document, tokenize=False))
        except Exception as error:  # whatever a template raises about a conversation
            reraise_exhaustion(error)
            reason = str(error).strip().partition("\n")[0]
            raise DataError(
                f"{what}: the chat template does not take conversation {n} ({type(error).__name__}: {reason}). Remove it, or write it out as text."
            ) from error
        texts.append(text.removeprefix(begin) if begin else text)
    return texts


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(m, Mapping) and _speaks(m) for m in value)
    )


def _speaks(message: Mapping[str, Any]) -> bool:
    return "role" in message or "from" in message


def _conversation(messages: Sequence[Mapping[str, Any]], place: str) -> Conversation:
    """Messages as templates take them; those that say `from` and `value` are translated, and empty fields are left out."""
    found: Conversation = []
    for n, message in enumerate(messages, 1):
        if "role" in message:
            one = {k: v for k, v in message.items() if v is not None or k == "content"}
        else:
            role = message["from"]
            one = {"role": _ROLES.get(role, role), "content": message.get("value")}
        if not isinstance(one["role"], str) or "content" not in one:
            raise FileFormatError(f"{place}: message {n} has no role or no content. Give both, or remove the record.")
        found.append(one)
    return found


def _texts(conversation: Conversation) -> Iterator[str]:
    for message in conversation:
        if isinstance(message["content"], str):
            yield message["content"]


def _check_name(path: Path, purpose: str) -> None:
    """Refuse what is no text by its name: its bytes may still be characters."""
    kind = path.suffix.lower()
    if kind in _PACKED:
        raise FileFormatError(f"{path}: packed. Unpack it, and give the text file in it as {purpose}.")
    if kind in _TABLES:
        raise FileFormatError(
            f"{path}: a table, which is not read as text. Write its texts into a .jsonl file, one object with a field `text` a line, and give that as {purpose}."
        )
    if kind in _LAID_OUT:
        raise FileFormatError(f"{path}: a document with a layout. Give a plain text file as {purpose}.")


def _decoded(path: Path, raw: bytes, purpose: str) -> str:
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise FileFormatError(
            f"{path}: not UTF-8 text (byte {error.start}). Give a plain text file as {purpose}."
        ) from error


def _lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield n, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise FileFormatError(
                    f"{path}, line {n}: not JSON ({error}). A line holds one string or one object with a field `text`; plain text belongs into a .txt file."
                ) from error


def _list(path: Path, text: str, column: str | None) -> list[Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: not JSON ({error}). Plain text belongs into a .txt file.") from error
    if isinstance(found, dict) and isinstance(found.get(column or "text"), list):
        return list(found[column or "text"])
    if not isinstance(found, list):
        raise FileFormatError(
            f"{path}: holds {_named(found)}, not a list of texts. Give a list of strings, or JSON lines in a .jsonl file."
        )
    return found


def _parquet(path: Path, column: str | None) -> list[Any]:
    """One column of a parquet file, row by row; what the package raises about a broken file is said in one sentence."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError(
            f"{path}: parquet files are read by pyarrow, which is not installed. Install it (pip install 'arrondi[parquet]'), or give the texts as .jsonl."
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            name = column or next((n for n in ("text", *_CHATS) if n in names), None)
            if name is None:
                shown = ", ".join(map(repr, names[:8]))
                raise FileFormatError(
                    f"{path}: no column `text` among {shown}. Say which one holds text with --column."
                )
            if name not in names:
                raise unknown(f"column of {path}:", name, names, FileFormatError)
            return [{name: value} for value in file.read([name]).column(0).to_pylist()]
    except ArrondiError:
        raise
    except Exception as error:  # whatever pyarrow raises about a file that is none
        reraise_exhaustion(error)
        reason = str(error).strip().partition("\n")[0]
        raise FileFormatError(
            f"{path}: cannot be read as parquet ({reason}). Write it again, or give .jsonl."
        ) from error


def _named(item: Any) -> str:
    if isinstance(item, Mapping):
        return f"an object with {'the fields ' + ', '.join(map(repr, list(item)[:5])) if item else 'no fields'}"
    kinds = {list: "a list", str: "a string", bool: "a truth value", type(None): "null", bytes: "bytes"}
    return kinds.get(type(item), "a number")
