"""What bitsandbytes notes beside a weight of 4 bits, as JSON in a tensor of bytes.

Owns: `State`, its text both ways, and how it is kept in `Placed.storage`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from arrondi.checkpoint.layouts.claims import Claims
from arrondi.errors import FileFormatError

KINDS: Final[Mapping[str, str]] = {"nf4": "nf4", "fp4": "fp4_bnb"}
"""The package's word → our format."""
SIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_TYPES: Final = ("float32", "bfloat16", "float16")
_LONGEST: Final = 4096
"""Bytes of a note; every real one has a tenth of it."""
_NUMBER: Final = 25
"""Characters that a float64 needs at most."""


@dataclass(frozen=True)
class State:
    """The note of one weight.

    Attributes:
        kind: "nf4" or "fp4".
        size: elements of a block.
        dtype: the type in which the package restores the weight.
        shape: (out, in).
        nested: elements of a block of scales, 0 where these are float32.
        offset: the mean of the scales, of nested ones.
        length: bytes of the text; longer than it needs to be, it ends with spaces.
    """

    kind: str
    size: int
    dtype: str
    shape: tuple[int, ...]
    nested: int = 0
    offset: float = 0.0
    length: int = 0

    @property
    def room(self) -> int:
        """Bytes that the text takes: enough for any offset where nothing else is asked for."""
        return self.length or len(self._text("0" * _NUMBER))

    def bytes(self) -> torch.Tensor:
        """The text as the package writes it, uint8, filled up with spaces."""
        text = self._text(json.dumps(self.offset))
        return torch.frombuffer(bytearray(text.ljust(self.room).encode()), dtype=torch.uint8)

    def _text(self, offset: str) -> str:
        facts: dict[str, Any] = {
            "quant_type": self.kind, "blocksize": self.size, "dtype": self.dtype, "shape": list(self.shape),
        }  # fmt: skip
        if self.nested:
            facts |= {"nested_blocksize": self.nested, "nested_dtype": "float32"}
        text = json.dumps(facts)
        return f'{text[:-1]}, "nested_offset": {offset}}}' if self.nested else text


def read_state(name: str, stored: torch.Tensor) -> State:
    """A note, checked.

    Raises:
        FileFormatError: it is no JSON object, or says what is not known here.
    """
    if stored.dtype != torch.uint8 or stored.ndim != 1 or len(stored) > _LONGEST:
        raise FileFormatError(f"{name} should be a short text as bytes, found {stored.dtype} {tuple(stored.shape)}.")
    try:
        value = json.loads(bytes(stored.tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{name} is no JSON: {error}.") from error
    claims = Claims(value, name)
    kind = claims.word("quant_type", None, KINDS)
    size = claims.number("blocksize", None, SIZES)
    dtype = claims.word("dtype", None, _TYPES)
    shape = claims.numbers("shape")
    nested = claims.number("nested_blocksize", 0)
    claims.only("nested_dtype", "float32")
    offset = claims.real("nested_offset", 0.0)
    claims.done()
    if len(shape) != 2 or not all(0 < n < 2**31 for n in shape):
        raise FileFormatError(f"{name}.shape is {shape}, but quantized weights are matrices.")
    return State(kind, size, dtype, tuple(shape), nested, offset, len(stored))
