"""The quantized layers of a GPTQ file.

Owns: `find`. A layer is found by its tensors; the config says what they mean, and must fit them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch

from arrondi.checkpoint.layouts.beside import check_beside, groups_of, placed_under, shape_of
from arrondi.checkpoint.layouts.classes import conv1d_paths, is_conv1d
from arrondi.checkpoint.layouts.gptq.config import is_head, read_config
from arrondi.checkpoint.layouts.gptq.storage import plain_index, specs, usual
from arrondi.checkpoint.layouts.layout import Names, Placed, Reader
from arrondi.errors import FileFormatError

_LEAVES: Final = ("qweight", "qzeros", "scales", "g_idx")


def find(config: Mapping[str, Any], names: Names, read: Reader) -> list[Placed]:
    """Every quantized layer of a checkpoint.

    Args:
        config: config.json.
        names: every stored tensor.
        read: gives a stored tensor; only indexes of groups are read.

    Raises:
        FileFormatError: the config and the files contradict each other, or say what is not known here.
    """
    known = read_config(config["quantization_config"])
    turned = conv1d_paths(config)
    placed = []
    for path in groups_of(names, _LEAVES, _LEAVES):
        scheme = known.scheme_of(path)
        if scheme is None:
            raise FileFormatError(f"a rule of dynamic says that {path} is not quantized, but it is stored so.")
        if is_head(path) and not known.head:
            raise FileFormatError(f"lm_head is false, but {path} is stored quantized.")
        (columns,), rows = shape_of(names, f"{path}.g_idx", 1), shape_of(names, f"{path}.scales", 2)[1]
        found = placed_under(path, (rows, columns), scheme, names, is_conv1d(path, turned))
        found = replace(found, storage=usual(scheme, known.format))
        if names[f"{path}.g_idx"][0] == "I32":
            found = replace(found, indexed=not torch.equal(read(f"{path}.g_idx"), plain_index(found)))
        placed.append(found)
    check_beside(placed, [s for p in placed for s in specs(p)], names)
    return placed
