"""Encoders that read something else than text: `deaf_encoder`.

A model of speech or of images that writes text has two halves, of which text reaches one. Which is which is told by the arguments of the
forward pass.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch


def is_seq2seq(model: Any) -> bool:
    """Whether an encoder reads and a decoder writes token ids."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and "decoder_input_ids" in arguments_of(model)


def arguments_of(model: torch.nn.Module) -> set[str]:
    """What the forward pass names."""
    return set(inspect.signature(model.forward).parameters)


def deaf_encoder(model: Any) -> torch.nn.Module | None:
    """The encoder of a model whose decoder alone reads text; None where there is none."""
    if not is_seq2seq(model) or "input_ids" in arguments_of(model) or not hasattr(model, "get_encoder"):
        return None
    found = model.get_encoder()
    return found if isinstance(found, torch.nn.Module) and found is not model else None


def deaf_parameters(model: Any) -> frozenset[str]:
    """Names of the parameters of that encoder."""
    own = deaf_encoder(model)
    held = set() if own is None else {id(p) for p in own.parameters()}
    return frozenset(n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in held)
