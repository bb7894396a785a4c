"""The quantized layers of an HQQ file.

Owns: `find`. A layer is found by its codes, and everything that they mean stands beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from arrondi.checkpoint.layouts.beside import FLOATS, check_beside, groups_of, shape_of
from arrondi.checkpoint.layouts.hqq.config import is_channel, read_config
from arrondi.checkpoint.layouts.hqq.facts import read_facts
from arrondi.checkpoint.layouts.hqq.storage import as_read, as_written, granularity_of, specs
from arrondi.checkpoint.layouts.layout import Names, Placed, Reader
from arrondi.errors import FileFormatError
from arrondi.formats import FORMATS, LayerScheme, Scheme

_NEEDED: Final = ("W_q", "scale", "zero")
_ITS_OWN: Final = ("W_q", "nbits", "packing", "quant_scale", "quant_zero", "stores_quant_config", "encoded_state_dict")


def find(config: Mapping[str, Any], names: Names, read: Reader) -> list[Placed]:
    """Every quantized layer of a checkpoint.

    Args:
        config: config.json.
        names: every stored tensor.
        read: gives a stored tensor; only metadata is read, and zero points that the package rounded.

    Raises:
        FileFormatError: a layer contradicts itself, or says what is not known here.
    """
    sizes = read_config(config.get("quantization_config"))
    placed = [_place(path, sizes, names, read) for path in groups_of(names, _ITS_OWN, _NEEDED)]
    check_beside(placed, [s for p in placed for s in specs(p)], names)
    return placed


def _place(path: str, sizes: Mapping[str, int | None], names: Names, read: Reader) -> Placed:
    facts, shape = read_facts(path, names, read)
    kinds = {}
    for part in ("scale", "zero"):
        shape_of(names, f"{path}.{part}", 2)
        kinds[part] = FLOATS.get(names[f"{path}.{part}"][0], "e8m0")
        if kinds[part] == "e8m0":
            raise FileFormatError(
                f"{path}.{part} should hold floating-point numbers, found {names[f'{path}.{part}'][0]}."
            )
    format = FORMATS[f"uint{2 if facts.nbits < 2 else int(facts.nbits)}"]
    whole = facts.whole_zeros and _codes(read(f"{path}.zero"), format.qmax)
    granularity = granularity_of(facts, shape, is_channel(path, sizes))
    scheme = Scheme(format, granularity, "integer" if whole else "float", scale=kinds["scale"])
    storage = as_read(facts, str(kinds["zero"]))
    return as_written(Placed(f"{path}.weight", shape, LayerScheme(scheme), storage=storage))


def _codes(zero: torch.Tensor, highest: int) -> bool:
    """Whether every zero point is a code."""
    return bool(((zero == zero.round()) & (zero >= 0) & (zero <= highest)).all())
