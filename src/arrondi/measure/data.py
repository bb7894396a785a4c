"""Data → windows of token ids: a file, texts, token tensors, or whatever gives batches of them.

Owns: `Windows`, `read_windows`, `chosen`, `reads_text` and `check_windows`. Text is cut as `arrondi.measure.text` says; token ids are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from arrondi.errors import DataError
from arrondi.measure.documents import Document, as_document, is_document, read_documents, with_text, write_out
from arrondi.measure.text import cut, encode, join, positions_of

Data: TypeAlias = str | Path | Sequence[str] | torch.Tensor | Iterable[Any]
"""A path; texts and conversations; token ids (n, seq); or batches: tensors, or dicts with `input_ids`, as a DataLoader gives them."""

_KINDS: Final = "Give a path, a list of texts, token ids of shape (windows, tokens), or batches of them"


@dataclass(frozen=True)
class Windows:
    """Token ids (windows, tokens) with where they came from and a hash of it.

    Attributes:
        ids: (windows, tokens), int64.
        source: where they came from, in words.
        text_hash: SHA-256 of the file, the texts or the ids.
        documents: tokens of every document of the data; empty where token ids were given.
    """

    ids: torch.Tensor
    source: str
    text_hash: str
    documents: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def seq_len(self) -> int:
        """Tokens of a window, special tokens included."""
        return self.ids.shape[1]

    def batches(self, size: int) -> list[torch.Tensor]:
        """The windows in batches of `size`, the last one smaller."""
        return list(self.ids.split(max(size, 1)))


def reads_text(data: Data) -> bool:
    """Whether these data are text, for which a tokenizer is needed. Data that can be read but once are not touched."""
    if isinstance(data, (str, Path)):
        return True
    return isinstance(data, Sequence) and len(data) > 0 and all(map(is_document, data))


def read_windows(data: Data, tokenizer: Any, seq_len: int, purpose: str = "text", column: str | None = None) -> Windows:
    """Windows of token ids from any kind of data.

    Args:
        data: a file (UTF-8 text; `.jsonl`, `.json` and `.parquet` are read as documents), a list of texts or conversations,
            integers (n, tokens), or an iterable of such tensors or of dicts with `input_ids`.
        tokenizer: encodes text; None is enough for token ids.
        seq_len: tokens of a window of text. Token ids keep the length that they have.
        purpose: what the data are for, as errors should say it.
        column: the field of records that holds text; see `arrondi.measure.documents`.

    Raises:
        FileFormatError: the file is missing or cannot be read as text.
        DataError: the data are of another kind, are shorter than one window, are of several lengths, or are padded.
    """
    if isinstance(data, str) and "\n" in data:
        raise DataError(f"The {purpose} is one long string, where a path was expected. Put texts into a list.")
    if isinstance(data, (str, Path)):
        path = Path(data)
        documents, raw = read_documents(path, purpose, column)
        ids, lengths = _ids_of(documents, tokenizer, seq_len, purpose, str(path))
        return Windows(ids, path.name, hashlib.sha256(raw).hexdigest(), lengths)
    if reads_text(data):
        given = [as_document(text, f"Text {i} of the {purpose}", column) for i, text in enumerate(data, 1)]
        texts = with_text(given, f"The {purpose}")
        digest = hashlib.sha256(json.dumps(texts, default=str).encode()).hexdigest()
        ids, lengths = _ids_of(texts, tokenizer, seq_len, purpose, f"{len(texts)} texts")
        return Windows(ids, f"{len(texts)} texts", digest, lengths)
    ids = _token_ids(data, purpose)
    digest = hashlib.sha256(f"{tuple(ids.shape)}".encode() + ids.numpy().tobytes()).hexdigest()
    return Windows(ids, f"{len(ids)} windows of token ids", digest)


def chosen(windows: Windows, samples: int, seed: int) -> Windows:
    """At most so many windows, drawn without replacement, in their order."""
    picked = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    return replace(windows, ids=windows.ids[picked])


def check_windows(windows: Windows, model: Any) -> None:
    """Refuse token ids that a transformers model does not have, and windows longer than it takes.

    Raises:
        DataError: says which, and how many the model has.
    """
    check_vocabulary(int(windows.ids.max()), windows.source, model)
    positions = positions_of(model)
    if positions is not None and windows.seq_len > positions:
        raise DataError(
            f"{windows.source}: windows of {windows.seq_len} tokens, but the model has {positions} positions. Give shorter windows."
        )


def check_vocabulary(token: int, source: str, model: Any) -> None:
    """Refuse the largest token id of a text that a transformers model does not have.

    Raises:
        DataError: says how many it has.
    """
    vocabulary = vocabulary_of(model)
    if vocabulary and token >= vocabulary:
        raise DataError(
            f"{source} has token {token}, but the model knows {vocabulary}. Tokenizer and model do not belong together."
        )


def vocabulary_of(model: Any) -> int | None:
    """How many tokens a transformers model knows, None where its config does not say."""
    known = getattr(model.config.get_text_config(), "vocab_size", None)
    return known if isinstance(known, int) and known > 0 else None


def _ids_of(
    documents: Sequence[Document], tokenizer: Any, seq_len: int, purpose: str, where: str
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Windows, and the tokens of every document."""
    if tokenizer is None:
        raise DataError(f"{where}: text as {purpose}, and no tokenizer to read it. Give token ids, or a tokenizer.")
    encoded = encode(write_out(documents, tokenizer, where), tokenizer)
    ids = join(encoded, tokenizer)
    return cut(ids, tokenizer, seq_len, f"{where}: {len(ids)} tokens of {purpose}"), tuple(map(len, encoded))


