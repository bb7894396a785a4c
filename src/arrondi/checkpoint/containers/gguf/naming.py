"""What the tensors of a transformers checkpoint are called in GGUF, and what is done to them there.

Owns: `gguf_places`: the inverse of what `names` finds. Every tensor gets the name that the tables of the package gguf have for it, experts
the stack that they belong to; what transformers would do to a tensor of that name on the way back is done backwards.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from arrondi.checkpoint.containers.gguf.metadata import architecture_of, text_of
from arrondi.checkpoint.containers.gguf.names import Form, form_of, processor_of
from arrondi.checkpoint.containers.gguf.tables import own_tables
from arrondi.errors import SchemeError

_EXPERT: Final = re.compile(r"(?P<front>.*\.experts)\.(?P<index>\d+)\.(?P<part>.+)")
_TOWERS: Final = "language_model."
"""What names of the text's part begin with, or have in front of the number of a layer, where a model sees or hears as well."""
_OWN: Final = re.compile(r"blk\.\d+\..+")
"""Names of GGUF itself, which tensors keep that no model builds."""
_ENDS: Final = (".weight", ".bias")
_HEAD, _TABLE = "output.weight", "token_embd.weight"


@dataclass(frozen=True)
class Place:
    """Where a tensor goes.

    Attributes:
        name: of the tensor in the file.
        shape: of it there, with the rows first; of one matrix of a stack.
        form: what it is in the model, of a tensor of that shape.
        index, count: which matrix of a stack of so many.
    """

    name: str
    shape: tuple[int, ...]
    form: Form
    index: int = 0
    count: int = 1


def gguf_places(config: Any, shapes: Mapping[str, tuple[int, ...]], spare: Collection[str] = ()) -> dict[str, Place]:
    """The place of every tensor that has one.

    Args:
        config: of transformers.
        shapes: of the tensors of a plain checkpoint, by name.
        spare: tensors that may have none.

    Raises:
        SchemeError: the tables have no name for a tensor, or two tensors would have one name.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    called = architecture_of(config)
    architecture = next(a for a, n in MODEL_ARCH_NAMES.items() if n == called)
    with own_tables():
        names = get_tensor_name_map(architecture, text_of(config).num_hidden_layers)
    processor = processor_of(called, text_of(config).to_dict())
    experts = [m for name in shapes if (m := _EXPERT.fullmatch(name))]
    counts: dict[str, int] = {}
    for m in experts:
        counts[f"{m['front']}.{m['part']}"] = max(counts.get(f"{m['front']}.{m['part']}", 0), int(m["index"]) + 1)
    # Where the head is the table of tokens, a checkpoint may call the one tensor by either name; llama.cpp wants the table.
    shared = bool(getattr(config, "tie_word_embeddings", False)) and not any(
        names.get_name(name.replace(_TOWERS, "", 1), try_suffixes=_ENDS) == _TABLE for name in shapes
    )
    places: dict[str, Place] = {}
    taken: dict[tuple[str, int], str] = {}
    for name, shape in shapes.items():
        m = _EXPERT.fullmatch(name)
        plain = (f"{m['front']}.{m['part']}" if m else name).replace(_TOWERS, "", 1)
        found = name if name in spare and _OWN.fullmatch(name) else names.get_name(plain, try_suffixes=_ENDS)
        if found == _HEAD and shared:
            found = _TABLE
        if found is None and name in spare:
            continue
        if found is None:
            raise SchemeError(
                f"{name}: GGUF has no name for it in a model of the architecture {called!r}. Give a GGUF file of this model: --template F16.gguf."
            )
        place = (
            Place(found, shape, Form(shape), int(m["index"]), counts[f"{m['front']}.{m['part']}"])
            if m
            else Place(found, *_stored(processor, found, shape))
        )
        other = taken.setdefault((place.name, place.index), name)
        if other != name:
            raise SchemeError(
                f"{name} and {other} would both be {found} in GGUF. Give a GGUF file of this model: --template F16.gguf."
            )
        places[name] = place
    return places


def _stored(processor: Any, name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Form]:
    """The shape in the file of a tensor whose shape in the model is this, and what a reader makes of it."""
    for held in dict.fromkeys((shape, shape[::-1], tuple(n for n in shape if n != 1))):
        form = form_of(processor, name, held)
        if form.shape == shape:
            return held, form
    return shape, form_of(processor, name, shape)
