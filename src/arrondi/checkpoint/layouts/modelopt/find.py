"""The quantized layers of a ModelOpt file.

Owns: `find`. A weight is quantized where a scale lies beside it; the config says by which algorithm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from arrondi.checkpoint.layouts.beside import check_beside, linear, shape_of
from arrondi.checkpoint.layouts.layout import Names, Placed, Reader
from arrondi.checkpoint.layouts.modelopt.config import Said, read_config
from arrondi.checkpoint.layouts.modelopt.storage import specs
from arrondi.errors import FileFormatError

_SCALES: Final = (".weight_scale", ".weight_scale_2", ".input_scale")
_SMOOTHED: Final = ".pre_quant_scale"


def find(config: Mapping[str, Any], names: Names, read: Reader) -> list[Placed]:
    """Every quantized layer of a checkpoint.

    Args:
        config: config.json.
        names: every stored tensor.
        read: not used; types and shapes tell all.

    Raises:
        FileFormatError: the config and the files contradict each other, or say what is not known here.
    """
    said, each = read_config(config["quantization_config"])
    smoothed = next((n for n in names if n.endswith(_SMOOTHED)), None)
    if smoothed is not None:
        raise FileFormatError(
            f"{smoothed}: the inputs of this layer are multiplied by it first (AWQ, SmoothQuant), which is not read here. "
            "Export without it, or give the original model."
        )
    placed = []
    for path in [n.removesuffix(_SCALES[0]) for n in names if n.endswith(_SCALES[0])]:
        own = said if said is not None else each.get(path)
        if own is None:
            raise FileFormatError(f"{path}.weight_scale is stored, but quantized_layers says nothing of {path}.")
        placed.append(_placed(path, own, names))
    lost = sorted(each.keys() - {p.name.removesuffix(".weight") for p in placed})
    if lost:
        raise FileFormatError(f"quantized_layers names {lost[0]}, of which no weight_scale is stored.")
    consumed = [s for p in placed for s in specs(p)]
    stray = {n for n in names if n.endswith(_SCALES)} - {name for name, _, _ in consumed}
    if stray:
        raise FileFormatError(f"{min(stray)} is stored, but no weight that quant_algo describes has it.")
    check_beside(placed, consumed, names)
    return placed


def _placed(path: str, said: Said, names: Names) -> Placed:
    rows, columns = shape_of(names, f"{path}.weight", 2)
    name = said.kind.scheme.weights.format.name
    rows, columns = rows * (2 if name == "int4" else 1), columns * (2 if name == "fp4_e2m1" else 1)
    size = said.size
    if name == "int4" and not size:  # newer files say it nowhere but here
        groups = shape_of(names, f"{path}{_SCALES[0]}", 2)[1]
        size = columns // groups
        if size * groups != columns:
            raise FileFormatError(f"{path}.weight_scale has {groups} groups, which do not divide {columns} columns.")
    if size and columns % size:
        raise FileFormatError(
            f"{path}.weight has {columns} columns, which groups of {size} (group_size) do not divide."
        )
    return linear(path, (rows, columns), said.kind.sized(size or 1), turned=False)
