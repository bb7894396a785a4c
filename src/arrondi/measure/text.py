"""Text and tokens: the documents of a file, the tokenizer of a model, and how windows are cut.

The protocol, the same for calibration and for measuring: documents are encoded without special tokens, joined by the tokenizer's
end token where there are several, and cut into windows that do not overlap, the last partial one dropped. Each window gets
what the tokenizer's own texts start and end with: BOS in front where the tokenizer has one, CLS … SEP for encoders. A window
with its special tokens is `seq_len` long, and every token but the first is predicted.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.checkpoint.containers.descriptors import reraise_exhaustion
from arrondi.errors import DataError, FileFormatError

_PACKED: Final = frozenset({".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".7z", ".lz4"})
_TABLES: Final = frozenset({".parquet", ".arrow", ".feather", ".csv", ".tsv", ".xlsx", ".npy", ".npz", ".pkl", ".pt"})
_DOCUMENTS: Final = frozenset({".pdf", ".docx", ".odt", ".epub", ".rtf", ".doc"})
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        FileFormatError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise FileFormatError(
            f"{folder}: no tokenizer files. Copy tokenizer.json and tokenizer_config.json there; text cannot be read without them."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer.decode(encode(["One text, ", "and another."], tokenizer))  # some errors show only now
        return tokenizer
    except Exception as error:  # whatever a broken tokenizer raises, it is the file that is wrong
        reraise_exhaustion(error)
        reason = str(error).strip().partition("\n")[0]
        raise FileFormatError(
            f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {reason}). Take its files from the original model."
        ) from error


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What stands before and after every window."""
    if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
        return [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    return ([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]), []


def protocol(tokenizer: Any, seq_len: int) -> str:
    """One sentence that goes beside every number. Without a tokenizer the windows came as token ids."""
    if tokenizer is None:
        return f"windows of {seq_len} tokens as they were given, every token but the first of a window predicted once"
    prefix, suffix = special_tokens(tokenizer)
    start = "CLS and SEP around" if suffix else "BOS before" if prefix else "nothing before"
    return f"non-overlapping windows of {seq_len - len(prefix) - len(suffix)} tokens, {start} each, every token of a window predicted once"


def fit_length(seq_len: int, positions: int | None) -> tuple[int, str | None]:
    """The length of windows that a model takes, and the sentence that says so where fewer tokens than asked for fit."""
    if positions is None or seq_len <= positions:
        return seq_len, None
    return positions, f"Windows have {positions} tokens, not {seq_len}: the model has no more positions."


def positions_of(model: Any) -> int | None:
    """The most tokens that a transformers model takes at once; None where nothing limits them.

    A table of learned positions that begins after the padding index (RoBERTa) has so many fewer.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    words = None
    with contextlib.suppress(AttributeError, NotImplementedError):  # models of two kinds of inputs have several
        words = model.get_input_embeddings()
    for module in model.modules():
        places = isinstance(module, torch.nn.Embedding) and module is not words and module.num_embeddings == limit
        if places and module.padding_idx is not None:
            return limit - module.padding_idx - 1
    return limit


def read_documents(path: Path, purpose: str) -> tuple[list[str], bytes]:
    """The texts of a file, and its bytes: one text, or those of a `.jsonl` or `.json` file.

    A line of JSON lines, like an item of a JSON list, is a string or an object with the field `text`. A byte-order mark is not
    text, and lines end as in Python's text files, however they were written. Documents of nothing but white space are left out.

    Raises:
        FileFormatError: the file is missing, is not UTF-8, is none of text, or is JSON of another shape.
        DataError: it holds no text.
    """
    _check_name(path, purpose)
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError as error:
        raise FileFormatError(f"{path}: no such file. Give a UTF-8 text file as {purpose}.") from error
    except IsADirectoryError as error:
        raise FileFormatError(f"{path}: a directory. Give a UTF-8 text file as {purpose}.") from error
    except UnicodeDecodeError as error:
        raise FileFormatError(
            f"{path}: not UTF-8 text (byte {error.start}). Give a plain text file as {purpose}."
        ) from error
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        documents = [_document(line, f"{path}, line {n}") for n, line in _lines(path, text)]
    elif kind == ".json":
        documents = [_document(item, f"{path}, item {n}") for n, item in enumerate(_list(path, text), 1)]
    else:
        documents = [text]
    found = with_text(documents, f"{path}: this {purpose}")
    if documents == [text] and "\0" in text:
        raise FileFormatError(
            f"{path}: holds NUL characters, so it is no UTF-8 text. Give a plain text file as {purpose}; UTF-16 must be converted."
        )
    return found, raw


def _check_name(path: Path, purpose: str) -> None:
    """Refuse what is no text by its name: its bytes may still be characters."""
    kind = path.suffix.lower()
    if kind in _PACKED:
        raise FileFormatError(f"{path}: packed. Unpack it, and give the text file in it as {purpose}.")
    if kind in _TABLES:
        raise FileFormatError(
            f"{path}: a table, which is not read as text. Write its texts into a .jsonl file, one object with a field `text` a line, and give that as {purpose}."
        )
    if kind in _DOCUMENTS:
        raise FileFormatError(f"{path}: a document with a layout. Give a plain text file as {purpose}.")


def with_text(documents: Sequence[str], what: str) -> list[str]:
    """The documents that have something to read in them.

    Raises:
        DataError: none has, or one holds half a character.
    """
    for document in documents:
        try:
            document.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{what} holds half of a surrogate pair (\\u{ord(document[error.start]):04x}), which is no character. Remove it."
            ) from error
    found = [d for d in documents if any(c.isprintable() and not c.isspace() for c in d)]
    if not found:
        raise DataError(f"{what} holds no text, only white space. Give a text of some thousand words.")
    return found


def encode(documents: Sequence[str], tokenizer: Any) -> list[int]:
    """Token ids of all documents, joined by the tokenizer's end token (or SEP) where it has one."""
    ends = [getattr(tokenizer, name, None) for name in ("eos_token_id", "sep_token_id")]
    end = next((e for e in ends if e is not None), None)
    ids: list[int] = []
    for i, document in enumerate(documents):
        if i and end is not None:
            ids.append(end)
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def cut(ids: Sequence[int], tokenizer: Any, seq_len: int, what: str) -> torch.Tensor:
    """Windows (n, seq_len) of a row of token ids, special tokens included.

    Raises:
        DataError: there is not one window, or a window has no room for text; `what` begins the sentence.
    """
    prefix, suffix = special_tokens(tokenizer)
    body = seq_len - len(prefix) - len(suffix)
    if body < 1:
        raise DataError(f"A window of {seq_len} tokens has no room beside its special tokens. Use a larger --seq-len.")
    count = len(ids) // body
    if count == 0:
        raise DataError(f"{what}, but one sample takes {body}. Give a longer text or a smaller --seq-len.")
    rows = torch.tensor(ids[: count * body], dtype=torch.long).reshape(count, body)
    parts = [torch.tensor(s, dtype=torch.long).expand(count, len(s)) for s in (prefix, suffix)]
    return torch.cat([parts[0], rows, parts[1]], dim=1)


def _lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield n, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise FileFormatError(
                    f"{path}, line {n}: not JSON ({error}). A line holds one string or one object with a field `text`; plain text belongs into a .txt file."
                ) from error


def _list(path: Path, text: str) -> list[Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: not JSON ({error}). Plain text belongs into a .txt file.") from error
    if not isinstance(found, list):
        raise FileFormatError(
            f"{path}: holds {_named(found)}, not a list of texts. Give a list of strings, or JSON lines in a .jsonl file."
        )
    return found


def _document(item: Any, place: str) -> str:
    text = item.get("text") if isinstance(item, dict) else item
    if isinstance(text, str):
        return text
    if isinstance(item, dict) and "text" in item:
        raise FileFormatError(f"{place}: the field `text` holds {_named(text)}. Give a string.")
    chat = " Write the conversation out as one text first." if isinstance(item, dict) and "messages" in item else ""
    raise FileFormatError(f"{place}: {_named(item)} is no text. Give a string, or an object with a field `text`.{chat}")


def _named(item: Any) -> str:
    if isinstance(item, dict):
        return f"an object with {'the fields ' + ', '.join(map(repr, list(item)[:5])) if item else 'no fields'}"
    return {list: "a list", str: "a string", bool: "a truth value", type(None): "null"}.get(type(item), "a number")
