"""The types that the tensors of a model get under a mix.

Owns: `Mixing`, what `mixes` is told of a model's tensors: their names in GGUF, in which layer of how many they are, and the model's heads and
experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property

from arrondi.checkpoint.containers.gguf.metadata import architecture_of, text_of
from arrondi.checkpoint.containers.gguf.naming import Place
from arrondi.checkpoint.layouts.ggml import BLOCKS
from arrondi.formats import LayerScheme
from arrondi.model import Source, StoredTensor
from arrondi.pipeline.gguf_parts import parts_of
from arrondi.pipeline.mixes import Facts, base_scheme, role_of, type_in_mix

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_LAYERS_OF_70B = 80


class Mixing:
    """The types of one model's tensors.

    Raises, where it is first asked:
        SchemeError: GGUF has no name for a tensor, or no word for the model.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    def scheme(self, mix: str, tensor: StoredTensor, columns: int, importance: bool) -> LayerScheme | None:
        """What a mix makes of a tensor; None where no block divides its rows.

        Args:
            columns: of its matrix.
            importance: something is known of its inputs.
        """
        if tensor.name not in self._places:  # it will be in no file
            return base_scheme(mix)
        place, config = self._places[tensor.name], text_of(self.source.model.config)
        role = role_of(place.name)
        blocks = self._blocks.get(role, [])
        block = _block(place.name)
        called, heads = architecture_of(self.source.model.config), int(getattr(config, "num_attention_heads", 1) or 1)
        experts = next((int(n) for key in _EXPERTS if (n := getattr(config, key, None))), 0)
        facts = Facts(
            columns,
            blocks.index(block) if block in blocks else 0,
            max(len(blocks), 1),
            tied="output.weight" not in {p.name for p in self._places.values()},
            gqa=heads // int(getattr(config, "num_key_value_heads", None) or heads),
            experts=experts,
            stacked=place.count > 1 or len(place.shape) > 2,
            importance=importance,
            falcon=called == "falcon",
            seventy=called == "llama" and config.num_hidden_layers == _LAYERS_OF_70B,
        )
        found = type_in_mix(mix, place.name, facts)
        scheme = None if found is None else BLOCKS[found].scheme
        return None if scheme is None else LayerScheme(scheme)

    @cached_property
    def _places(self) -> Mapping[str, Place]:
        return parts_of(self.source).places

    @cached_property
    def _blocks(self) -> dict[str, list[int]]:
        """The blocks that have a tensor of a role, in order."""
        found: dict[str, set[int]] = {}
        for place in self._places.values():
            found.setdefault(role_of(place.name), set()).add(_block(place.name))
        return {role: sorted(blocks) for role, blocks in found.items()}


def _block(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else 0
