"""A convolution whose weight stays in few bits.

Owns: `QConv`, and a kernel as the matrix that is quantized (`conv_matrix`) and back (`conv_weight`): one row for each output
channel, its inputs of a group times the kernel's places along it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from arrondi.errors import SchemeError, ShapeError
from arrondi.formats import ActivationScheme, PerTensor
from arrondi.kernels import decoded, pack_weight, unpack_weight
from arrondi.nn.gradients import through, wanted
from arrondi.nn.inputs import check_input, keep_grid, round_inputs
from arrondi.nn.packed import PackedWeight, keep_types
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import Grid

_TRANSPOSED: Final[dict[type[_ConvNd], Callable[..., torch.Tensor]]] = {
    nn.ConvTranspose1d: nn.functional.conv_transpose1d,
    nn.ConvTranspose2d: nn.functional.conv_transpose2d,
    nn.ConvTranspose3d: nn.functional.conv_transpose3d,
}
_KNOWN: Final[tuple[type[_ConvNd], ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def conv_matrix(weight: torch.Tensor, conv: _ConvNd) -> torch.Tensor:
    """The weight of a convolution as a matrix (out, in / groups · places of the kernel).

    Args:
        weight: (out, in / groups, …), or (in, out / groups, …) of a transposed convolution.
        conv: the module that it belongs to; only its numbers of channels and groups are read.
    """
    if not conv.transposed:
        return weight.reshape(conv.out_channels, -1)
    in_channels, out_channels, groups = conv.in_channels, conv.out_channels, conv.groups
    split = weight.reshape(groups, in_channels // groups, out_channels // groups, -1)
    return split.transpose(1, 2).reshape(out_channels, -1)


def conv_weight(matrix: torch.Tensor, conv: _ConvNd) -> torch.Tensor:
    """The inverse of `conv_matrix`."""
    in_channels, out_channels, groups = conv.in_channels, conv.out_channels, conv.groups
    if not conv.transposed:
        return matrix.reshape(out_channels, in_channels // groups, *conv.kernel_size)
    split = matrix.reshape(groups, out_channels // groups, in_channels // groups, -1)
    return split.transpose(1, 2).reshape(in_channels, out_channels // groups, *conv.kernel_size)


class QConv(nn.Module):
    """A convolution, transposed or not, with its weight packed; it is decoded for every call.

    Args:
        weight: (out, in / groups · places of the kernel), see `conv_matrix`.
        conv: the convolution that it stands in for: strides, padding, groups and bias are its own.
        inputs: scheme by which x is rounded at every call, with one scale for a tensor; None leaves x alone.
        input_grid: its stored scale (and zero point) where it is static; else None.
        dtype: in which the product is computed; x is cast to it, and y cast back to the type of x.

    Gradients reach x and, where it is asked for, the bias; never the weight. Rounding x counts as the identity.

    Raises:
        ShapeError: the weight does not fit the convolution.
        SchemeError: `conv` is of a class that is not known, or inputs are rounded by token or group.
    """

    bias: nn.Parameter | None
    input_scale: torch.Tensor | None
    input_zero_point: torch.Tensor | None
    input_offset: torch.Tensor | None

    def __init__(
        self,
        weight: QTensor,
        conv: _ConvNd,
        *,
        inputs: ActivationScheme | None = None,
        input_grid: Grid | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self._geometry = (_geometry(conv),)
        wanted = tuple(conv_matrix(conv.weight.detach(), conv).shape)
        if weight.shape != wanted:
            raise ShapeError(
                f"The weight of this convolution as a matrix is {wanted}, got shape {weight.shape}. Make it with conv_matrix."
            )
        if inputs is not None and not isinstance(inputs.scheme.granularity, PerTensor):
            raise SchemeError(
                f"Inputs of convolutions are rounded with one scale for a tensor, got {inputs}. Use 'tensor'."
            )
        self.scheme, self.shape, self.dtype, self.inputs = weight.scheme, (wanted[0], wanted[1]), dtype, inputs
        keep_grid(self, inputs, input_grid)
        for name, tensor in pack_weight(weight).items():
            self.register_buffer(f"packed_{name}", tensor, persistent=False)
        bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """x (batch, in, …) or (in, …) → (batch, out, …), same dtype; `output_size` as in PyTorch's transposed convolutions."""
        check_input(x)
        if wanted(x, self.bias) and not torch.compiler.is_compiling():
            back = partial(self._back, x.shape, output_size)
            return through(
                x, self.bias, partial(self._whole, output_size), back, -1 - len(self._geometry[0].kernel_size)
            )
        return self._whole(output_size, x)

    def _whole(self, output_size: list[int] | None, x: torch.Tensor) -> torch.Tensor:
        values = x.to(self.dtype)
        if self.inputs is not None:
            values = round_inputs(values, self.inputs, self)
        return self._convolved(values, output_size).to(x.dtype)

    def _back(self, shape: torch.Size, output_size: list[int] | None, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of x, which is the same wherever it is taken."""
        with torch.enable_grad():
            anywhere = torch.zeros(shape, dtype=self.dtype, device=grad.device, requires_grad=True)
            y = self._convolved(anywhere, output_size)
        return torch.autograd.grad(y, anywhere, grad.to(y.dtype), create_graph=grad.requires_grad)[0]

    def _convolved(self, values: torch.Tensor, output_size: list[int] | None) -> torch.Tensor:
        """The convolution of values of the compute dtype with the weight, decoded for this call."""
        conv = self._geometry[0]
        weight = conv_weight(decoded(self._tensors(), self.scheme, self.shape, self.dtype), conv)
        bias = None if self.bias is None else self.bias.to(self.dtype)
        if not isinstance(conv, _ConvTransposeNd):
            return conv._conv_forward(values, weight, bias)
        stride, padding, kernel, dilation = (
            [int(n) for n in part] for part in (conv.stride, conv.padding, conv.kernel_size, conv.dilation)
        )
        more = conv._output_padding(values, output_size, stride, padding, kernel, len(kernel), dilation)
        product = _TRANSPOSED[type(conv)]
        return product(values, weight, bias, conv.stride, conv.padding, more, conv.groups, conv.dilation)

    def unpack(self) -> QTensor:
        """The weight again, as a matrix: the same codes, scales, zero points, offsets and scheme."""
        return unpack_weight(self._tensors(), self.scheme, self.shape)

    @property
    def weight(self) -> PackedWeight:
        """Shape (of the kernel, as PyTorch has it), compute dtype and device. Its numbers: `unpack().dequantize()`."""
        conv, what = self._geometry[0], f"{self.scheme} of shape {self.shape}"
        device = self.get_buffer("packed_codes").device
        return PackedWeight(
            conv.weight.shape, self.dtype, device, lambda: conv_weight(self.unpack().dequantize(self.dtype), conv), what
        )

    @property
    def weight_nbytes(self) -> int:
        """Bytes that the packed weight holds in memory."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def extra_repr(self) -> str:
        rounding = "" if self.inputs is None else f", inputs={self.inputs}"
        return f"{self._geometry[0].extra_repr()}, weight={self.scheme}{rounding}"

    def _tensors(self) -> dict[str, torch.Tensor]:
        found = {n: t for n, t in self._buffers.items() if n.startswith("packed_") and t is not None}
        return {n.removeprefix("packed_"): t for n, t in found.items()}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        keep_types(self, lambda: super(QConv, self)._apply(fn, recurse))
        return self


def _geometry(conv: _ConvNd) -> _ConvNd:
    """The convolution without its numbers: strides, padding, groups, and PyTorch's own way to use them.

    Raises:
        SchemeError: it is of a class that is not known, or computes in a way of its own.
    """
    kind = next((kind for kind in _KNOWN if isinstance(conv, kind)), None)
    ways = ("forward", "_conv_forward", "_output_padding")
    if kind is None or any(getattr(type(conv), way, None) is not getattr(kind, way, None) for way in ways):
        known = ", ".join(k.__name__ for k in _KNOWN)
        raise SchemeError(f"QConv stands in for {known}, got {type(conv).__name__}. Keep this layer unquantized.")
    more: dict[str, Any] = {"output_padding": conv.output_padding} if issubclass(kind, _ConvTransposeNd) else {}
    return kind(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        device="meta",
        **more,
    )


def patches(x: torch.Tensor, conv: _ConvNd) -> torch.Tensor:
    """What a convolution multiplies, as a view: (batch, in, …) → (batch, *positions of the output, in, *places of the kernel).

    Args:
        x: what enters the module.
        conv: not transposed, padded with zeros by numbers.
    """
    padding = [int(n) for n in conv.padding for _ in range(2)]
    x = nn.functional.pad(x, padding[::-1])
    for i, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + i, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return x.movedim(1, 1 + len(conv.kernel_size))


def multiplied(x: torch.Tensor, layer: nn.Module, chosen: torch.Tensor) -> torch.Tensor:
    """Some of the rows that a linear layer or a convolution multiplies.

    Args:
        x: what enters the layer.
        chosen: numbers of positions of its output, over batch and space in their order.

    Returns:
        (len(chosen), groups, inputs of a group · places of the kernel).
    """
    if not isinstance(layer, _ConvNd):
        return x.reshape(-1, x.shape[-1])[chosen][:, None]
    rows = patches(x, layer)
    where = torch.unravel_index(chosen, rows.shape[: x.ndim - 1])
    return rows[where].reshape(len(chosen), layer.groups, -1)


def given(y: torch.Tensor, layer: nn.Module, chosen: torch.Tensor) -> torch.Tensor:
    """What a layer gives at the same positions, (len(chosen), outputs)."""
    return (y.movedim(1, -1) if isinstance(layer, _ConvNd) else y).reshape(-1, _outputs(layer))[chosen]


def positions(y: torch.Tensor, layer: nn.Module) -> int:
    """How many positions an output has, over batch and space."""
    return y.numel() // _outputs(layer)


def _outputs(layer: nn.Module) -> int:
    return layer.out_channels if isinstance(layer, _ConvNd) else len(layer.get_parameter("weight"))
