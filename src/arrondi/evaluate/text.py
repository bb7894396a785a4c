"""Text → windows of token ids, the same way for calibration and for measuring.

The protocol: the whole file is encoded without special tokens and cut into windows that do not overlap, the last partial one
dropped. Each window gets what the tokenizer's own texts start and end with: BOS in front where the tokenizer has one,
CLS … SEP for encoders. A window with its special tokens is `seq_len` long, and every token but the first is predicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arrondi.errors import DataError, FileFormatError


@dataclass(frozen=True)
class Windows:
    """Token ids (windows, seq_len) with the file that they came from."""

    ids: torch.Tensor
    source: str
    text_hash: str

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, size: int) -> list[torch.Tensor]:
        """The windows in batches of `size`, the last one smaller."""
        return list(self.ids.split(max(size, 1)))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        FileFormatError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if not any(
        (folder / n).exists()
        for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    ):
        raise FileFormatError(
            f"{folder}: no tokenizer files. Copy tokenizer.json and tokenizer_config.json there; text cannot be read without them."
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a broken tokenizer raises, it is the file that is wrong
        raise FileFormatError(f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {error}).") from error


def read_windows(path: str | Path, tokenizer: Any, seq_len: int, purpose: str = "text") -> Windows:
    """Cut a text file into windows.

    Raises:
        FileFormatError: the file is missing or not UTF-8 text.
        DataError: it is shorter than one window; the message says how long it is.
    """
    import hashlib

    path = Path(path)
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except FileNotFoundError as error:
        raise FileFormatError(f"{path}: no such file. Give a UTF-8 text file as {purpose}.") from error
    except IsADirectoryError as error:
        raise FileFormatError(f"{path}: a directory. Give a UTF-8 text file as {purpose}.") from error
    except UnicodeDecodeError as error:
        raise FileFormatError(
            f"{path}: not UTF-8 text (byte {error.start}). Give a plain text file as {purpose}."
        ) from error
    prefix, suffix = special_tokens(tokenizer)
    body = seq_len - len(prefix) - len(suffix)
    if body < 1:
        raise DataError(f"A window of {seq_len} tokens has no room beside its special tokens. Use a larger --seq-len.")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // body
    if count == 0:
        raise DataError(
            f"{path}: {len(ids)} tokens of {purpose}, but one sample takes {body}. Give a longer text or a smaller --seq-len."
        )
    rows = torch.tensor(ids[: count * body], dtype=torch.long).reshape(count, body)
    parts = [torch.tensor(s, dtype=torch.long).expand(count, len(s)) for s in (prefix, suffix)]
    return Windows(torch.cat([parts[0], rows, parts[1]], dim=1), path.name, hashlib.sha256(raw).hexdigest())


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What stands before and after every window."""
    if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
        return [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    return ([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]), []


def protocol(tokenizer: Any, seq_len: int) -> str:
    """One sentence that goes beside every number."""
    prefix, suffix = special_tokens(tokenizer)
    start = "CLS and SEP around" if suffix else "BOS before" if prefix else "nothing before"
    return f"non-overlapping windows of {seq_len - len(prefix) - len(suffix)} tokens, {start} each, every token of a window predicted once"
