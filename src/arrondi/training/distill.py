"""Losses by which a network of few bits learns from the float one, and what they look at.

Owns: `attended`, which collects queries, keys and values; `direction_loss`, `hidden_loss`, `soft_loss`.

Source: Qin et al. 2022, arXiv:2203.06390 (BiBERT), direction-matching distillation. What attention weights look like is not taught: those of
one bit cannot look like the teacher's. The directions of queries, keys and values can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from arrondi.errors import DataError, SchemeError, ShapeError

EPS: Final = 1e-8
"""Added to a norm before anything is divided by it."""


class Attended(NamedTuple):
    """What one layer's attention was given, (batch, heads, tokens, width) each, with gradients."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


_NAME: Final = "arrondi-shown"
_shown: dict[int, tuple[Callable[..., Any], list[Attended]]] = {}


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any
) -> Any:
    inner, seen = _shown[id(module.config)]
    seen.append(Attended(query, key, value))
    return inner(module, query, key, value, *args, **options)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextmanager
def attended(model: Any) -> Iterator[list[Attended]]:
    """Inside, what every attention of a transformers model is given is put into the list, layer after layer and call after call.

    Raises:
        SchemeError: its attention is chosen by no config, or is none that takes the masks of `sdpa`.
    """
    config = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    name = "sdpa" if before == "eager" else before
    if name not in ("sdpa", "arrondi-bi", "arrondi-bi-half") or id(config) in _shown:
        raise SchemeError(
            f"Queries, keys and values are collected of a model whose attention is sdpa, eager or arrondi-bi, got {before}."
        )
    seen: list[Attended] = []
    _shown[id(config)] = (ALL_ATTENTION_FUNCTIONS[name], seen)
    assert config is not None
    config._attn_implementation = _NAME
    try:
        yield seen
    finally:
        config._attn_implementation = before
        del _shown[id(config)]


def direction_loss(
    student: Sequence[Attended], teacher: Sequence[Attended], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Σ over layers and over F of Q, K, V: the distance of F Fᵀ / √d of both, each divided by its norm, meaned over heads.

    Invariant to the scale of the student's F, and 0 where F = c · that of the teacher, c ≠ 0.

    Args:
        student, teacher: of the same batch, with as many layers and heads; their widths may differ.
        mask: (batch, tokens), 0 where a token is padding; None: none is.

    Raises:
        DataError: another number of layers.
        ShapeError: other heads or tokens.
    """
    if len(student) != len(teacher) or not student:
        raise DataError(f"Student and teacher have one list of layers each, got {len(student)} and {len(teacher)}.")
    total = student[0].query.new_zeros(())
    for own, wanted in zip(student, teacher, strict=True):
        for one, other in zip(own, wanted, strict=True):
            if one.shape[:3] != other.shape[:3]:
                raise ShapeError(
                    f"Student and teacher have heads and tokens alike, got {tuple(one.shape)} and {tuple(other.shape)}."
                )
            gap = _directions(one, mask) - _directions(other.detach(), mask)
            total = total + _norm(gap).mean()
    return total


def _directions(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x xᵀ / √d of every head, divided by its norm; padding is 0."""
    if mask is not None:
        x = x * mask[:, None, :, None].to(x.dtype)
    product = x @ x.transpose(2, 3) / x.shape[-1] ** 0.5
    return product / (_norm(product)[..., None, None] + EPS)


def _norm(x: torch.Tensor) -> torch.Tensor:
    """The Frobenius norm of matrices; its gradient at 0 is 0 and not NaN."""
    return (x.square().sum((-2, -1)) + EPS**2).sqrt()


def hidden_loss(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Σ over layers: the distance of hidden states (batch, tokens, width), each divided by its norm, meaned over the batch.

    Args:
        mask: as for `direction_loss`.

    Raises:
        DataError: another number of layers.
        ShapeError: another shape.
    """
    if len(student) != len(teacher) or not student:
        raise DataError(f"Student and teacher have one list of layers each, got {len(student)} and {len(teacher)}.")
    total = student[0].new_zeros(())
    for one, other in zip(student, teacher, strict=True):
        if one.shape != other.shape:
            raise ShapeError(
                f"Hidden states of student and teacher are alike, got {tuple(one.shape)} and {tuple(other.shape)}."
            )
        both = [x if mask is None else x * mask[..., None].to(x.dtype) for x in (one, other.detach())]
        own, wanted = (x / (_norm(x)[..., None, None] + EPS) for x in both)
        total = total + _norm(own - wanted).mean()
    return total


def soft_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Soft cross-entropy of logits (…, classes): -Σ softmax(teacher / t) · log softmax(student / t), meaned, times t²."""
    wanted = torch.softmax(teacher.detach() / temperature, dim=-1)
    own = torch.log_softmax(student / temperature, dim=-1)
    return -(wanted * own).sum(-1).mean() * temperature**2
