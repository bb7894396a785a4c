"""What a model directory says about generating: `read_generation_config` and `end_tokens`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arrondi.errors import FileFormatError


def read_generation_config(folder: Path) -> Any:
    """transformers' `GenerationConfig` of a model directory; None if it has no generation_config.json.

    Raises:
        FileFormatError: transformers does not read the file.
    """
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if not file.exists():
        return None
    try:
        found = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever transformers raises, it is the file that is wrong
        said = str(error).partition("\n")[0][:200]
        raise FileFormatError(
            f"{file}: transformers does not read it ({type(error).__name__}: {said}). Mend the file or delete it."
        ) from error
    _tokens(found.eos_token_id, f"{file}: eos_token_id")
    return found


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a text, as the model's generation settings or its tokenizer name them.

    Raises:
        FileFormatError: they name something else than numbers of tokens.
    """
    named = _tokens(model.generation_config.eos_token_id, "eos_token_id of the model's config")
    if named is None:
        named = _tokens(tokenizer.eos_token_id, "eos_token_id of the tokenizer")
    return named or set()


def _tokens(named: Any, where: str) -> set[int] | None:
    if named is None:
        return None
    numbers = named if isinstance(named, list) else [named]
    if any(type(n) is not int for n in numbers):
        raise FileFormatError(f"{where} must be the number of a token or a list of them, got {str(named)[:100]}.")
    return set(numbers)
