"""Which weight multiplies what, seen while a block runs.

Owns: `watch_products`, which reports every matrix product with a parameter (or with one matrix of a fused expert parameter),
and `find_stages`, the order in which a block's weights are used and which of them read the same input.

Found by watching calls, so linears, GPT-2's Conv1D and fused experts are all the same thing here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode


class Product(NamedTuple):
    """One product x · Wᵀ.

    Attributes:
        param: name of the parameter.
        matrix: which matrix of a 3-D parameter, else None.
        reduces_last: the sum runs over the parameter's last axis (False for Conv1D).
        x: the other operand, (…, n).
    """

    param: str
    matrix: int | None
    reduces_last: bool
    x: torch.Tensor


_LINEAR = {torch.nn.functional.linear}
_ADDMM = {torch.addmm, torch.Tensor.addmm}
_MATMUL = {
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.mm,
    torch.Tensor.mm,
    torch.bmm,
    torch.Tensor.bmm,
}


class _Watcher(TorchFunctionMode):
    def __init__(self, params: dict[str, torch.Tensor], report: Callable[[Product], None]) -> None:
        self._by_storage = {p.untyped_storage().data_ptr(): (n, p) for n, p in params.items()}
        self._report = report

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = None
        if func in _LINEAR:
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            operands = (kwargs["input"] if "input" in kwargs else args[0], weight, weight.ndim - 1)
        elif func in _ADDMM and len(args) == 3:
            operands = (args[1], args[2], 0)
        elif func in _MATMUL and len(args) == 2 and isinstance(args[1], torch.Tensor) and args[1].ndim >= 2:
            operands = (args[0], args[1], args[1].ndim - 2)
        if operands is not None:
            self._see(*operands)
        return func(*args, **kwargs)

    def _see(self, x: torch.Tensor, weight: torch.Tensor, axis: int) -> None:
        known = self._by_storage.get(weight.untyped_storage().data_ptr())
        if known is None:
            return
        name, param = known
        last = weight.stride(axis) == 1
        if param.ndim == 2 or weight.ndim == 2:
            size = param.shape[-1] * param.shape[-2]
            index = weight.storage_offset() // size if param.ndim == 3 else None
            self._report(Product(name, index, last, x))
        else:
            for e in range(param.shape[0]):
                self._report(Product(name, e, last, x[e]))


@contextlib.contextmanager
def watch_products(params: dict[str, torch.Tensor], report: Callable[[Product], None]) -> Iterator[None]:
    """Call `report` before every product with one of `params` inside the `with` block."""
    with _Watcher(params, report):
        yield


@dataclass
class Stage:
    """Weights of a block that can be rounded together: none depends on another's output.

    Attributes:
        leaders: parameter → the first parameter that reads the same input (itself, if it is the first).
        reduces_last: parameter → whether its last axis is the one summed over.
    """

    leaders: dict[str, str] = field(default_factory=dict)
    reduces_last: dict[str, bool] = field(default_factory=dict)


def find_stages(params: dict[str, torch.Tensor], run: Callable[[], object]) -> list[Stage]:
    """The stages of a block in the order of use; parameters that `run` does not multiply by are in none."""
    inputs: dict[str, torch.Tensor] = {}
    last: dict[str, bool] = {}

    def report(product: Product) -> None:
        inputs.setdefault(product.param, product.x)  # keeping x alive keeps its address its own
        last.setdefault(product.param, product.reduces_last)

    with watch_products(params, report):
        run()
    stages: list[Stage] = []
    seen: dict[tuple[Any, ...], tuple[Stage, str]] = {}
    for param, x in inputs.items():
        key = (x.data_ptr(), tuple(x.shape), x.stride())
        same_input = params[param].ndim == 2 and key in seen
        stage, leader = seen[key] if same_input else (Stage(), param)
        if not same_input:
            stages.append(stage)
            seen[key] = (stage, param)
        stage.leaders[param] = leader
        stage.reduces_last[param] = last[param]
    return stages
