"""What rounding cost at each position of a text, in numbers. Pure functions on logits.

Owns: `token_nll`, `kl_divergence`, `top1_agreement`. The divergence is KL(P‖Q) = Σ P (ln P - ln Q) in nats with the reference
first; it is infinite where Q excludes what P has.
"""

from __future__ import annotations

from typing import Final

import torch

from arrondi.errors import ShapeError

_CHUNK: Final = 1 << 20
"""Logits handled at a time: 8 MB in float64 for each of a few temporaries."""


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-ln p(target) at each position.

    Args:
        logits: (..., V), any float dtype; computed in float32, a few positions at a time.
        targets: (...), integers below V.

    Returns:
        (...) float32, in nats.

    Raises:
        ShapeError: the shapes do not match.
    """
    if logits.shape[:-1] != targets.shape:
        raise ShapeError(f"Logits {tuple(logits.shape)} need one target each, got targets {tuple(targets.shape)}.")
    wanted = targets.reshape(-1, 1).to(logits.device)
    parts = []
    for start, chunk in _position_chunks(logits):
        logp = torch.log_softmax(chunk.float(), dim=-1)
        parts.append(-logp.gather(-1, wanted[start : start + len(chunk)]).squeeze(-1))
    return _joined(parts, logits, torch.float32)


def kl_divergence(reference_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference ‖ other) at each position, Σ P (ln P - ln Q).

    In float64: in float32 the difference of two log-sums is wrong by 1e-6, as much as a good 8-bit model differs.

    Args:
        reference_logits, logits: (..., V), any float dtype. A reference logit of -inf contributes nothing.

    Returns:
        (...) float32, in nats, at least 0; infinite where Q is zero and P is not.

    Raises:
        ShapeError: the shapes differ.
    """
    same_shape(reference_logits, logits)
    flat = logits.reshape(-1, logits.shape[-1])
    parts = []
    for start, chunk in _position_chunks(reference_logits):
        logp = torch.log_softmax(chunk, dim=-1, dtype=torch.float64)
        logq = torch.log_softmax(flat[start : start + len(chunk)].to(logp.device), dim=-1, dtype=torch.float64)
        p = logp.exp()
        terms = (p * (logp - logq)).masked_fill_(p == 0, 0.0)
        parts.append(terms.sum(dim=-1).clamp_(min=0.0).float())
    return _joined(parts, reference_logits, torch.float32)


def top1_agreement(reference_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Whether both prefer the same token at each position, (..., V) twice → (...) bool. A NaN agrees with nothing.

    Raises:
        ShapeError: the shapes differ.
    """
    same_shape(reference_logits, logits)
    best = [t.argmax(dim=-1, keepdim=True) for t in (reference_logits, logits)]
    # argmax prefers a NaN, so the best logits are numbers where all are.
    known = [~t.gather(-1, b).isnan() for t, b in zip((reference_logits, logits), best, strict=True)]
    agree = (best[0] == best[1].to(best[0].device)) & known[0] & known[1].to(best[0].device)
    return agree.squeeze(-1)


def _position_chunks(logits: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """(first position, (positions, V)) pieces of about `_CHUNK` logits."""
    flat = logits.reshape(-1, logits.shape[-1])
    step = max(_CHUNK // max(flat.shape[-1], 1), 1)
    return [(start, flat[start : start + step]) for start in range(0, len(flat), step)]


def _joined(parts: list[torch.Tensor], logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    flat = torch.cat(parts) if parts else logits.new_empty(0, dtype=dtype)
    return flat.reshape(logits.shape[:-1])


def same_shape(reference: torch.Tensor, other: torch.Tensor) -> None:
    """Refuse outputs of two models that differ in shape."""
    if reference.shape != other.shape:
        shapes = f"{tuple(reference.shape)} and {tuple(other.shape)}"
        raise ShapeError(f"Both models must give the same shape, got {shapes}. Use the same text and tokenizer.")
