"""How a layer rounds what enters it.

Owns: `check_input`, `keep_grid`, `round_inputs` and `outlier_columns` for packed layers, and `RoundedInputs` for layers that keep
ordinary numbers. Scales
follow each tensor (dynamic), or are stored with the layer (static), or the outer
scale is stored and the inner ones follow (local: NVFP4). Stored numbers are buffers of the layer: `input_scale`,
`input_zero_point` and `input_offset`, one number each.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from arrondi.errors import DataError, SchemeError
from arrondi.formats import ActivationScheme, PerTensor, Scheme
from arrondi.rewrite.spread import spread
from arrondi.tensor.nearest import fake_quantize
from arrondi.tensor.ranges.grid import Grid

_NAMES: Final = ("input_scale", "input_zero_point", "input_offset")


def check_input(x: torch.Tensor) -> None:
    """Refuse an input whose results would be cut to whole numbers.

    Raises:
        DataError: it is no tensor of floating-point numbers.
    """
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise DataError(f"A packed layer takes floating-point numbers, got {kind}. Convert them first (.float()).")


def keep_grid(module: nn.Module, inputs: ActivationScheme | None, grid: Grid | None) -> None:
    """Register the stored part of the grid as buffers of the module, which are no part of `state_dict()`.

    Raises:
        SchemeError: the inputs need a stored grid and there is none, or the other way round, or it has other parts than the
            scheme.
        DataError: it has more than one scale, or one that is no positive number.
    """
    for name in _NAMES:
        setattr(module, name, None)
    if inputs is None or inputs.dynamic is True:
        if grid is not None:
            raise SchemeError(
                f"A stored grid of inputs is for static or local scales, got inputs={inputs}. Drop the grid."
            )
        return
    if grid is None:
        raise SchemeError(
            f"Inputs by {inputs} need a stored scale, and there is none. Pass input_grid, or use dynamic scales."
        )
    outer = _outer(inputs)
    parts = (grid.scale, grid.zero_point, grid.offset)
    wanted = (True, outer.zero_point == "integer", outer.zero_point == "float")
    if tuple(part is not None for part in parts) != wanted:
        raise SchemeError(f"The stored grid of inputs must have the parts of {outer}, got {_present(parts)}.")
    if not isinstance(outer.granularity, PerTensor):
        raise SchemeError(f"A stored grid of inputs has one scale for a whole tensor, got {outer}.")
    for name, part, dtype in zip(_NAMES, parts, (torch.float32, torch.int32, torch.float32), strict=True):
        if part is None:
            continue
        if part.numel() != 1 or not bool(torch.isfinite(part).all()):
            raise DataError(
                f"{name} must be one finite number, got {part.flatten()[:4].tolist()} in shape {tuple(part.shape)}."
            )
        delattr(module, name)
        module.register_buffer(name, part.detach().to(dtype).reshape(1).clone(), persistent=False)
    if not bool(grid.scale > 0):
        raise DataError(f"input_scale must be positive, got {float(grid.scale)}. Calibrate the layer again.")
    zero = grid.zero_point
    if zero is not None and not outer.format.qmin <= int(zero) <= outer.format.qmax:
        raise DataError(
            f"input_zero_point must be a code of {outer.format}, {outer.format.qmin} … {outer.format.qmax}, got {int(zero)}."
        )


def round_inputs(x: torch.Tensor, inputs: ActivationScheme, module: nn.Module) -> torch.Tensor:
    """`x` as it reads back after rounding, in its own dtype, with the grid that `keep_grid` gave the module.

    Gradients pass as if it were not rounded.

    Raises:
        DataError: x has NaN or infinity.
    """
    stored = None
    if inputs.dynamic is not True:
        stored = Grid(module.get_buffer("input_scale"), *(module._buffers.get(name) for name in _NAMES[1:]))
    return _straight(x, fake_quantize(x.detach(), inputs.scheme, stored, name="inputs"))


def outlier_columns(x: torch.Tensor, inputs: ActivationScheme, columns: torch.Tensor | None) -> torch.Tensor | None:
    """Which features of x (..., n) keep their numbers, ascending; None where none do.

    Args:
        inputs: says from which size on a feature is an outlier, if it says so.
        columns: those that meet columns of the weight which are kept apart, ascending; None: there are none.
    """
    if inputs.outliers is None:
        return columns
    large = (x.abs() >= inputs.outliers).reshape(-1, x.shape[-1]).any(0)
    if columns is not None:
        large[columns.long()] = True
    found = large.nonzero()[:, 0]
    return found if found.numel() else None


class RoundedInputs:
    """A forward pre-hook, registered `with_kwargs=True`, that spreads and rounds the first argument of a module.

    Gradients pass as if it were not rounded.

    Args:
        inputs: how.
        grid: the stored part of the grid; None where scales are dynamic.
        columns: features that are not rounded, because the weight keeps their columns apart; None: there are none.
        name: what the input is called in messages.
    """

    def __init__(
        self,
        inputs: ActivationScheme,
        grid: Grid | None,
        columns: torch.Tensor | None = None,
        *,
        name: str = "activation",
    ) -> None:
        self.inputs, self.grid, self.columns, self.name = inputs, grid, columns, name

    def _on(self, device: torch.device) -> None:
        """What is stored follows the inputs, which tell where the model runs."""
        if self.grid is not None and self.grid.scale.device != device:
            self.grid = self.grid.map(lambda part: part.to(device))
        if self.columns is not None:
            self.columns = self.columns.to(device)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the first one rounded."""
        if args:
            return (self._rounded(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: self._rounded(kwargs[first])}

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        self._on(x.device)
        if self.inputs.spread:
            x = spread(x, self.inputs.spread)
        values, columns = x.detach(), outlier_columns(x.detach(), self.inputs, self.columns)
        if columns is not None:
            values = values.index_fill(-1, columns.long(), 0.0)
        rounded = fake_quantize(values, self.inputs.scheme, grid=self.grid, name=self.name)
        if columns is not None:
            rounded[..., columns.long()] = x.detach()[..., columns.long()]
        return _straight(x, rounded)


def _straight(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """`rounded`, with the gradient of x."""
    return x + (rounded - x).detach() if x.requires_grad and torch.is_grad_enabled() else rounded


def _outer(inputs: ActivationScheme) -> Scheme:
    """The scheme of what is stored: of the numbers, or of their scales."""
    if inputs.dynamic is False:
        return inputs.scheme
    if not isinstance(inputs.scheme.scale, Scheme):
        raise SchemeError(
            f"Local scales are quantized by a stored outer scale, got {inputs.scheme}. Use dynamic scales."
        )
    return inputs.scheme.scale


def _present(parts: tuple[torch.Tensor | None, ...]) -> str:
    return ", ".join(name for name, part in zip(_NAMES, parts, strict=True) if part is not None) or "none"