def _token_ids(data: Any, purpose: str) -> torch.Tensor:
    """(n, tokens) int64 on the CPU from a tensor, an array, or an iterable of batches."""
    if isinstance(data, (torch.Tensor, np.ndarray, Mapping)):
        batches = [data]
    else:
        try:
            batches = list(data)
        except TypeError:
            raise DataError(f"The {purpose} is {_kind(data)}. {_KINDS}.") from None
    rows = [_batch(batch, f"Batch {i + 1} of the {purpose}") for i, batch in enumerate(batches)]
    if not rows or not sum(map(len, rows)):
        raise DataError(f"The {purpose} holds no batch. {_KINDS}.")
    lengths = sorted({row.shape[1] for row in rows})
    if len(lengths) > 1:
        raise DataError(
            f"The {purpose} has windows of {lengths[0]} and of {lengths[-1]} tokens. Give windows of one length."
        )
    if lengths[0] < 2:
        raise DataError(f"The {purpose} has windows of {lengths[0]} tokens. Give at least 2 in each.")
    return torch.cat(rows)


def _batch(batch: Any, what: str) -> torch.Tensor:
    """One batch: token ids, a dict that has them, or the first of a tuple (as TensorDataset gives them)."""
    mask = None
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            found = ", ".join(map(repr, list(batch)[:5])) or "no fields"
            raise DataError(f"{what} is a dict without 'input_ids': it has {found}. {_KINDS}.")
        batch, mask = batch["input_ids"], batch.get("attention_mask")
    elif isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], torch.Tensor):
        if len(batch) > 1:
            raise DataError(f"{what} has {len(batch)} parts. Give the token ids alone, or a dict with 'input_ids'.")
        batch = batch[0]
    if isinstance(batch, str):
        raise DataError(f"{what} is a text. Put texts, and nothing else, into a list.")
    try:
        ids = torch.as_tensor(batch)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"{what} is {_kind(batch)}. {_KINDS}.") from None
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise DataError(f"{what} holds {ids.dtype} where token ids are integers. {_KINDS}.")
    if ids.ndim == 1:
        ids = ids.unsqueeze(0)
    if ids.ndim != 2:
        raise DataError(f"{what} has the shape {tuple(ids.shape)}. {_KINDS}.")
    if mask is not None and not bool(torch.as_tensor(mask).bool().all()):
        raise DataError(f"{what} is padded: its attention_mask has zeros. Give windows that are full of text.")
    ids = ids.detach().to("cpu", torch.long)
    if ids.numel() and int(ids.min()) < 0:
        raise DataError(f"{what} has the token id {int(ids.min())}. Token ids are 0 or more.")
    return ids


def _kind(value: Any) -> str:
    return f"of the type {type(value).__name__}"
