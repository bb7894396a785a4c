"""What HQQ keeps beside the codes of a layer: its metadata, each word a small tensor.

Owns: `Facts`, the tensors of it both ways, and how it is kept in `Placed.storage`. Whole numbers are int32, yes and no uint8, words the
bytes of their letters.

Source: hqq 0.2.8, `core/quantize.py` (`HQQLinear.state_dict`) and `core/utils.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

import torch

from arrondi.checkpoint.layouts.layout import Names, Reader
from arrondi.errors import FileFormatError

PACKINGS: Final[Mapping[float, tuple[str, int, int]]] = {
    8: ("8bit_u8", 1, 8), 6: ("8bit_u8", 1, 8), 5: ("8bit_u8", 1, 8), 4: ("4bit_u8", 2, 4), 3: ("3bit_32", 10, 3), 2: ("2bit_u8", 4, 2),
    1.58: ("2bit_u8", 4, 2), 1: ("1bit_u8", 8, 1),
}  # fmt: skip
"""Bits → the name of the packing, codes in a word, bits that each has there. Words are bytes, and int32 of three bits."""
_TYPES: Final = ("torch.float32", "torch.bfloat16", "torch.float16")
_LONGEST: Final = 64
"""Letters of a word; every real one has a third of it."""


@dataclass(frozen=True)
class Facts:
    """The metadata of one layer; None: the file does not say it.

    Attributes:
        nbits: 8, 6, 5, 4, 3, 2, 1.58 or 1.
        group_size: numbers that share a scale.
        axis: 1: they follow each other in the flattened matrix. 0: they are a column of it, folded into `group_size` rows.
        view_as_float: the packed codes are stored in the clothes of `compute_dtype`.
        compute_dtype: the type in which the package restores the weight.
        optimize, round_zero: how the package found the grid.
        channel_wise, quant_scale, quant_zero, offload_meta, encoded_state_dict, stores_quant_config, unpack_view_dtype: said by every
            file of a recent release, and always the same but for `offload_meta`.
    """

    nbits: float
    group_size: int
    axis: int = 1
    view_as_float: bool | None = False
    compute_dtype: str | None = "torch.float16"
    optimize: bool | None = False
    round_zero: bool | None = False
    channel_wise: bool | None = True
    quant_scale: bool | None = False
    quant_zero: bool | None = False
    offload_meta: bool | None = False
    encoded_state_dict: bool | None = True
    stores_quant_config: bool | None = True
    unpack_view_dtype: str | None = "torch.uint8"

    @property
    def packing(self) -> tuple[str, int, int]:
        return PACKINGS[self.nbits]

    @property
    def word(self) -> torch.dtype:
        """The type of packed words."""
        return torch.int32 if self.nbits == 3 else torch.uint8

    @property
    def whole_zeros(self) -> bool:
        """Whether the package rounded the zero points, and did not move them afterwards."""
        return self.round_zero is True and self.optimize is False

    def tensors(self, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """All of it as the package stores it, with the shape of the weight."""
        said = {f.name: _stored(getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None}
        return said | {"packing": _stored(self.packing[0]), "shape": torch.tensor(shape)}

    def text(self) -> str:
        """The same for `Placed.storage`."""
        return json.dumps(asdict(self))

    @classmethod
    def of_text(cls, text: str) -> Facts:
        """The inverse of `text`."""
        return cls(**json.loads(text))


def usual(nbits: float, group_size: int, dtype: str, whole: bool) -> Facts:
    """What is written of layers that come from elsewhere; `whole`: with zero points that are codes."""
    word = "torch.int32" if nbits == 3 else "torch.uint8"
    return replace(Facts(nbits, group_size), compute_dtype=f"torch.{dtype}", round_zero=whole, unpack_view_dtype=word)


def read_facts(path: str, names: Names, read: Reader) -> tuple[Facts, tuple[int, int]]:
    """The metadata of a layer, and the shape of its weight.

    Raises:
        FileFormatError: a part is missing, or says what is not known here.
    """
    found: dict[str, Any] = {}
    for name, kind in (*_KINDS.items(), ("packing", _letters), ("shape", _sizes)):
        if (stored := f"{path}.{name}") in names:
            found[name] = kind(stored, _small(stored, names, read))
    missing = next((n for n in ("nbits", "group_size", "axis", "packing", "shape") if n not in found), None)
    if missing is not None:
        raise FileFormatError(f"{path}.{missing} is missing, though {path}.W_q is stored.")
    packing, shape = found.pop("packing"), found.pop("shape")
    facts = Facts(**{**dict.fromkeys(_KINDS), **found})
    for name, allowed in _ALLOWED.items():
        if getattr(facts, name) not in allowed:
            raise FileFormatError(f"{path}.{name} is {getattr(facts, name)!r}, which is not read here.")
    for name, wanted in (("packing", facts.packing[0]), ("unpack_view_dtype", str(facts.word))):
        said = packing if name == "packing" else facts.unpack_view_dtype
        if said not in (wanted, None):
            raise FileFormatError(
                f"{path}.{name} is {said!r}, but codes of {facts.nbits:g} bits are packed as {wanted!r}."
            )
    if facts.view_as_float and facts.compute_dtype is None:
        raise FileFormatError(f"{path}.compute_dtype is missing, though its codes are stored in that type.")
    if not 0 < facts.group_size <= shape[0] * shape[1] or shape[0] * shape[1] % facts.group_size:
        raise FileFormatError(f"{path}.group_size is {facts.group_size}, which does not divide a matrix {shape}.")
    return facts, shape


_ALLOWED: Final[Mapping[str, tuple[Any, ...]]] = {
    "nbits": tuple(PACKINGS), "axis": (0, 1), "compute_dtype": (None, *_TYPES), "channel_wise": (None, True), "quant_scale": (None, False),
    "quant_zero": (None, False), "encoded_state_dict": (None, True),
}  # fmt: skip
"""What a word may say. Scales that are quantized in turn were given up by the package, which never saved them in this form."""


def _stored(value: object) -> torch.Tensor:
    if isinstance(value, str):
        return torch.tensor(list(value.encode()), dtype=torch.uint8)
    if isinstance(value, bool):
        return torch.tensor(int(value), dtype=torch.uint8)
    return torch.tensor(value, dtype=torch.float32 if isinstance(value, float) and value % 1 else torch.int32)


def _small(name: str, names: Names, read: Reader) -> torch.Tensor:
    shape = names[name][1]
    if len(shape) > 1 or (shape and not 0 < shape[0] <= _LONGEST):
        raise FileFormatError(f"{name} should be a number or a short word, found the shape {shape}.")
    return read(name)


def _number(name: str, stored: torch.Tensor) -> float:
    if stored.ndim or stored.dtype not in (torch.int32, torch.float32):
        raise FileFormatError(f"{name} should be one number, found {stored.dtype} {tuple(stored.shape)}.")
    value = float(stored)
    return next((n for n in PACKINGS if torch.tensor(n) == stored and n % 1), value)


def _whole(name: str, stored: torch.Tensor) -> int:
    if stored.ndim or stored.dtype != torch.int32:
        raise FileFormatError(f"{name} should be a whole number, found {stored.dtype} {tuple(stored.shape)}.")
    return int(stored)


def _flag(name: str, stored: torch.Tensor) -> bool:
    if stored.ndim or stored.dtype != torch.uint8 or int(stored) > 1:
        raise FileFormatError(f"{name} should be 0 or 1, found {stored.dtype} {stored.tolist()}.")
    return bool(stored)


def _letters(name: str, stored: torch.Tensor) -> str:
    if stored.ndim != 1 or stored.dtype != torch.uint8:
        raise FileFormatError(f"{name} should be a word as bytes, found {stored.dtype} {tuple(stored.shape)}.")
    return bytes(stored.tolist()).decode("latin-1")


def _sizes(name: str, stored: torch.Tensor) -> tuple[int, int]:
    sizes = stored.tolist() if stored.dtype == torch.int64 and tuple(stored.shape) == (2,) else []
    if len(sizes) != 2 or not all(0 < n < 2**31 for n in sizes):
        raise FileFormatError(f"{name} should be the two sizes of a matrix, found {stored.dtype} {stored.tolist()}.")
    return sizes[0], sizes[1]


_KINDS: Final[Mapping[str, Callable[[str, torch.Tensor], Any]]] = {
    f.name: {"nbits": _number, "group_size": _whole, "axis": _whole, "compute_dtype": _letters, "unpack_view_dtype": _letters}.get(f.name, _flag)
    for f in fields(Facts)
}  # fmt: skip
