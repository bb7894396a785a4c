"""What the functions on tensors accept, and how they say that it is something else.

Owns: `scheme_of` (words and layer schemes are schemes too), `check_tensor`, and `named`, which adds a tensor's name to errors.
"""

from __future__ import annotations

import torch

from arrondi.arguments import said
from arrondi.errors import ArrondiError, DataError, SchemeError
from arrondi.formats import ActivationScheme, LayerScheme, Scheme, parse_scheme

SchemeLike = Scheme | LayerScheme | ActivationScheme | str
"""Whatever says what one tensor becomes."""


def scheme_of(scheme: SchemeLike) -> Scheme:
    """The scheme itself, that of a layer's weights or of its inputs, or of the weights that a word ("W4A16", the grammar) means.

    Raises:
        SchemeError: something else, or a word that is no scheme.
    """
    match scheme:
        case Scheme():
            return scheme
        case LayerScheme(weights):
            return weights
        case ActivationScheme(inner):
            return inner
        case str():
            return parse_scheme(scheme).weights
    raise _no_scheme(scheme)


def layer_scheme_of(scheme: Scheme | LayerScheme | str) -> LayerScheme:
    """The scheme of a layer: itself, one of weights alone, or what a word means.

    Raises:
        SchemeError: something else, or a word that is no scheme.
    """
    match scheme:
        case LayerScheme():
            return scheme
        case Scheme():
            return LayerScheme(scheme)
        case str():
            return parse_scheme(scheme)
    raise _no_scheme(scheme)


def _no_scheme(found: object) -> SchemeError:
    return SchemeError(f"A scheme is a word such as 'W4A16', a Scheme or a LayerScheme, got {said(found)}.")


def check_tensor(x: object, name: str) -> torch.Tensor:
    """`x`, which is a tensor of floating-point numbers.

    Raises:
        DataError: it is something else; the message says how to make a tensor of it.
    """
    if isinstance(x, torch.Tensor):
        if not x.dtype.is_floating_point:
            raise DataError(
                f"{name}: only floating-point numbers can be quantized, got {x.dtype}. Convert them to float32 first."
            )
        if x.is_meta or x.layout is not torch.strided:
            what = "is on the meta device and has no numbers" if x.is_meta else f"has the layout {x.layout}"
            raise DataError(f"{name}: the tensor {what}. Give a dense one with numbers.")
        return x
    kind = type(x)
    if isinstance(x, torch.nn.Module):
        hint = "Pass the weight of one layer, or quantize the model as a whole with arrondi.quantize"
    elif kind.__name__ == "QTensor":
        hint = "It is quantized already; use its dequantize() first"
    else:
        hint = "Use torch.from_numpy(…) first" if kind.__name__ == "ndarray" else "Use torch.tensor(…) first"
    raise DataError(f"{name}: only a torch.Tensor can be quantized, got {kind.__module__}.{kind.__name__}. {hint}.")


class named:
    """Puts a tensor's name in front of the errors of inner code, which does not know it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ArrondiError) and not str(error).startswith(self.name):
            raise type(error)(f"{self.name}: {error}") from error
