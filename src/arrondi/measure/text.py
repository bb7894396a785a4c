"""Text and tokens: the tokenizer of a model, and how windows are cut.

The protocol, the same for calibration and for measuring: documents are encoded without special tokens, joined by the tokenizer's
end token where there are several, and cut into windows that do not overlap, the last partial one dropped. Each window gets
what the tokenizer's own texts start and end with: BOS in front where the tokenizer has one, CLS … SEP for encoders. A window
with its special tokens is `seq_len` long, and every token but the first is predicted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.checkpoint.containers.tokenizer import tokenizer_of
from arrondi.errors import DataError, FileFormatError

_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        FileFormatError: there is none, or it cannot be read.
    """
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise FileFormatError(
            f"{folder}: no tokenizer files. Copy tokenizer.json and tokenizer_config.json there; text cannot be read without them."
        )
    return tokenizer_of(folder, lambda t: t.decode(join(encode(["One text, ", "and another."], t), t)))


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
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None)
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


def encode(documents: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of every document."""
    return [list(tokenizer(d, add_special_tokens=False, verbose=False)["input_ids"]) for d in documents]


def join(documents: Sequence[Sequence[int]], tokenizer: Any) -> list[int]:
    """Token ids of all documents, joined by the tokenizer's end token (or SEP) where it has one."""
    ends = [getattr(tokenizer, name, None) for name in ("eos_token_id", "sep_token_id")]
    end = next((e for e in ends if e is not None), None)
    ids: list[int] = []
    for i, document in enumerate(documents):
        if i and end is not None:
            ids.append(end)
        ids += document
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
