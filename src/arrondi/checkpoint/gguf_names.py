"""What a stored weight of a transformers model is called in GGUF, by the tables of GGUF's own package.

Owns: `GGUFNames`. The tables say for every architecture which names tensors have in the files of its makers. An architecture that is
called like the model's `model_type` is asked first; for all others the name that most architectures agree on is taken.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from itertools import combinations
from typing import Any, Final

from arrondi.checkpoint.containers.gguf.tables import own_tables

_JOINED: Final = "gate_up_proj"
_PARTS: Final = ("gate_proj", "up_proj")
"""A stack of experts that holds both matrices in one tensor; GGUF files may hold them apart."""


class GGUFNames:
    """Names of weights in GGUF.

    Args:
        model_type: as config.json names the model.
    """

    def __init__(self, model_type: str) -> None:
        import gguf

        self.gguf = gguf
        known = self.gguf.MODEL_ARCH_NAMES
        self._own = [self._map(arch) for arch, name in known.items() if _plain(name) == _plain(model_type)]

    @cached_property
    def _all(self) -> list[Any]:
        """The tables of every architecture."""
        return [self._map(arch) for arch in self.gguf.MODEL_ARCH_NAMES]

    def _map(self, arch: Any) -> Any:
        with own_tables():
            return self.gguf.get_tensor_name_map(arch, 1)  # of block 0; other numbers are put in afterwards

    def of(self, tensor: str) -> tuple[str, ...]:
        """What a weight may be called, the usual name first; () for weights that GGUF does not know."""
        found = dict.fromkeys(self._spelled(tensor))
        if _JOINED in tensor and ".experts" in tensor:
            for part in _PARTS:
                found |= dict.fromkeys(self._spelled(tensor.replace(_JOINED, part)))
        return tuple(f"{name}.weight" for name in found)

    def knows(self, name: str) -> bool:
        """Whether this is a name of GGUF at all, whatever the block."""
        stem = re.sub(r"\d+", "{bid}", name.removesuffix(".weight"), count=1)
        return (
            stem in set(self.gguf.TENSOR_NAMES.values())
            or name.removesuffix(".weight") in self.gguf.TENSOR_NAMES.values()
        )

    def _spelled(self, tensor: str) -> Iterator[str]:
        for key, block in _keys(tensor.removesuffix(".weight")):
            best = next((n for m in self._own if (n := m.get_name(key))), None)
            if best is None and (named := [n for m in self._all if (n := m.get_name(key))]):
                best = Counter(named).most_common(1)[0][0]
            if best is not None:
                yield re.sub(r"\d+", block, best, count=1)
                return


def _keys(stem: str) -> Iterator[tuple[str, str]]:
    """The names under which the tables may have a weight, as of block 0, and its block.

    Without the number of an expert, and without leading parts that wrappers add.
    """
    parts = stem.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    block = parts[numbers[0]] if numbers else ""
    parts = ["0" if i in numbers else part for i, part in enumerate(parts) if i not in numbers[1:]]
    front = numbers[0] if numbers else max(len(parts) - 1, 0)
    for size in range(front, -1, -1):
        for kept in combinations(range(front), size):
            yield ".".join([*(parts[i] for i in kept), *parts[front:]]), block


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def blocks_of(config: dict[str, Any]) -> int:
    """How many blocks a config names; 0 where it does not."""
    for part in (config, config.get("text_config") or {}):
        for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            if isinstance(part.get(key), int):
                return int(part[key])
    return 0
