"""What has changed of a model: `Overlay`, the truth of what is written, run and measured.

A tensor that no step touched is not here and is read from its source. What was quantized is read back from the file that is
being written, so that the model that is calibrated on and measured is the one that a reader of the file gets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Value = Callable[[], torch.Tensor]
"""Gives a tensor in the orientation of the file, floating-point and new at every call."""


@dataclass
class Overlay:
    """Changes of a model.

    Attributes:
        changed: tensors that have another value, by their names in the file.
        added: tensors that the source does not have (a new bias), by the names of the parameters that they are.
        config: edits of the config, merged into it.
    """

    changed: dict[str, Value] = field(default_factory=dict)
    added: dict[str, Value] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
