"""What the weights of an ONNX graph are called: by the module that they belong to where an exporter or a quantizer left that to be found.

Owns: `weight_name` and `Names`, which gives every name once.
"""

from __future__ import annotations

import re
from typing import Final

from arrondi.checkpoint.containers.onnx.header import Node

_ENDS: Final = re.compile(r"(_DQ)?_Q\d+(G-?\d+)?$|_quantized$|_Bnb4$|_quant$")
"""What quantizers put behind the name of a constant."""
_NO_NAME: Final = re.compile(r"(onnx::\w+|val_\d+|\d+|_?\d+|(arith|tfl)[.\w]*\d*|const\w*_?\d*|ortshared\w*)")
"""What exporters call a constant that they made."""
_BUILT: Final = re.compile(r"\.MatMul(NBits)?\.q?weight$")


def plain_name(stored: str) -> str:
    """The name of a constant without what a quantizer put behind it."""
    name = _BUILT.sub(".weight", _ENDS.sub("", stored))
    return f"{name.removesuffix('.qweight')}.weight" if name.endswith(".qweight") else name


def is_made(stored: str) -> bool:
    """Whether an exporter made a constant, which has no name in the model."""
    return _NO_NAME.fullmatch(plain_name(stored)) is not None


def weight_name(stored: str, node: Node | None, bias: str = "") -> str:
    """The name of a weight.

    Args:
        stored: of its codes, or of its numbers.
        node: the operator that multiplies by it, or looks it up.
        bias: name of what is added to that product; "" if nothing is.

    >>> weight_name("onnx::MatMul_42_quantized", Node("/encoder/layer.0/query/MatMul", "MatMul", (), (), {}))
    'encoder.layer.0.query.weight'
    """
    own = plain_name(stored)
    if node is None or not is_made(own):
        return own
    if node.scope:
        return f"{node.scope}.weight"
    path = [part for part in node.name.split("/")[:-1] if part]
    if node.name.startswith("/") and path:
        return f"{'.'.join(path)}.weight"
    return f"{bias.removesuffix('.bias')}.weight" if bias else own


class Names:
    """Names that were given; the second weight of a name keeps its own, or gets a number."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def fresh(self, wanted: str, stored: str) -> str:
        """A name that no other weight has."""
        candidates = [wanted, plain_name(stored), stored]
        name = next((n for n in candidates if n not in self._taken), "")
        number = 2
        while not name or name in self._taken:
            name, number = f"{wanted}_{number}", number + 1
        self._taken.add(name)
        return name
