"""The compiled kernels, if they are there.

Owns: `native`, the extension module or None; which path of it runs; what every caller needs to hand it a tensor. Without
the extension (no compiler when arrondi was installed) everything works through PyTorch, and the first use says once that it
is slower.

`ARRONDI_CPU` forces a path (`avx512_bf16`, `avx512_vnni`, `avx_vnni`, `avx2`, `neon_i8mm`, `neon_dotprod`, `portable`); `none`
leaves the extension alone, which gives the slow twins everywhere.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from arrondi.errors import ArrondiError, unknown

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


def address(tensor: torch.Tensor | None) -> int:
    """Where a tensor's numbers begin; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
