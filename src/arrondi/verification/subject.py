"""What is verified: `Subject`, and that of a model directory or a GGUF file (`model_subject`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from arrondi.checkpoint import ModelFacts, readers_of
from arrondi.checkpoint.containers.gguf.header import is_gguf
from arrondi.checkpoint.verdict import TRANSFORMERS
from arrondi.model import OnDisk
from arrondi.pipeline.plan_facts import facts_of
from arrondi.pipeline.resolve import PlannedTensor
from arrondi.verification.consumers import PLAIN
from arrondi.verification.expected import LLAMA_CPP, Expected, of_transformers
from arrondi.verification.predict import Predicted, predict
from arrondi.verification.prompt import prompt_of

_READERS: Final[Mapping[str, str]] = {"transformers": TRANSFORMERS, "llama.cpp": "llama.cpp"}
"""Consumer → what it is called in verdicts."""


@dataclass(frozen=True)
class Subject:
    """A file with all that has to be known to ask consumers about it.

    Attributes:
        where: its path.
        layout: a name of `LAYOUTS`, "plain" or "onnx".
        inputs: what every consumer is given.
        words: the same for people.
        refusals: consumer → why this file cannot be verified with it, as a sentence, of those that read the layout.
        request: what scripts have to know of it.
        expected: consumer → how far it may be off.
        predict: names of consumers → what each should give.
        ids: how the text is cut into tokens; empty where there is none.
    """

    where: Path
    layout: str
    inputs: Mapping[str, np.ndarray]
    words: str
    refusals: Mapping[str, str]
    request: Mapping[str, Any]
    expected: Callable[[str], Expected]
    predict: Callable[[Sequence[str]], Mapping[str, Predicted]]
    ids: tuple[int, ...] = ()


def model_subject(path: str | Path) -> Subject:
    """A model directory or a GGUF file.

    Raises:
        FileFormatError: not a model; SchemeError: it asks for what is not computed here.
    """
    source = OnDisk.open(path)
    source.check_computed()
    checkpoint, prompt = source.checkpoint, prompt_of(source)
    placed = list(checkpoint.placed.values())
    layout, facts, refusals = checkpoint.layout, ModelFacts(), {}
    if layout is not None:
        facts = facts_of(source, _planned(source), layout)
        verdicts = {v.reader: v for v in readers_of(placed, layout, facts)}
        refusals = {c: verdicts[r].sentence for c, r in _READERS.items() if r in verdicts and not verdicts[r].ok}
    gguf = is_gguf(source.where)
    name = layout.name if layout is not None else "gguf" if gguf else PLAIN

    def expected(consumer: str) -> Expected:
        return LLAMA_CPP if consumer == "llama.cpp" else of_transformers(name, placed, facts)

    def predicted(consumers: Sequence[str]) -> Mapping[str, Predicted]:
        return predict(source, prompt, {c: expected(c).rounds for c in consumers})

    request = {
        "file": str(source.where.resolve()),
        "folder": str(source.where.resolve().parent if gguf else source.where.resolve()),
        "gguf": source.where.name if gguf else "",
        "class": type(source.model).__name__,
        "text": prompt.text,
    }
    words = "a text" if prompt.text else "made-up token ids (there is no tokenizer)"
    count = next(iter(prompt.inputs.values())).shape[-1]
    return Subject(source.where, name, prompt.inputs, f"{words}, {count} tokens", refusals, request, expected, predicted, prompt.ids)  # fmt: skip


def _planned(source: OnDisk) -> list[PlannedTensor]:
    """The tensors of a finished output, as the plan of its run had them."""
    placed = source.checkpoint.placed
    found = []
    for tensor in source.tensors:
        layer = placed.get(tensor.name)
        if layer is None:
            found.append(PlannedTensor(tensor, torch.float32, "kept by rule", ""))
        else:
            found.append(PlannedTensor(tensor, torch.float32, "quantized", "", scheme=layer.scheme))
    return found
