"""The tokenizer of a model directory, as transformers has it: `tokenizer_of`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from arrondi.checkpoint.containers.descriptors import reraise_exhaustion
from arrondi.errors import FileFormatError

_PANIC: Final = "PanicException"
"""What the library tokenizers raises where its compiled code breaks off; it is no Exception."""


def tokenizer_of(folder: Path, tried: Callable[[Any], object] = lambda tokenizer: tokenizer("One text.")) -> Any:
    """The tokenizer, after it has cut a text.

    Args:
        folder: the directory.
        tried: does something with it; some errors show only then.

    Raises:
        FileFormatError: transformers does not load it, or it cuts no text.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tried(tokenizer)
        return tokenizer
    except BaseException as error:  # whatever a broken tokenizer raises, it is the file that is wrong
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        reraise_exhaustion(error)
        reason = str(error).strip().partition("\n")[0]
        raise FileFormatError(
            f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {reason}). Take its files from the original model."
        ) from error
