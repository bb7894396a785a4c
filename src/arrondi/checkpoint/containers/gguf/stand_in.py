"""A file in the place of one that the package gguf does not read, with the same header and tensors of one number: `readable`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arrondi.checkpoint.containers.gguf.encode import GGUFPlan, GGUFWriter
from arrondi.checkpoint.containers.gguf.header import Header
from arrondi.checkpoint.containers.gguf.ik import IK_TYPES


@contextmanager
def readable(header: Header) -> Iterator[Path]:
    """A file of which transformers reads config and tokenizer: the one that the header is of, unless it has types of ik_llama.cpp."""
    if not any(stored.type in IK_TYPES for stored in header.tensors.values()):
        yield header.path
        return
    with tempfile.TemporaryDirectory(prefix="arrondi-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / header.path.name
        GGUFWriter(path, GGUFPlan(header.fields, dict.fromkeys(header.tensors, ("F32", (1,))))).publish()
        yield path
