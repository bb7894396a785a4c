"""The tokenizer that a header describes: transformers' own reading of it, with what that takes from the architecture instead.

Owns: `tokenizer_of_header`.
"""

from __future__ import annotations

import json
from typing import Any

from arrondi.checkpoint.containers.gguf.header import Header
from arrondi.checkpoint.containers.gguf.splits import cut_named
from arrondi.checkpoint.containers.gguf.stand_in import readable
from arrondi.checkpoint.containers.gguf.tokens import SPACE


def tokenizer_of_header(header: Header) -> Any:
    """A tokenizer of transformers; raises whatever transformers raises where it cannot make one."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with readable(header) as path:
        found = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    document: dict[str, Any] = json.loads(found.backend_tokenizer.to_str())
    model = header.value("tokenizer.ggml.model")
    if model == "llama":
        _put_spaces(document, bool(header.value("tokenizer.ggml.add_space_prefix", True)))
    elif model == "gpt2":
        document |= _byte_pairs(header)
    else:
        return found
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(document)),
        chat_template=found.chat_template,
        **found.special_tokens_map,
    )


def _put_spaces(document: dict[str, Any], prefixed: bool) -> None:
    """The space before texts that the header asks for, or none; transformers goes by the kind of the vocabulary."""
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] if prefixed else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    document |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}


def _byte_pairs(header: Header) -> dict[str, Any]:
    """All but what is put before and after texts: transformers dresses the vocabulary in the class of the architecture, whatever its kind is."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer

    with readable(header) as path:
        architecture, described, _ = get_gguf_tokenizer(str(path))
    document: dict[str, Any] = json.loads(convert_gguf_tokenizer(architecture, described)[0].to_str())
    document.pop("post_processor", None)
    before, whole = cut_named(str(header.value("tokenizer.ggml.pre", "")))
    if before is not None:
        document["pre_tokenizer"] = before
    document["model"]["ignore_merges"] = whole
    return document
