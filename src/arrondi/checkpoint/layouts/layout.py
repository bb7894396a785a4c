"""What a storage layout is.

Owns: `Layout` (a row of the table in `arrondi.checkpoint`) and `Placed` (a quantized tensor with its name, shape and scheme).
A layout moves bits between a QTensor and named tensors; it never chooses a code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.formats import LayerScheme
from arrondi.tensor.qtensor import QTensor


@dataclass(frozen=True)
class Placed:
    """A tensor that is stored quantized: its name in the original checkpoint, its shape there, and its scheme."""

    name: str
    shape: tuple[int, ...]
    scheme: LayerScheme

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape of its QTensor: a stack of matrices is one tall matrix."""
        *lead, columns = self.shape
        rows = 1
        for n in lead:
            rows *= n
        return rows, columns


@dataclass(frozen=True)
class Layout:
    """How quantized tensors are stored.

    Attributes:
        name: `quant_method` in config.json.
        readers: who loads it, for people.
        refuse: (scheme, tensor name, shape) → None if it can be stored, else why not, as the end of a sentence.
        specs: the tensors that a placed tensor becomes, known before any code is chosen.
        write: (placed, QTensor) → those tensors.
        read: (placed, reader of named tensors) → QTensor.
        config: (placed, modules left alone, class of each quantized module, whether the model's class can be built only
            around whole weights) → `quantization_config`.
        find: (quantization_config, stored names with type and shape, reader) → what is quantized.
        notes: (placed, class of each quantized module, whole weights as above) → sentences on what a reader is known not
            to do.
    """

    name: str
    readers: str
    refuse: Callable[[LayerScheme, str, tuple[int, ...]], str | None]
    specs: Callable[[Placed], list[TensorSpec]]
    write: Callable[[Placed, QTensor], dict[str, torch.Tensor]]
    read: Callable[[Placed, Callable[[str], torch.Tensor]], QTensor]
    config: Callable[[list[Placed], list[str], Mapping[str, str], bool], dict[str, Any]]
    find: Callable[
        [Mapping[str, Any], Mapping[str, tuple[str, tuple[int, ...]]], Callable[[str], torch.Tensor]], list[Placed]
    ]
    notes: Callable[[list[Placed], Mapping[str, str], bool], list[str]]
