"""Fused expert weights, kept in few bits.

Owns: `QStack`, `replace_parameter`. Mixture-of-experts modules of transformers 5 hold one 3-D parameter for all experts
and, with the experts implementation "eager", take one matrix of it at a time: `self.gate_up_proj[expert]`. A QStack
answers that index, and the product with all of them of models that know no other way (Llama 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from arrondi.errors import SchemeError, ShapeError
from arrondi.formats import Scheme
from arrondi.kernels import decoded, pack_weight, unpack_weight
from arrondi.nn.packed import keep_types
from arrondi.tensor.qtensor import QTensor

_PRODUCTS = (torch.bmm, torch.Tensor.bmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


@dataclass(frozen=True)
class _Piece:
    """One packed matrix: its facts, and the buffers that hold it."""

    scheme: Scheme
    shape: tuple[int, int]
    prefix: str
    names: tuple[str, ...]


class QStack(nn.Module):
    """A stack of E matrices, each decoded when it is asked for.

    Args:
        experts: for each expert the quantized pieces that make up its matrix, one below the other (gate and up).
            Schemes may differ; the columns and the total of rows may not.
        dtype: of the matrices that `stack[e]` gives.
        transposed: `stack[e]` is the transpose of the pieces' concatenation, (columns, rows).

    Raises:
        ShapeError: no experts, or the pieces do not make matrices of one shape.
    """

    def __init__(
        self, experts: Sequence[Sequence[QTensor]], *, dtype: torch.dtype = torch.float32, transposed: bool = False
    ) -> None:
        super().__init__()
        shapes = {_stacked_shape(pieces) for pieces in experts}
        if len(shapes) != 1:
            raise ShapeError(f"A stack needs experts of one shape, got {sorted(shapes)} from {len(experts)} experts.")
        (self._matrix,) = shapes
        self.dtype, self.transposed = dtype, transposed
        self._pieces = [
            [self._keep(q, f"packed_{e}_{p}_") for p, q in enumerate(pieces)] for e, pieces in enumerate(experts)
        ]

    def __getitem__(self, expert: int | torch.Tensor) -> torch.Tensor:
        """The matrix of one expert, `shape[1:]`, in `dtype`; a new tensor at every call.

        Args:
            expert: a number or a tensor of one element, negative from the end.

        Raises:
            IndexError: there is no such expert.
            ShapeError: more than one is asked for.
        """
        if isinstance(expert, torch.Tensor) and expert.numel() != 1:
            raise ShapeError(
                f"A QStack decodes one expert at a time, got {expert.numel()}. "
                'Set config._experts_implementation = "eager" on the model.'
            )
        e = int(expert)
        if not -len(self) <= e < len(self):
            raise IndexError(f"Expert {e} does not exist: the stack has {len(self)}.")
        e %= len(self)
        whole = torch.empty(self._matrix, dtype=self.dtype, device=self.device)
        start = 0
        for piece in self._pieces[e]:
            rows = piece.shape[0]
            decoded(self._tensors(piece), piece.scheme, piece.shape, self.dtype, out=whole[start : start + rows])
            start += rows
        return whole.T if self.transposed else whole

    def __len__(self) -> int:
        return len(self._pieces)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`x @ stack` and `torch.bmm(x, stack)`, one expert after the other, for models that multiply by all at once.

        Raises:
            SchemeError: any other function of torch; take the experts one by one.
        """
        x, stack = args if len(args) == 2 and not kwargs else (None, None)
        if func not in _PRODUCTS or not isinstance(stack, QStack) or not isinstance(x, torch.Tensor) or x.ndim != 3:
            raise SchemeError(
                f"{getattr(func, '__name__', func)} does not take packed experts, which are read one by one: stack[expert]. Keep these layers unquantized."
            )
        return torch.stack([x[e] @ stack[e] for e in range(len(stack))])

    def unpack(self) -> list[list[QTensor]]:
        """The pieces of every expert again, as they were given: the same codes, scales, zero points, offsets and schemes."""
        return [[unpack_weight(self._tensors(p), p.scheme, p.shape) for p in pieces] for pieces in self._pieces]

    @property
    def shape(self) -> torch.Size:
        """(E, a, b), that of the parameter it stands in for."""
        rows, columns = self._matrix
        return torch.Size((len(self), *((columns, rows) if self.transposed else (rows, columns))))

    @property
    def device(self) -> torch.device:
        """Where the packed tensors lie."""
        return next(self.buffers()).device

    @property
    def weight_nbytes(self) -> int:
        """Bytes that all experts hold in memory."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def extra_repr(self) -> str:
        schemes = sorted({str(piece.scheme) for pieces in self._pieces for piece in pieces})
        return f"{tuple(self.shape)}, weight={', '.join(schemes)}"

    def _keep(self, q: QTensor, prefix: str) -> _Piece:
        tensors = pack_weight(q)
        for name, tensor in tensors.items():
            self.register_buffer(prefix + name, tensor, persistent=False)
        return _Piece(q.scheme, (q.shape[0], q.shape[1]), prefix, tuple(tensors))

    def _tensors(self, piece: _Piece) -> dict[str, torch.Tensor]:
        return {name: self.get_buffer(piece.prefix + name) for name in piece.names}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        keep_types(self, lambda: super(QStack, self)._apply(fn, recurse))
        return self


def replace_parameter(module: nn.Module, name: str, stack: QStack) -> None:
    """Put `stack` where the parameter `name` of `module` was.

    Raises:
        ShapeError: the parameter has another shape.
    """
    old = module.get_parameter(name)
    if old.shape != stack.shape:
        shapes = f"{tuple(old.shape)}, the stack {tuple(stack.shape)}"
        raise ShapeError(f"Parameter {name} has shape {shapes}. Check the pieces and `transposed`.")
    delattr(module, name)
    module.register_module(name, stack)


def _stacked_shape(pieces: Sequence[QTensor]) -> tuple[int, int]:
    """(rows, columns) of the pieces, one below the other."""
    if not pieces or any(len(q.shape) != 2 for q in pieces) or len({q.shape[1] for q in pieces}) != 1:
        raise ShapeError(f"The pieces of an expert must be matrices of equal width, got {[q.shape for q in pieces]}.")
    return sum(q.shape[0] for q in pieces), pieces[0].shape[1]
