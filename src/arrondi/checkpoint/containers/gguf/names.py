"""What the tensors of a GGUF file are called in a transformers checkpoint, and what was done to them.

Owns: `model_entries`, and `form_of` with the `Form` that it finds. Names are those of the tables of the package gguf, read backwards for the parameters that the model
has; what a converter did to a tensor is found by sending marked numbers through transformers' own way back. So no family of
models is known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from arrondi.checkpoint.containers.gguf.families import FAMILIES
from arrondi.checkpoint.containers.gguf.header import Header, Stored
from arrondi.checkpoint.containers.gguf.ik import IK_TYPES
from arrondi.checkpoint.containers.gguf.tables import own_tables
from arrondi.checkpoint.containers.tensor_file import DTYPES, Entry
from arrondi.checkpoint.containers.turn import Turn
from arrondi.errors import ArrondiError, FileFormatError

_STACK: Final = re.compile(r"blk\.(?P<block>\d+)\.ffn_(?P<part>gate|up|down)_exps\.(?P<leaf>weight|bias)")
GRIDLESS: Final = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", *IK_TYPES})
"""Types of blocks whose values are points of a lattice and not codes with a scale, and all of ik_llama.cpp's: they are read as numbers."""
_LIKE: Final = {"gemma": "gemma2"}
"""Architectures that transformers does not read, and the one whose converter does the same to them."""
_TIMES: Final = 2.0
"""A second number that is sent through what a converter did to a vector."""


def model_entries(headers: list[Header], config: Mapping[str, Any], model: Any) -> dict[str, Entry]:
    """Where the tensors of a transformers model lie.

    Args:
        headers: of all files of the model.
        config: as transformers reads it of the file.
        model: of that config, on the meta device.

    Returns:
        entries by the names of a plain checkpoint, experts one by one; tensors that the model has no name for keep theirs.

    Raises:
        FileFormatError: something was done to a quantized tensor that cannot be undone.
    """
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    processor = processor_of(headers[0].architecture, config)
    with own_tables():
        names: dict[str, str] = get_gguf_hf_weights_map(
            model, processor, model_type=headers[0].architecture, num_layers=model.config.num_hidden_layers
        )
    experts = _expert_names(model)
    entries: dict[str, Entry] = {}
    for header in headers:
        for name, stored in header.tensors.items():
            for entry in _entries(header, name, stored, names, experts, processor):
                if entry.name in entries:
                    raise FileFormatError(f"{header.path}: {name} is {entry.name}, which another tensor is as well.")
                entries[entry.name] = entry
    return entries


