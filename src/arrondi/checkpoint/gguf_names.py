"""What a stored weight of a transformers model is called in GGUF, by the tables of GGUF's own package.

Owns: `GGUFNames`. The tables say for every architecture which names tensors have in the files of its makers. An architecture that is
called like the model's `model_type` is asked first; for all others the name that most architectures agree on is taken.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import Any, Final

from arrondi.checkpoint.imatrix import gguf_package

_JOINED: Final = "gate_up_proj"
_PARTS: Final = ("gate_proj", "up_proj")
"""A stack of experts that holds both matrices in one tensor; GGUF files may hold them apart."""


class GGUFNames:
    """Names of weights in GGUF.

    Args:
        model_type: as config.json names the model.
        blocks: how many blocks it has.
    """

    def __init__(self, model_type: str, blocks: int) -> None:
        self.gguf = gguf_package("An importance matrix")
        known = self.gguf.MODEL_ARCH_NAMES
        own = [arch for arch, name in known.items() if _plain(name) == _plain(model_type)]
        # The package's tables of one architecture stay in the tables that are made after it, so that of the model comes first.
        self._maps = [
            self.gguf.get_tensor_name_map(arch, max(blocks, 1)) for arch in [*own, *(a for a in known if a not in own)]
        ]
        self._own = len(own)

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
        for key in _keys(tensor.removesuffix(".weight")):
            named = [m.get_name(key) for m in self._maps]
            best = next((n for n in named[: self._own] if n), None)
            if best is None and any(named):
                best = Counter(n for n in named if n).most_common(1)[0][0]
            if best is not None:
                yield best
                return


def _keys(stem: str) -> Iterator[str]:
    """The names under which the tables may have a weight: without the number of an expert, and without leading parts that wrappers add."""
    parts = stem.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    parts = [part for i, part in enumerate(parts) if i not in numbers[1:]]
    front = numbers[0] if numbers else max(len(parts) - 1, 0)
    for size in range(front, -1, -1):
        for kept in combinations(range(front), size):
            yield ".".join([*(parts[i] for i in kept), *parts[front:]])


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def blocks_of(config: dict[str, Any]) -> int:
    """How many blocks a config names; 0 where it does not."""
    for part in (config, config.get("text_config") or {}):
        for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            if isinstance(part.get(key), int):
                return int(part[key])
    return 0
