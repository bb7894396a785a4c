"""A linear layer whose weight stays in few bits.

Owns: `QLinear`, and several layers as one product (`joined_product`). The layer holds what the chosen kernel keeps of the
weight, as buffers that are no part of `state_dict()`: they are packed for this machine, and files are written from QTensors,
which `unpack` gives back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from arrondi.errors import SchemeError, ShapeError
from arrondi.formats import ActivationScheme, PerTensor, PerToken
from arrondi.kernels import KERNELS, Bound, Meta, choose, contiguous_groups, scattered_groups
from arrondi.kernels.native_linear import NATIVE, TRELLIS, join, pieces, product_of
from arrondi.kernels.product import Product
from arrondi.nn.gradients import through, times, wanted
from arrondi.nn.inputs import check_input, keep_grid, outlier_columns, round_inputs
from arrondi.nn.packed import PackedWeight, keep_types
from arrondi.rewrite.spread import check_block, spread, unspread
from arrondi.tensor.apart import Kept
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import Grid


class QLinear(nn.Module):
    """`y = x @ W.T + bias` with W packed.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        inputs: scheme by which x is rounded at every call; None leaves x alone.
        input_grid: its stored scale (and zero point) where it is static, the outer scale where it is local; else None.
        dtype: in which the product is computed; x is cast to it, and y cast back to the type of x.

    Raises:
        ShapeError: the weight is no matrix, or the bias does not fit.
        SchemeError: the kernel named by `ARRONDI_KERNEL` cannot run this layer, or the grid does not go with the inputs.
        DataError: the grid is no positive number.

    Gradients reach x and, where it is asked for, the bias; never the weight. Rounding x counts as the identity.
    `.to(dtype)` and `.half()` leave the packed weight as it is. Moving the layer to a device where its kernel does not
    run is a SchemeError.
    """

    bias: nn.Parameter | None
    order: torch.Tensor | None
    input_scale: torch.Tensor | None
    input_zero_point: torch.Tensor | None
    input_offset: torch.Tensor | None
    apart_index: torch.Tensor | None
    apart_values: torch.Tensor | None
    apart_change: torch.Tensor | None

    def __init__(
        self,
        weight: QTensor,
        bias: torch.Tensor | None = None,
        *,
        inputs: ActivationScheme | None = None,
        input_grid: Grid | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if len(weight.shape) != 2:
            raise ShapeError(
                f"QLinear takes a matrix (out, in), got shape {weight.shape}. Use QStack for fused experts."
            )
        self.out_features, self.in_features = rows, columns = weight.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ShapeError(
                f"The bias must have one number for each of {self.out_features} outputs, got {tuple(bias.shape)}."
            )
        self.spread = 0 if inputs is None else inputs.spread
        check_block(columns, self.spread)
        self.inputs = inputs = None if inputs is None else inputs.rounding
        keep_grid(self, inputs, input_grid)
        order: torch.Tensor | None = None
        self.apart, weight = weight.scheme.apart, self._keep_apart(weight)
        if weight.group_index is not None:
            weight, order = _sorted(weight)
        where, plain = weight.codes.device, weight.group_index is None
        kernel = choose(weight.scheme, weight.shape, dtype, where, plain=plain, inputs=inputs)
        self.kernel = kernel.name
        # In another order, columns would meet in other groups.
        apart = (
            order is not None and inputs is not None and not isinstance(inputs.scheme.granularity, PerToken | PerTensor)
        )
        inside = inputs is not None and not apart and kernel.rounds(weight.scheme, inputs)
        self.meta = Meta(weight.scheme, (rows, columns), dtype, inputs if inside else None)
        self._bound: _Bound | None = None
        for name, tensor in KERNELS[self.kernel].prepack(weight, dtype).items():
            self.register_buffer(f"packed_{name}", tensor, persistent=False)
        if order is None:
            self.order = None
        else:
            self.register_buffer("order", order, persistent=False)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in), any float dtype → (..., out), same dtype."""
        bias = self._parameters["bias"]
        if isinstance(x, torch.Tensor) and wanted(x, bias) and not _tracing():
            check_input(x)
            return through(x, bias, self._product, self._back)
        if type(x) is not torch.Tensor or x.dtype != self.meta.dtype or x.requires_grad or _tracing():
            return self._product(x)
        if self._bound is None or self._bound.bias is not bias or self._bound.version != _version(bias):
            self._bound = _Bound(bias, _version(bias), self._bind())
        return self._bound.product(x)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """The whole of it: casts, inputs that the kernel does not round itself, columns in the kernel's order."""
        check_input(x)
        values = x.to(self.meta.dtype)
        if self.spread:
            values = spread(values, self.spread)
        found = None if self.inputs is None else outlier_columns(values, self.inputs, self._whole_columns)
        kept, bias = values, None if self.bias is None else self.bias.to(self.meta.dtype)
        if found is not None:
            values = values.index_fill(-1, found.long(), 0.0)
        if self.inputs is not None and self.meta.inputs is None:
            values = round_inputs(values, self.inputs, self)
        y = self._multiply(values, self.meta, bias)
        if found is not None:
            y = y + self._outlier_product(kept, found)
        elif self.apart_index is not None:
            y = y + self._apart_product(kept)
        return y.to(x.dtype)

    def _back(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of x."""
        of_x = times(grad, lambda dtype: self.unpack().dequantize(dtype), self.meta.dtype)
        return unspread(of_x, self.spread) if self.spread else of_x

    def _multiply(self, values: torch.Tensor, meta: Meta, bias: torch.Tensor | None) -> torch.Tensor:
        """The kernel's product, with columns in its order."""
        if self.order is not None:
            values = values[..., self.order]
        return KERNELS[self.kernel].linear(values, self._tensors(), meta, bias)

    @property
    def _whole_columns(self) -> torch.Tensor | None:
        """The columns that are kept apart, (k,)."""
        return self.apart_index if self.apart is not None and self.apart.what == "columns" else None

    def _outlier_product(self, x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Features that keep their numbers times their columns of the weight, in floating point."""
        plain = replace(self.meta, inputs=None)
        if self._whole_columns is not None and len(columns) == len(self._whole_columns):
            assert self.apart_values is not None
            return x[..., columns.long()] @ self.apart_values.T.to(x.dtype)
        only = torch.zeros_like(x).index_copy_(-1, columns, x[..., columns])
        if len(columns) < x.numel() // x.shape[-1]:  # fewer columns than tokens: read them off the weight
            unit = x.new_zeros(len(columns), x.shape[-1])
            unit[torch.arange(len(columns), device=x.device), columns] = 1
            y = x[..., columns] @ self._multiply(unit, plain, None)
        else:
            y = self._multiply(only, plain, None)
        return y if self.apart_index is None else y + self._apart_product(only)

    def _apart_product(self, x: torch.Tensor) -> torch.Tensor:
        """What x gives with the difference between what is kept apart and what the codes mean there."""
        assert self.apart_index is not None
        change = self.apart_values if self.apart_change is None else self.apart_change
        assert change is not None
        change = change.to(x.dtype)
        if self._whole_columns is not None:
            return x[..., self.apart_index.long()] @ change.T
        row, column = self.apart_index.long() // self.in_features, self.apart_index.long() % self.in_features
        flat = x.reshape(-1, self.in_features).T
        y = flat.new_zeros((self.out_features, flat.shape[1])).index_add_(0, row, flat[column] * change[:, None])
        return y.T.reshape(*x.shape[:-1], self.out_features)

    def _keep_apart(self, weight: QTensor) -> QTensor:
        """Registers what is kept apart, and gives the weight without it."""
        kept = weight.apart
        if kept is None:
            self.apart_index = self.apart_values = self.apart_change = None
            return weight
        rest = replace(weight, scheme=replace(weight.scheme, apart=None), apart=None)
        change = kept.values - kept.taken(rest.dequantize())
        self.register_buffer("apart_index", kept.index.reshape(-1), persistent=False)
        self.register_buffer("apart_values", kept.values, persistent=False)
        if torch.equal(change, kept.values):
            self.apart_change = None
        else:
            self.register_buffer("apart_change", change, persistent=False)
        return rest

    @property
    def weight(self) -> PackedWeight:
        """Shape, compute dtype and device of the weight. Its numbers: `dequantize()`."""
        what = f"{self.meta.scheme} of shape {self.meta.shape}"
        return PackedWeight(torch.Size(self.meta.shape), self.meta.dtype, self._device, self.dequantize, what)

    @property
    def weight_nbytes(self) -> int:
        """Bytes that the packed weight holds in memory: codes, scales, zero points, column order."""
        others = (self.order, self.apart_index, self.apart_values, self.apart_change)
        tensors = [*(t for _, t in self._packed()), *(t for t in others if t is not None)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def unpack(self) -> QTensor:
        """The weight again: the same codes, scales, zero points, offsets and scheme.

        Groups that were scattered are again; those that were contiguous and numbered lose the numbers.
        """
        weight = KERNELS[self.kernel].unpack(self._tensors(), self.meta)
        weight = weight if self.order is None else scattered_groups(weight, self.order)
        if self.apart is None or self.apart_index is None or self.apart_values is None:
            return weight
        index = self.apart_index[None] if self._whole_columns is not None else self.apart_index
        return replace(weight, scheme=replace(weight.scheme, apart=self.apart), apart=Kept(index, self.apart_values))

    def dequantize(self) -> torch.Tensor:
        """The weight that the layer computes with, (out, in), in the compute dtype."""
        return self.unpack().dequantize(self.meta.dtype)

    def dense(self) -> torch.Tensor:
        """The weight for inputs as they are given, not spread: (out, in), in the compute dtype."""
        weight = self.dequantize()
        return unspread(weight.float(), self.spread).to(weight.dtype) if self.spread else weight

    @property
    def direct(self) -> bool:
        """Whether the kernel's product is all that the layer does with x that has been spread: it rounds x itself, in its order."""
        kept = self.apart is not None or (self.inputs is not None and self.inputs.outliers is not None)
        return (self.inputs is None or self.meta.inputs is not None) and self.order is None and not kept

    def _bind(self) -> Bound:
        """`_product` for x of the compute dtype, with what calls have in common worked out once where the kernel can."""
        bind = KERNELS[self.kernel].bind
        if bind is None or self.spread or not self.direct:
            return self._product
        return bind(self._tensors(), self.meta, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        # A pickled tensor brings all of its memory along, and `joined_product` lets layers share theirs.
        shared = {n: t for n, t in self._buffers.items() if t is not None and t.untyped_storage().nbytes() > t.nbytes}
        alone = self._buffers | {n: t.clone() for n, t in shared.items()}
        return self.__dict__ | {"_bound": None, "_buffers": alone}

    def extra_repr(self) -> str:
        rounding = "" if self.inputs is None else f", inputs={self.inputs}"
        rounding += f"/h{self.spread}" if self.spread else ""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bias={self.bias is not None}, weight={self.meta.scheme}{rounding}, kernel={self.kernel}"

    def _tensors(self) -> dict[str, torch.Tensor]:
        """What the kernel packed, and what it needs to round inputs on a static grid."""
        found = {n.removeprefix("packed_"): t for n, t in self._packed()}
        if self.meta.inputs is not None and not self.meta.inputs.dynamic:
            static = {"input_scale": self.input_scale, "input_zero_point": self.input_zero_point}
            found |= {n: t for n, t in static.items() if t is not None}
        return found

    def _packed(self) -> list[tuple[str, torch.Tensor]]:
        return [(n, t) for n, t in self._buffers.items() if n.startswith("packed_") and t is not None]

    @property
    def _device(self) -> torch.device:
        return self._packed()[0][1].device

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Moves buffers between devices; `keep_types` undoes what a cast of the model does to packed floats."""
        self._bound = None
        keep_types(self, lambda: super(QLinear, self)._apply(fn, recurse))
        where = self._device
        reason = KERNELS[self.kernel].refuse(self.meta.scheme, self.meta.shape, self.meta.dtype, where)
        if reason and where.type != "meta":
            raise SchemeError(
                f"{self.kernel} packed this layer for another device: {reason} Load the model on {where} anew."
            )
        return self


def joined_product(
    linears: Sequence[QLinear], *, norm: torch.Tensor | None = None, eps: float = 0.0, gate: str | None = None
) -> Product | str:
    """Layers that read the same x as one compiled product, outputs side by side; or one sentence why they cannot be.

    Their packed weights move together in memory, and each layer keeps its own as a view.

    Args:
        linears: of the same input width. If they spread x, it is given as it is afterwards.
        norm, eps, gate: see `arrondi.kernels.product.Product`.
    """
    for layer in linears:
        if layer.kernel not in (NATIVE.name, TRELLIS.name):
            return f"A layer runs on the kernel {layer.kernel}, and only {NATIVE.name} and {TRELLIS.name} compute norms, gates or more layers in the same call."
        if not layer.direct:
            return "A layer rounds or reorders its activations before the compiled product."
        if layer.spread and norm is not None:
            return "A layer spreads its activations between a norm and the compiled product."
        if layer.spread != linears[0].spread:
            return "Layers that read the same spread it in different ways."
    tensors, meta = linears[0]._tensors(), linears[0].meta
    if len(linears) > 1:
        found = join([(layer._tensors(), layer.meta) for layer in linears])
        if isinstance(found, str):
            return found
        tensors, meta = found
        for layer, piece in zip(linears, pieces(tensors, [layer.meta.shape[0] for layer in linears]), strict=True):
            layer._buffers.update({f"packed_{n}": view for n, view in piece.items() if f"packed_{n}" in layer._buffers})
            layer._bound = None
    biases = [torch.zeros(layer.out_features) if layer.bias is None else layer.bias.float() for layer in linears]
    bias = None if all(layer.bias is None for layer in linears) else torch.cat(biases)
    return product_of(tensors, meta, bias, norm=norm, eps=eps, gate=gate)


class _Bound(NamedTuple):
    """A product that may hold a copy of the bias, and by what its changes are noticed; those through `.data` may not be."""

    bias: torch.Tensor | None
    version: int
    product: Bound


def _version(bias: torch.Tensor | None) -> int:
    """Counts changes in place."""
    return 0 if bias is None or bias.is_inference() else bias._version


def _tracing() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _sorted(weight: QTensor) -> tuple[QTensor, torch.Tensor | None]:
    """Contiguous groups and the order of columns that makes them so; unchanged where sorting cannot help."""
    found = contiguous_groups(weight)
    if found is None:
        return weight, None
    weight, order = found
    return weight, None if torch.equal(order, torch.arange(order.numel(), device=order.device)) else order
