"""What a storage layout is: how a quantized layer becomes named tensors, and how those become the layer again.

Owns: `Layout` (a row of the table `LAYOUTS`), `Placed` (a layer as a file holds it) and `LayerValues` (what crosses between
steps, layouts and modules). A layout moves bits; it never chooses a code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.formats import LayerScheme
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import Grid

Names = Mapping[str, tuple[str, tuple[int, ...]]]
"""Stored tensors: name → element type as safetensors calls it, and shape."""

Reader = Callable[[str], torch.Tensor]
"""Gives a stored tensor by its name."""


@dataclass(frozen=True)
class Placed:
    """One quantized layer as a file holds it.

    Attributes:
        name: name of the tensor in the container, "….weight".
        shape: of the plain tensor as it is stored without quantization (the orientation of the file).
        scheme: what weights, inputs and outputs become.
        module: path by which the model calls the layer, which is what a config's targets and ignores name; "" where it is the
            stored name without ".weight".
        kind: class name by which runtimes know the layer (Linear, Conv1D, Conv2d, …).
        transposed: the plain tensor is (in, out) or (E, in, out); the QTensor is always (out, in) or (E·out, in).
        indexed: the groups of the weight's columns are not contiguous, so an index of groups is stored.
        storage: the layout's own word for one of several ways in which it stores the scheme; "" is the usual one.
    """

    name: str
    shape: tuple[int, ...]
    scheme: LayerScheme
    module: str = ""
    kind: str = "Linear"
    transposed: bool = False
    indexed: bool = False
    storage: str = ""

    def __post_init__(self) -> None:
        if self.module == self.name.removesuffix(".weight"):
            object.__setattr__(self, "module", "")  # one meaning has one value

    @property
    def path(self) -> str:
        """The module path, by whichever of the two names it has."""
        return self.module or self.name.removesuffix(".weight")

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape of the QTensor: stacks of matrices are one tall matrix, kernels of convolutions are rows."""
        if self.transposed:
            *lead, columns, rows = self.shape
            return math.prod(lead) * rows, columns
        if self.kind in ("Conv1d", "Conv2d", "Conv3d"):
            return self.shape[0], math.prod(self.shape[1:])
        *lead, columns = self.shape
        return math.prod(lead), columns

    @property
    def matrices(self) -> int:
        """How many matrices it holds: more than one of a stack."""
        return 1 if self.kind in ("Conv1d", "Conv2d", "Conv3d") else math.prod(self.shape[:-2])

    def restored(self, matrix: torch.Tensor) -> torch.Tensor:
        """A dense matrix of `matrix_shape` in the shape and orientation of the plain tensor."""
        if not self.transposed:
            return matrix.reshape(self.shape)
        *lead, columns, rows = self.shape
        return matrix.reshape(*lead, rows, columns).transpose(-1, -2).contiguous()


@dataclass(frozen=True)
class LayerValues:
    """The numbers of one quantized layer.

    Attributes:
        weight: (out, in), or (E·out, in) of a stack.
        inputs: the static scale (and zero point) of the inputs, or the static outer scale of local ones; None if dynamic.
        outputs: the same of the outputs.
    """

    weight: QTensor
    inputs: Grid | None = None
    outputs: Grid | None = None

    def to(self, device: torch.device) -> LayerValues:
        """The same numbers on a device."""
        grids = (None if g is None else g.map(lambda part: part.to(device)) for g in (self.inputs, self.outputs))
        return LayerValues(self.weight.to(device), *grids)

    @property
    def whole_columns(self) -> torch.Tensor | None:
        """The columns that are kept apart, whose inputs are not rounded; of a stack those of any matrix."""
        kept = self.weight.apart
        return kept.index.unique() if kept is not None and kept.columns else None


@dataclass(frozen=True)
class ModelFacts:
    """What layouts and readers must know of a model beyond its layers.

    Attributes:
        dtype: the element type in which a reader loads the model unless told otherwise: the one that config.json names.
        fused_experts: transformers keeps the experts of a mixture in one parameter.
        whole: transformers can build the model's class only around whole weights, not around packed ones.
        splits: transformers makes several parameters of one stored tensor of this model, which it knows by the name of its weight.
        split_plain: of what one such rule makes nothing is quantized.
        plain: of a parameter that transformers joins from weights no part is quantized.
        parted: of such a parameter a part is quantized.
        joined: paths of modules whose weight transformers makes of several stored matrices, below each other.
        reshaped: paths of modules whose input does not come as (windows, tokens, n).
    """

    dtype: str = "float32"
    fused_experts: bool = False
    whole: bool = False
    splits: bool = False
    split_plain: bool = False
    plain: bool = False
    parted: bool = False
    joined: frozenset[str] = frozenset()
    reshaped: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Layout:
    """How quantized layers are stored.

    Attributes:
        name: `quant_method` in config.json.
        refuse: placed → None if it can be stored, else why not, as the end of a sentence.
        specs: placed → the tensors that it becomes, known before any code is chosen.
        write: (placed, values) → those tensors.
        read: (placed, reader of named tensors) → values; a number that cannot be raises FileFormatError.
        config: (placed, paths of the modules whose matrix is kept, facts of the model) → `quantization_config`.
        find: (config.json, stored names, reader) → what is quantized; raises FileFormatError on whatever it does not consume.
        fit: scheme → the same with the storage types of scales that the layout has, before any code is chosen.
        together: layers that can each be stored → None if one config can describe them all, else why not, as a sentence.
        keys: of config.json, under which the same `quantization_config` stands.
        metadata: (placed, names of the other tensors, facts of the model) → the metadata of every safetensors file.
    """

    name: str
    refuse: Callable[[Placed], str | None]
    specs: Callable[[Placed], list[TensorSpec]]
    write: Callable[[Placed, LayerValues], dict[str, torch.Tensor]]
    read: Callable[[Placed, Reader], LayerValues]
    config: Callable[[list[Placed], list[str], ModelFacts], dict[str, Any]]
    find: Callable[[Mapping[str, Any], Names, Reader], list[Placed]]
    fit: Callable[[LayerScheme], LayerScheme] = lambda scheme: scheme
    together: Callable[[list[Placed]], str | None] = lambda placed: None
    keys: tuple[str, ...] = ("quantization_config",)
    metadata: Callable[[list[Placed], list[str], ModelFacts], dict[str, str]] = lambda placed, plain, facts: {}

    def described(self, config: dict[str, Any]) -> dict[str, Any]:
        """What config.json says of a quantization, under every key that has it."""
        return dict.fromkeys(self.keys, config)
