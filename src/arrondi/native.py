"""The compiled kernels, if they are there.

Owns: `native`, the extension module or None; which path of it runs; `plain`, of which tensors it is asked; and `operand`, the only way to hand it one: an
address is given for a shape, type and layout that were checked, since the kernels read and write where they are told to.
Without the extension (no compiler when arrondi was installed) everything works through PyTorch, and the first use says once
that it is slower.

`ARRONDI_CPU` forces a path (`avx512_amx`, `avx512_bf16`, `avx512_vnni`, `avx_vnni`, `avx2`, `neon_i8mm`, `neon_dotprod`, `portable`); `none`
leaves the extension alone, which gives the slow references everywhere.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal

import torch

from arrondi.errors import ArrondiError, ShapeError, unknown

FORCE: Final = "ARRONDI_CPU"
"""Environment variable with the name of the path to run, or `none`."""

TYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Floating types as the extension numbers them."""


def _load() -> Any | None:
    forced = os.environ.get(FORCE, "").strip()
    if forced == "none":
        return None
    try:
        found = importlib.import_module("arrondi._native")
    except ImportError:
        if forced:
            raise ArrondiError(
                f"{FORCE}={forced} needs the compiled kernels, and this installation has none. Install a C++ compiler, then arrondi anew."
            ) from None
        return None
    if forced:
        reasons = dict(found.paths())
        if forced not in reasons:
            raise unknown(f"path in {FORCE}:", forced, [*reasons, "none"])
        if reasons[forced] is not None:
            raise ArrondiError(f"{FORCE}={forced} cannot run here: {reasons[forced]}. Unset it, or use portable.")
        found.use_path(forced)
    return found


native: Any | None = _load()
"""The extension module; None when it was not built or `ARRONDI_CPU=none`."""

_warned = False


def available() -> bool:
    """Whether the compiled kernels can be used; the first time they cannot, a warning says so."""
    global _warned
    if native is not None:
        return True
    if not _warned and os.environ.get(FORCE, "").strip() != "none":
        _warned = True
        warnings.warn(
            "arrondi was installed without its compiled kernels and runs on PyTorch alone, which is slower. Install a C++ compiler, then arrondi anew.",
            RuntimeWarning,
            stacklevel=2,
        )
    return False


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has products of bfloat16, without which PyTorch's are a hundred times slower than those of float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


_threads: int | None = None


def threads() -> int:
    """How many threads a kernel may use: as many as PyTorch, or as `kernel_threads` says."""
    return torch.get_num_threads() if _threads is None else _threads


@contextmanager
def kernel_threads(*, alone: bool) -> Iterator[None]:
    """With `alone`, PyTorch's own operators run on one thread inside, and the kernels on as many as PyTorch had before."""
    global _threads
    if not alone or native is None:
        yield
        return
    before, _threads = _threads, threads()
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        _threads = before


Dtypes = torch.dtype | tuple[torch.dtype, ...]

_Layout = Literal["contiguous", "rows", "last"]


def plain(x: torch.Tensor) -> bool:
    """Whether the numbers of a tensor lie in the memory of this machine: no subclass, which may be a shard or a mere description."""
    return type(x) in (torch.Tensor, torch.nn.Parameter) and x.is_cpu


def operand(
    name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], dtypes: Dtypes, layout: _Layout = "contiguous"
) -> int:
    """Where a tensor's numbers begin; 0 for None.

    Args:
        name: of the tensor, for messages.
        shape: that it must have.
        dtypes: the type that it must have, or several.
        layout: "contiguous"; "rows": a matrix whose rows are contiguous and do not overlap; "last": contiguous along the
            last axis, for tensors that are only read.

    Raises:
        ShapeError: it has another shape, type or layout, or is no ordinary tensor in the CPU's memory.
    """
    if tensor is None:
        return 0
    try:
        if (
            tensor.shape == shape
            and (tensor.dtype is dtypes or (type(dtypes) is tuple and tensor.dtype in dtypes))
            and tensor.is_cpu
            and (tensor.is_contiguous() or (layout != "contiguous" and _fits(tensor, layout)))
            and not tensor.is_neg()
        ):
            place = tensor.data_ptr()  # none for subclasses that keep their numbers elsewhere
            if place or not tensor.numel():
                return place
    except (AttributeError, RuntimeError):  # no tensor, or one whose layout has no strides or no memory
        pass
    raise ShapeError(_wrong(name, tensor, shape, dtypes, layout))


def check_ordinary(**tensors: object) -> None:
    """Refuse what is no strided tensor before its shape is asked for.

    Raises:
        ShapeError: names the first one.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            layout = f" with the layout {tensor.layout}" if isinstance(tensor, torch.Tensor) else ""
            raise ShapeError(f"{name} must be an ordinary torch.Tensor, got {type(tensor).__name__}{layout}.")


def _fits(tensor: torch.Tensor, layout: _Layout) -> bool:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return False
    return layout == "last" or (tensor.dim() == 2 and (tensor.shape[0] < 2 or tensor.stride(0) >= tensor.shape[1]))


_HOW: Final[dict[_Layout, str]] = {
    "contiguous": "contiguous",
    "rows": "with contiguous rows that do not overlap",
    "last": "contiguous along the last axis",
}


def _wrong(name: str, tensor: object, shape: tuple[int, ...], dtypes: Dtypes, layout: _Layout) -> str:
    types = " or ".join(str(d).removeprefix("torch.") for d in (dtypes if isinstance(dtypes, tuple) else (dtypes,)))
    wanted = f"{name} must be {tuple(shape)} in {types}, {_HOW[layout]}, on the CPU"
    if not isinstance(tensor, torch.Tensor):
        return f"{wanted}, got {type(tensor).__name__}. Pass a torch.Tensor."
    kind = f"{type(tensor).__name__} " if type(tensor) not in (torch.Tensor, torch.nn.Parameter) else ""
    strides = f", strides {tuple(tensor.stride())}" if tensor.layout is torch.strided else f", layout {tensor.layout}"
    view = ", a negated view" if tensor.layout is torch.strided and tensor.is_neg() else ""
    found = (
        f"{kind}{tuple(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}{strides}{view} on {tensor.device}"
    )
    return f"{wanted}, got {found}. Cast, move or copy it first (.to(), .contiguous())."
