"""A transformers model as an ONNX graph of floats, by PyTorch's own exporter: `export_model`.

The graph has what the model's forward has: token ids and mask (and segments) in, logits or hidden states out, of any batch and length; a cache of keys
and values is not part of it. The model is in memory as floats while it is traced.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.errors import SchemeError
from arrondi.graph.read import export_program
from arrondi.model import OnDisk

_INPUTS: Final = ("input_ids", "attention_mask", "token_type_ids")
_TRACED: Final = (2, 9)
"""Windows and tokens of the trace; both vary afterwards."""
_TEMPLATE: Final = "Export it with a tool that knows it, and give that file: --template NAME.onnx."


def export_model(source: OnDisk, path: Path) -> dict[str, str]:
    """Write the dequantized model as a graph, its weights beside it.

    Args:
        source: the model.
        path: of the file.

    Returns:
        weight of the graph → the stored tensor that it is, of those that are one stored tensor as it is.

    Raises:
        SchemeError: a model that reads no token ids, or more than these, or that PyTorch cannot trace.
    """
    instance = source.instance()
    instance.fill(list(instance.empty))
    model = instance.model
    check_exportable(model)
    given = _example(model)
    try:
        with torch.no_grad():
            result = model(**given)
    except Exception as error:  # whatever a model raises that wants something else
        raise SchemeError(f"{source.where}: a {type(model).__name__} does not run on token ids alone ({type(error).__name__}). {_TEMPLATE}") from error  # fmt: skip
    names = [key for key, value in result.items() if isinstance(value, torch.Tensor)]
    program = export_program(model, given, names)
    program.save(str(path), external_data=True)
    return stored_names(source)


def check_exportable(model: Any) -> None:
    """
    Raises:
        SchemeError: the model reads no token ids, or more than these.
    """
    takes = inspect.signature(model.forward).parameters
    if "input_ids" not in takes or getattr(model.config, "is_encoder_decoder", False):
        raise SchemeError(f"{type(model).__name__} reads more than token ids, and is not exported here. {_TEMPLATE}")


def _example(model: Any) -> dict[str, torch.Tensor]:
    takes = inspect.signature(model.forward).parameters
    ids = torch.ones(_TRACED, dtype=torch.long)
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    segments = getattr(model.config, "type_vocab_size", None)  # others look segments up among their words
    return {name: values[name] for name in _INPUTS if name in takes and (name != "token_type_ids" or segments)}


def stored_names(source: OnDisk) -> dict[str, str]:
    """Parameter → the stored tensor that it is, of those that are one stored tensor as it is."""
    found = {}
    for group in source.names.groups:
        if group.convert is None and len(group.sources) == len(group.targets) == 1:
            for name in source.names.names_of(group.targets[0]):
                found[name] = group.sources[0]
    return found
