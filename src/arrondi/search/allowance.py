"""What a budget counts: `Allowance`, bits that a file holds, bit operations of one sample, or its time; and `products_of`, how much layers multiply."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from arrondi.errors import SchemeError
from arrondi.graph import Node, Program, held_bits
from arrondi.graph.program import Part
from arrondi.graph.rounder import Rounder
from arrondi.tensor.qtensor import QTensor

_SIZES: Final = {"KB": 8e3, "MB": 8e6, "GB": 8e9}
_OPERATIONS: Final = {"KBOP": 1e3, "MBOP": 1e6, "GBOP": 1e9}
_TIMES: Final = {"US": 1.0, "MS": 1e3}
_AMOUNT: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+)")
_FLOAT_BITS: Final = 32
"""Of inputs that are not rounded."""


@dataclass(frozen=True)
class Allowance:
    """A budget as the user gives it.

    Attributes:
        amount: how much of its unit.
        unit: `BPW`, bits per weight on average, scales counted; `KB`, `MB`, `GB`, of all weights; `KBOP`, `MBOP`, `GBOP`: multiplications of one
            sample times bits of the weight times bits of the input (van Baalen et al. 2020, arXiv:2005.07093); `US`, `MS`: of one call on this machine.
    """

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Allowance:
        """`4bpw`, `200KB`, `2.5GBOP`, `1.5ms`; small letters do, too.

        Raises:
            SchemeError: it is no such text.
        """
        found = _AMOUNT.fullmatch(text.strip())
        unit = found[2].upper() if found else ""
        unit = unit if unit in _TIMES else unit.removesuffix("S")
        amount = float(found[1]) if found else 0.0
        if unit not in {"BPW", *_SIZES, *_OPERATIONS, *_TIMES} or not 0 < amount < float("inf"):
            raise SchemeError(
                f"A budget is bits per weight, a size, bit operations or time of one sample, such as 4bpw, 200KB, 2.5GBOP or 1.5ms, got {text!r}."
            )
        return cls(amount, unit)

    @property
    def counts_operations(self) -> bool:
        return self.unit in _OPERATIONS

    @property
    def microseconds(self) -> float | None:
        """Of a budget of time; None of others."""
        return self.amount * _TIMES[self.unit] if self.unit in _TIMES else None

    @property
    def noun(self) -> str:
        """What is counted."""
        return "bit operations" if self.counts_operations else "bits"

    def limit(self, weights: int) -> float:
        """How many of these may be spent on so many weights."""
        if self.counts_operations:
            return self.amount * _OPERATIONS[self.unit]
        return self.amount * _SIZES.get(self.unit, float(weights))

    def cost(self, weight: QTensor, products: float) -> float:
        """What one layer costs.

        Args:
            products: see `products_of`.
        """
        return products * weight.scheme.format.bits if self.counts_operations else float(held_bits(weight))


@torch.no_grad()
def products_of(program: Program, inputs: Sequence[torch.Tensor]) -> dict[str, float]:
    """Layer's module → its multiplications for one sample times the bits of its inputs; of a recurrent cell those of one step.

    Args:
        inputs: of the network, a batch of samples.
    """
    bits = {path: _input_bits(program, path) for path in program.layers.values()}
    found = {path: float(n * program.get_parameter(f"{path}.weight").numel()) for path, n in bits.items()}

    nodes = {node.name: node for node in program.graph.nodes}
    zeros = {path: _spread(nodes.get(layer)) for layer, path in program.layers.items()}

    def count(path: str) -> Any:
        def see(module: torch.nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            weight = module.get_parameter("weight")
            found[path] = bits[path] * output.numel() * weight[0].numel() / zeros[path] / len(inputs[0])

        return see

    hooks = [program.get_submodule(path).register_forward_hook(count(path)) for path in found]
    try:
        program(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _input_bits(program: Program, path: str) -> int:
    """Bits of what a layer reads; where it is rounded elsewhere, those of what flows in general."""
    number, _, module = path.partition(".")
    part = program.get_submodule(number)
    assert isinstance(part, Part)
    own = part.around(module.partition(".")[0]).rounder
    every = [program.get_submodule(name) for name in program.rounders.values()]
    rounders = [r for r in ([part.get_submodule(own)] if own else every) if isinstance(r, Rounder)]
    return min((math.ceil(math.log2(r.ends[1] - r.ends[0] + 1)) for r in rounders), default=_FLOAT_BITS)


def _spread(node: Node | None) -> int:
    """Of how many inputs a transposed convolution multiplies one that is not a zero between the others; 1 for other layers."""
    return math.prod(node.attrs.get("strides", ())) if node is not None and node.op == "ConvTranspose" else 1
