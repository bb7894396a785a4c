"""Of which functions a gradient cannot bear that what they saved is rounded.

Owns: `exactly`. A gradient that multiplies by what was saved is off by as much as that was rounded, and right on average. One that takes its exponential,
divides by it or looks for the element that equals a maximum would be anything, or NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch.nn import functional as F


def _named(*names: str) -> frozenset[Any]:
    """The functions of PyTorch of these names, as such, as methods, and in place."""
    places = (torch, torch.Tensor, F, torch.special)
    return frozenset(
        getattr(place, full)
        for place in places
        for name in names
        for full in (name, f"{name}_")
        if hasattr(place, full)
    )


_WHOLE: Final = _named(
    # exponentials of what was saved
    "scaled_dot_product_attention", "cross_entropy", "nll_loss", "log_softmax", "logsumexp", "exp", "logaddexp", "logaddexp2", "logcumsumexp",
    "poisson_nll_loss", "kl_div", "ctc_loss",
    # quotients by it, or by how far it is from the end of a range
    "log", "log2", "log10", "log1p", "xlogy", "xlog1py", "logit", "reciprocal", "rsqrt", "sqrt", "prod", "cumprod", "acos", "acosh", "asin",
    "atanh", "erfinv", "entr", "atan2", "binary_cross_entropy", "gaussian_nll_loss", "__rtruediv__", "__rdiv__",
    # elements that equal it
    "amax", "amin", "aminmax", "max", "min", "median", "nanmedian",
)  # fmt: skip
_POWERS: Final = _named("pow", "float_power", "__pow__", "__ipow__")
_QUOTIENTS: Final = _named("div", "divide", "true_divide", "__truediv__", "__itruediv__", "__div__", "__idiv__")
_NORMS: Final = _named("batch_norm", "group_norm", "instance_norm", "layer_norm", "native_layer_norm", "rms_norm")
_ATTENTION: Final = F.multi_head_attention_forward


def exactly(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Callable[[torch.Tensor], bool] | None:
    """Which tensors that a call saves must stay as they are; None where rounding is borne.

    Args:
        func: a function or method of PyTorch, as it is called.
        args, kwargs: what it is called with.
    """
    if func in _WHOLE or (func in _POWERS and _below_one(_given(args, kwargs, 1, "exponent"))):
        return _every
    if func in _QUOTIENTS:
        below = _given(args, kwargs, 1, "other")
        return (lambda x: x.data_ptr() == below.data_ptr()) if _strided(below) else None
    if func in _NORMS:  # its statistics, fewer numbers than it normalises, are what is divided by
        x = _given(args, kwargs, 0, "input")
        return lambda saved: saved.numel() < x.numel()
    if func is _ATTENTION:  # inside it the products of queries and keys cannot be seen; their shapes can
        query, heads = _given(args, kwargs, 0, "query"), _given(args, kwargs, 4, "num_heads")
        batch = query.shape[1] if query.ndim == 3 else 1
        return lambda saved: saved.ndim > 2 and saved.shape[:2] == (batch, heads)
    return None


def _every(x: torch.Tensor) -> bool:
    return True


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _below_one(exponent: Any) -> bool:
    return isinstance(exponent, int | float) and exponent < 1


def _strided(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.layout is torch.strided
