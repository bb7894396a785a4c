"""A weight of LLM.int8.

Owns: `has`, `refuse`, `specs`, `write` and `read_layer`. Of a weight P.weight (m outputs, n inputs):

    P.weight          int8 (m, n)
    P.SCB             float32 (m,)   127 times the scale of a row: the largest magnitude of its numbers
    P.weight_format   uint8 scalar   0: rows, as they are

Inputs are rounded to int8 by token where they are multiplied, but features that reach a threshold. The package multiplies code, SCB and
1/127 in one order or another, so its own results differ in the last bit of float32; here the scale is the nearest float32 to SCB/127. For
one number in 128 no SCB gives just that: such a scale changes in its last bit when it is stored.

Source: bitsandbytes 0.50, `functional.py` and `autograd/_functions.py`.
"""

from __future__ import annotations

from typing import Final

import torch

from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.checks import checked
from arrondi.checkpoint.layouts.layout import LayerValues, Placed, Reader
from arrondi.errors import FileFormatError
from arrondi.formats import FORMATS, ActivationScheme, PerChannel, PerToken, Scheme
from arrondi.tensor.qtensor import QTensor

WEIGHTS: Final = Scheme(FORMATS["int8"], PerChannel())
_STEPS: Final = 127


def inputs_of(threshold: float) -> ActivationScheme:
    """How inputs are rounded: features that reach the threshold keep their numbers; 0: all are rounded."""
    return ActivationScheme(Scheme(FORMATS["int8"], PerToken()), outliers=threshold or None)


def has(placed: Placed) -> bool:
    """Whether a layer is stored so."""
    return placed.scheme.weights.format.kind == "integer"


def refuse(placed: Placed) -> str | None:
    """Why a linear layer of integers cannot be stored, as the end of a sentence; None if it can."""
    scheme = placed.scheme
    if scheme.weights != WEIGHTS:
        return (
            f"bitsandbytes stores nf4 and fp4_bnb in blocks, and int8 with a float32 scale a row, not {scheme.weights}"
        )
    outliers = None if scheme.inputs is None else scheme.inputs.outliers
    if scheme.inputs != inputs_of(outliers or 0.0) or (scheme.outputs, scheme.kv) != (None, None):
        return "bitsandbytes rounds the inputs of int8 weights to int8 by token, and nothing else. Use W8A8, with --method llm-int8 for outliers"
    return None


def specs(placed: Placed) -> list[TensorSpec]:
    """The tensors that a layer becomes."""
    path, (rows, columns) = placed.name.removesuffix(".weight"), placed.matrix_shape
    return [
        (f"{path}.weight", torch.int8, (rows, columns)),
        (f"{path}.SCB", torch.float32, (rows,)),
        (f"{path}.weight_format", torch.uint8, ()),
    ]


def write(placed: Placed, values: LayerValues) -> dict[str, torch.Tensor]:
    """Those tensors with their numbers."""
    path = placed.name.removesuffix(".weight")
    return {
        f"{path}.weight": values.weight.codes,
        f"{path}.SCB": _stored(values.weight.real_scale.reshape(-1)),
        f"{path}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def read_layer(placed: Placed, read: Reader) -> LayerValues:
    """The numbers of a layer, checked."""
    path = placed.name.removesuffix(".weight")
    order = int(read(f"{path}.weight_format"))
    if order != 0:
        raise FileFormatError(f"{path}.weight_format is {order}: only rows as they are (0) are read here.")
    scale = _scale(read(f"{path}.SCB")).reshape(-1, 1)
    q = QTensor(read(f"{path}.weight"), scale, None, None, placed.scheme.weights)
    return LayerValues(checked(placed.name, q))


def _scale(stored: torch.Tensor) -> torch.Tensor:
    return (stored.double() / _STEPS).float()


def _stored(scale: torch.Tensor) -> torch.Tensor:
    """SCB of scales: where one of the numbers next to it gives the scale again, that one."""
    near = (scale.double() * _STEPS).float()
    for side in (float("inf"), float("-inf")):
        other = torch.nextafter(near, torch.full_like(near, side))
        near = torch.where((_scale(near) != scale) & (_scale(other) == scale), other, near)
    return near
