"""The tables of names of the package gguf, each as its makers wrote it.

Owns: `own_tables`. Whoever asks the package for the names of one architecture leaves them in those of all that are asked for later, so
whatever uses its tables does so inside of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def own_tables() -> Iterator[None]:
    """While this lasts, names of architectures are asked for; afterwards the tables are what they were."""
    from gguf.tensor_mapping import TensorNameMap

    shared = TensorNameMap.block_mappings_cfg
    before = dict(shared)
    try:
        yield
    finally:
        shared.clear()
        shared.update(before)
