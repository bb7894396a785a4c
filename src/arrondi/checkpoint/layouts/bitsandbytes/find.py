"""The quantized layers of a bitsandbytes file.

Owns: `find`. A weight of 4 bits is found by its note, one of 8 bits by its scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from arrondi.checkpoint.layouts.beside import check_beside, groups_of, linear, shape_of
from arrondi.checkpoint.layouts.bitsandbytes import blocks, rows
from arrondi.checkpoint.layouts.bitsandbytes.config import read_config
from arrondi.checkpoint.layouts.bitsandbytes.state import KINDS
from arrondi.checkpoint.layouts.classes import conv1d_paths, is_conv1d
from arrondi.checkpoint.layouts.layout import Names, Placed, Reader
from arrondi.errors import FileFormatError
from arrondi.formats import LayerScheme

_EIGHT: Final = ("SCB", "weight_format")
_BESIDE: Final = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


def find(config: Mapping[str, Any], names: Names, read: Reader) -> list[Placed]:
    """Every quantized layer of a checkpoint.

    Args:
        config: config.json.
        names: every stored tensor.
        read: gives a stored tensor; only notes and tables are read, and scales in 8 bits.

    Raises:
        FileFormatError: the config and the files contradict each other, or say what is not known here.
    """
    said = read_config(config["quantization_config"])
    turned = conv1d_paths(config)
    placed = []
    for path in groups_of(names, _EIGHT, (*_EIGHT, "weight")):
        shape = shape_of(names, f"{path}.weight", 2)
        scheme = LayerScheme(rows.WEIGHTS, rows.inputs_of(said.threshold))
        placed.append(linear(path, shape, scheme, is_conv1d(path, turned)))
    for kind in KINDS:
        ending = f".{blocks.NOTE}{kind}"
        for path in [n.removesuffix(ending) for n in names if n.endswith(ending)]:
            placed.append(blocks.place(path, names, read, kind, is_conv1d(path, turned)))
            if kind != said.kind and not said.eight:
                raise FileFormatError(f"bnb_4bit_quant_type is {said.kind!r}, but {path} is stored as {kind!r}.")
    wrong = next((p for p in placed if rows.has(p) != said.eight), None)
    if wrong is not None:
        raise FileFormatError(
            f"the config says {'8' if said.eight else '4'} bits, but {wrong.name} is stored otherwise."
        )
    check_beside(placed, [s for p in placed for s in _specs(p)], names)
    lost = next((n for n in names if n.endswith(_BESIDE) and not any(n.startswith(f"{p.name}.") for p in placed)), None)
    if lost is not None:
        raise FileFormatError(f"{lost} is stored, but no note says what its weight is. Is one missing, or misnamed?")
    return placed


def _specs(placed: Placed) -> Any:
    return rows.specs(placed) if rows.has(placed) else blocks.specs(placed)
