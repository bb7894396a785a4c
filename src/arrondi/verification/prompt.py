"""What a model is asked, the same for every consumer: a text for language models and encoders, numbers for networks of ONNX operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from arrondi.errors import FileFormatError
from arrondi.graph import Graph
from arrondi.graph.codes import INTEGERS
from arrondi.graph.ir import CODES, QDQ
from arrondi.graph.sizes import batch_of
from arrondi.measure.calling import Calling
from arrondi.measure.text import load_tokenizer, positions_of
from arrondi.model import OnDisk

TEXT: Final = (
    "In the morning the old clock in the hall struck nine times, although it was only seven. Nobody in the house knew who had wound it, and the "
    "two sisters looked at each other over their tea. \"It was right yesterday,\" said the elder; 'and it will be right tomorrow,' answered the "
    "younger, who had 3 keys and 12 good reasons to keep silent."
)  # fmt: skip
TOKENS: Final = 64
"""At most so many of them."""
_SAMPLES: Final = 4
_FREE: Final = 16
"""Size of axes that a network leaves open."""


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Attributes:
        inputs: arrays by the names of the model's arguments.
        text: what the ids spell, with special tokens in front as the tokenizer puts them; "" where they were made up.
        ids: the ids of all of the text; empty where they were made up.
    """

    inputs: dict[str, np.ndarray]
    text: str = ""
    ids: tuple[int, ...] = ()

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(value) for name, value in self.inputs.items()}


def prompt_of(source: OnDisk) -> Prompt:
    """The text as a model reads it, or ids all over its vocabulary where it has no tokenizer."""
    most = min(TOKENS, positions_of(source.model) or TOKENS)
    try:
        ids = tuple(load_tokenizer(source.home)(TEXT)["input_ids"])
        text = TEXT
    except FileFormatError:
        words = source.model.get_input_embeddings().num_embeddings
        drawn = torch.randint(0, words, (most,), generator=torch.Generator().manual_seed(0))
        ids, text = tuple(drawn.tolist()), ""
    given = Calling.of(source.model)(torch.tensor([ids[:most]]))
    named = {"input_ids": given} if isinstance(given, torch.Tensor) else given
    return Prompt({n: v.numpy() for n, v in named.items()}, text, ids if text else ())


def numbers_for(graph: Graph) -> dict[str, np.ndarray]:
    """Made-up inputs of a network: over the grid that they enter, ids of the table that they are looked up in, else around zero."""
    drawn = np.random.default_rng(0)
    count = batch_of(graph) or _SAMPLES
    found = {}
    for value in graph.inputs:
        shape = [n if isinstance(n, int) else count if not i else _FREE for i, n in enumerate(value.shape)]
        found[value.name] = _numbers(graph, value.name, value.dtype, shape, drawn)
    return found


def _numbers(graph: Graph, name: str, dtype: np.dtype[Any], shape: list[int], drawn: np.random.Generator) -> np.ndarray:
    readers = graph.consumers.get(name, [])
    if dtype.kind != "f":
        tables = [graph.constants[n.inputs[0]].shape[0] for n in readers if n.op == "Gather" and n.inputs[0] in graph.constants and n.inputs[1] == name]  # fmt: skip
        return drawn.integers(0, min(tables), shape).astype(dtype) if tables else np.ones(shape, dtype)
    for node in readers:
        parts = [graph.constants.get(n) for n in node.inputs[1:3]]
        if node.op in ("QuantizeLinear", QDQ) and len(parts) == 2 and all(p is not None and p.size == 1 for p in parts):
            low, high, _ = INTEGERS[node.attrs[CODES]]
            scale, zero = (float(np.asarray(p).astype(np.float64).reshape(())) for p in parts)
            spread, middle = (high - low) * scale / 6, ((high + low) / 2 - zero) * scale
            return np.clip(drawn.normal(middle, spread, shape), (low - zero) * scale, (high - zero) * scale).astype(dtype)  # fmt: skip
    return drawn.standard_normal(shape).astype(dtype)
