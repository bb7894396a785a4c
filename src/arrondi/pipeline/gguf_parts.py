"""Which tensors of a model a GGUF file holds: `parts_of`. What the file has no place for is named, never dropped in silence.

A tensor that the model reads needs a name there. Two kinds of others may go without: what is stored and not built (draft layers), and towers
and projectors that text does not reach, which llama.cpp has in a file of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from arrondi.checkpoint.containers.gguf.naming import Place, gguf_places
from arrondi.model import Source
from arrondi.pipeline.listing import listed

_NOT_BUILT: Final = "{} left out: the model does not build what is stored there (draft layers, for example), and GGUF has no name for it."
_DEAF: Final = "{} left out: text does not reach them. llama.cpp has what sees or hears in a file of its own (mmproj), which is not written here; take that of the original model."


@dataclass(frozen=True)
class Parts:
    """What becomes of the tensors of a model.

    Attributes:
        places: tensor → its place.
        left: the others → the sentence about them.
    """

    places: Mapping[str, Place]
    left: Mapping[str, str]

    @property
    def notes(self) -> list[str]:
        """A sentence for each reason."""
        found = []
        for said in dict.fromkeys(self.left.values()):
            names = [n for n, s in self.left.items() if s == said]
            found.append(said.format(f"{listed(names)} {'is' if len(names) == 1 else 'are'}"))
        return found


def parts_of(source: Source) -> Parts:
    """The places of all tensors that have one.

    Raises:
        SchemeError: GGUF has no name for a tensor that text needs.
    """
    deaf = source.facts.unreached
    spare: dict[str, str] = {}
    for t in source.tensors:
        if not t.params:
            spare[t.name] = _NOT_BUILT
        elif all(p in deaf for p in t.params):
            spare[t.name] = _DEAF
    places = gguf_places(source.model.config, {t.name: t.shape for t in source.tensors}, spare.keys())
    return Parts(places, {n: s for n, s in spare.items() if n not in places})
