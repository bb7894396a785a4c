"""How a window of text is given to a model: `Calling`.

Most models take its token ids. Of a model with an encoder and a decoder both read it: the decoder shifted by one, as in training, so that
it writes the window from its start. Where the encoder reads sound or images, it is given noise.

Owns: that rule, and which ids an output predicts (`predicted`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Final

import torch

from arrondi.model import Inputs, deaf_encoder, is_seq2seq, usual_inputs

_START: Final = ("decoder_start_token_id", "bos_token_id", "pad_token_id", "eos_token_id")
"""Of the settings that say with which token a decoder begins, the first that is there counts."""


@dataclass(frozen=True)
class Calling:
    """How windows become arguments of a model.

    Attributes:
        start: the token that a decoder begins with; None where ids alone are given.
        noise: the name of what the encoder takes instead of text, and its shape for one window; None where it reads the text.
    """

    start: int | None = None
    noise: tuple[str, tuple[int, ...]] | None = None

    @classmethod
    def of(cls, model: Any) -> Calling:
        """How a transformers model is called; only its config and shapes count."""
        if not is_seq2seq(model):
            return cls()
        configs = [c for c in (model.config, getattr(model, "generation_config", None)) if c is not None]
        known = [value for name in _START for c in configs if (value := getattr(c, name, None)) is not None]
        first = known[0] if known else 0
        start = int(first[0] if isinstance(first, list | tuple) else first)
        return cls(start, _made_up(model) if deaf_encoder(model) is not None else None)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """The arguments for windows (n, tokens)."""
        if self.start is None:
            return ids
        written = torch.cat([torch.full_like(ids[:, :1], self.start), ids[:, :-1]], dim=1)
        if self.noise is None:
            return {"input_ids": ids, "decoder_input_ids": written}
        name, shape = self.noise
        drawn = torch.randn((len(ids), *shape), generator=torch.Generator().manual_seed(0))
        return {name: drawn, "decoder_input_ids": written}

    @property
    def protocol(self) -> str:
        """What is to be added to the protocol; "" where ids alone are given."""
        if self.start is None:
            return ""
        read = (
            "the encoder reads the window" if self.noise is None else f"the encoder is given noise as {self.noise[0]}"
        )
        return f"; {read}, the decoder writes it from its start token"

    @property
    def notes(self) -> list[str]:
        """What has to be said of numbers that come about so."""
        if self.noise is None:
            return []
        return [
            f"There is no text that the encoder could read, so it is given noise as {self.noise[0]}: what the decoder takes from it is calibrated and measured on what the encoder makes of noise."
        ]


def predicted(batch: Any) -> torch.Tensor:
    """The ids whose next ones the model predicts, (n, tokens); its first tensor where there are none."""
    inputs = Inputs.of(batch)
    for name in ("decoder_input_ids", "input_ids"):
        if name in inputs.kwargs:
            found: torch.Tensor = inputs.kwargs[name]
            return found
    first: torch.Tensor = inputs.args[0]
    return first


def _made_up(model: Any) -> tuple[str, tuple[int, ...]] | None:
    """What the encoder takes, of the usual inputs; found by running shapes."""
    shadow = copy.deepcopy(model).to("meta")
    encoder = deaf_encoder(shadow)
    assert encoder is not None
    for inputs in usual_inputs(shadow):
        (name, value), *others = inputs.items()
        if others or name in ("input_ids", "decoder_input_ids"):
            continue
        try:
            with torch.no_grad():
                encoder(value)
        except Exception:  # it wants another shape, and says so in its own way
            continue
        return name, tuple(value.shape[1:])
    return None