def processor_of(architecture: str, config: Mapping[str, Any]) -> Any:
    """Transformers' way back for an architecture, as GGUF calls it."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    family = FAMILIES.get(architecture)
    if family is not None and family.processor is not None:
        return family.processor(config)
    return TENSOR_PROCESSORS.get(_LIKE.get(architecture, architecture), TensorProcessor)(config=dict(config))


def _entries(
    header: Header, name: str, stored: Stored, names: Mapping[str, str], experts: Mapping[str, str], processor: Any
) -> Iterator[Entry]:
    """The entries that one stored tensor becomes: one, or one for every expert."""
    stack = _STACK.fullmatch(name)
    pattern = experts.get(stack["part"]) if stack else None
    if stack and pattern is not None and len(stored.shape) >= 2:
        count = stored.shape[0]
        size = (stored.stop - stored.start) // max(count, 1)
        for i in range(count):
            own = pattern.format(block=stack["block"], expert=i).removesuffix(".weight") + f".{stack['leaf']}"
            start = stored.start + i * size
            yield Entry(own, header.path, stored.type, stored.raw_shape[1:], start, start + size)
        return
    try:
        form = form_of(processor, name, stored.shape) if name in names else Form(stored.shape)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, ArrondiError):
            raise
        raise FileFormatError(
            f"{header.path}: {name} of the shape {stored.shape} is no such tensor of a model with this header ({error}). Download it again."
        ) from error
    yield _entry(names.get(name, name), header.path, stored, form)


def _entry(name: str, path: Path, stored: Stored, form: Form) -> Entry:
    """A whole tensor. Of blocks on a grid only the rows are put in order: the rest is said by whoever knows what they mean."""
    raw = stored.raw_shape
    if stored.type in DTYPES:
        turn = None if form == Form(stored.shape) else Turn(stored.type, raw, form.rows, form.transposed, form.plus)
        return Entry(name, path, stored.type, form.shape, stored.start, stored.stop, turn)
    if stored.type in GRIDLESS:
        turn = Turn(stored.type, raw, form.rows, form.transposed, form.plus, decoded=True)
        return Entry(name, path, "F32", form.shape, stored.start, stored.stop, turn)
    if form.plus or form.shape != (stored.shape[::-1] if form.transposed else stored.shape):
        raise FileFormatError(
            f"{path}: {name} is stored as {stored.type}, and its form in the model is another. Take a file that holds it as F32."
        )
    turn = None if form.rows is None else Turn(stored.type, raw, form.rows)
    return Entry(name, path, stored.type, raw, stored.start, stored.stop, turn)


@dataclass(frozen=True)
class Form:
    """What a tensor of a file is in the model: its shape there, and how its numbers get there (see `Turn`)."""

    shape: tuple[int, ...]
    rows: torch.Tensor | None = None
    transposed: bool = False
    plus: float = 0.0


def form_of(processor: Any, name: str, shape: tuple[int, ...]) -> Form:
    """What transformers does to a tensor of this name on its way from the file into the model.

    Args:
        processor: transformers' way back for the architecture.
        name: of the tensor in the file.
        shape: of it there.

    Raises:
        FileFormatError: it is none of the forms that are known here.
    """
    if len(shape) == 1:
        return _form_of_vector(processor, name, shape[0])
    if len(shape) != 2:
        return Form(shape)
    rows = np.broadcast_to(np.arange(shape[0], dtype=np.float64)[:, None], shape)
    columns = np.broadcast_to(np.arange(shape[1], dtype=np.float64), shape)
    by_row, by_column = (_sent(processor, name, x) for x in (rows, columns))
    if by_row is rows:
        return Form(shape)
    made = tuple(by_row.shape)
    transposed = made == shape[::-1] and bool((by_row == by_row[:1]).all())
    flat_row, flat_column = (x.T if transposed else x.reshape(shape) for x in (by_row, by_column))
    if not (flat_row == flat_row[:, :1]).all() or not (flat_column == np.arange(shape[1])).all():
        raise FileFormatError(f"transformers turns {name} into a form that is not known here.")
    return Form(made, _order(flat_row[:, 0]), transposed)


def _form_of_vector(processor: Any, name: str, length: int) -> Form:
    """Of a bias that goes with rows in another order, of a norm to which a number was added, of a row that is a matrix."""
    marks = np.arange(length, dtype=np.float64)
    made = _sent(processor, name, marks)
    shape, flat = tuple(made.shape), made.reshape(-1)
    if sorted(flat) == list(marks):
        return Form(shape, _order(flat))
    plus = float(flat[0] - marks[0]) if flat.shape == marks.shape else float("nan")
    again = _sent(processor, name, marks * _TIMES).reshape(-1)
    if not (flat == marks + plus).all() or not (again == marks * _TIMES + plus).all():
        raise FileFormatError(f"transformers turns {name} into a form that is not known here.")
    return Form(shape, plus=plus)


def _order(marks: np.ndarray) -> torch.Tensor | None:
    """Which stored row each row is; None where they are in order."""
    order = torch.from_numpy(marks.astype(np.int64))
    return None if torch.equal(order, torch.arange(len(order))) else order


def _sent(processor: Any, name: str, x: np.ndarray) -> np.ndarray:
    """Numbers after transformers' way back. What it keeps for itself (stacks, heads) it leaves as it is."""
    made: np.ndarray = processor.process(x, name, tensor_key_mapping={}, parsed_parameters={"tensors": {}}).weights
    return made


def _expert_names(model: Any) -> dict[str, str]:
    """How a checkpoint of this model calls the gates, the ups and the downs of experts, by transformers' own rules of joining them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    found: dict[str, str] = {}
    stacks = [n for n, p in model.named_parameters() if p.ndim == 3]
    for rule in get_model_conversion_mapping(model):
        if not isinstance(rule, WeightConverter) or not any("experts" in p for p in rule.source_patterns):
            continue
        parts = ("gate", "up") if len(rule.source_patterns) == 2 else ("down",)
        target = re.compile(rule.target_patterns[0].replace(".", r"\.").replace("*", ".*"))
        owner = next((s for s in stacks if target.search(s)), None)
        if owner is None or len(rule.source_patterns) > 2:
            continue
        front = re.sub(r"\.\d+\.", ".{block}.", owner[: target.search(owner).start()], count=1)  # type: ignore[union-attr]
        for part, pattern in zip(parts, rule.source_patterns, strict=True):
            found[part] = front + pattern.replace("*", "{expert}", 1).removesuffix("$")
    return found
