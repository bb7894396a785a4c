"""Weights of a graph that are stored in few bits, whatever file the graph is in: `Packed`, and the view of a model directory made of them.

A packed weight has a form, which says how its codes lie:

    linear   codes as a tensor of a few-bit type, whose scale covers the tensor, an index of an axis, or a block along it
    blocks   rows of blocks of inputs, each block padded to bytes, its codes counted from zero (MatMulNBits)
    bnb4     one stream of codes of four bits, the first in the high half of a byte (MatMulBnb4)

Its parts are entries under the weight's name with the ends `_quantized`, `_scale`, `_zero_point` and `_g_idx`; what else is to be known is in `weights`
of the view's `quantization_config`, which the layout reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from arrondi.checkpoint.containers.tensor_file import Entry

CODES: Final = "_quantized"
SCALE: Final = "_scale"
ZERO: Final = "_zero_point"
INDEX: Final = "_g_idx"


@dataclass(frozen=True)
class Packed:
    """A weight in few bits.

    Attributes:
        name: of the weight.
        facts: `form`, `type` (`int4`, `uint8`, `nf4`, …), `shape`, and, where they are not the usual ones, `axis`, `block`, `kind`, `transposed`.
        parts: end of the name → where it lies.
    """

    name: str
    facts: Mapping[str, Any]
    parts: Mapping[str, Entry]


def directory_of(
    method: str, packed: Iterable[Packed], plain: Mapping[str, Entry]
) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The `quantization_config` and the entries of a model directory that holds these weights; no config where nothing is packed."""
    entries = dict(plain)
    facts: dict[str, Any] = {}
    for weight in packed:
        facts[weight.name] = dict(weight.facts)
        entries |= {weight.name + end: entry for end, entry in weight.parts.items()}
    return ({"quant_method": method, "version": 1, "weights": facts} if facts else {}), entries
