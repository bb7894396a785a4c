"""A model against its reference, collected window by window: two accumulators and what they give.

Owns: `perplexity`, `Comparison` (language models) and `EncoderComparison` (models that give vectors), with their results.
Perplexity is exp(mean -ln p(token | context)). Results are dataclasses with the numbers as they are, infinite ones too; their
`to_dict` is for JSON (see `arrondi.documents`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from arrondi.documents import finite
from arrondi.errors import ShapeError
from arrondi.measure.intervals import Interval, WindowBootstrap
from arrondi.measure.metrics import kl_divergence, same_shape, token_nll, top1_agreement


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of one model on one text; the interval is for the mean over texts like this one."""

    perplexity: float
    perplexity_interval: Interval
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON: intervals become lists of two, and numbers that are none null."""
        return dict(finite(asdict(self)))


@dataclass(frozen=True)
class ComparisonResult:
    """A model against its reference on the same text, all numbers over the same `tokens` positions.

    `perplexity_increase` is relative, perplexity / reference_perplexity - 1, and its interval resamples both models
    together. Divergences are in nats.
    """

    perplexity: float
    perplexity_interval: Interval
    reference_perplexity: float
    reference_perplexity_interval: Interval
    perplexity_increase: float
    perplexity_increase_interval: Interval
    kl_mean: float
    kl_mean_interval: Interval
    kl_p99: float
    kl_p99_interval: Interval
    top1_agreement: float
    top1_agreement_interval: Interval
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON: intervals become lists of two, and numbers that are none null."""
        return dict(finite(asdict(self)))


@dataclass(frozen=True)
class EncoderResult:
    """An encoder against its reference: cosine of tokens, cosine of sentences (means of tokens), relative error.

    `relative_error` is Σ|h - r|² / Σ|r|² over all tokens, r the reference's hidden states.
    """

    token_cosine: float
    token_cosine_interval: Interval
    sentence_cosine: float
    sentence_cosine_interval: Interval
    relative_error: float
    relative_error_interval: Interval
    tokens: int
    sentences: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON: intervals become lists of two, and numbers that are none null."""
        return dict(finite(asdict(self)))


def perplexity(
    windows: Sequence[torch.Tensor], *, seed: int = 0, resamples: int = 1000, confidence: float = 0.95
) -> PerplexityResult:
    """exp(mean) of the `token_nll` of each window, with its interval.

    Args:
        windows: each (n,), the scored positions of one window; lengths may differ.

    Raises:
        DataError: no positions.
    """
    draw = WindowBootstrap(windows, seed, resamples, confidence)
    nll = torch.cat(list(windows))
    return PerplexityResult(_exp(draw.mean(nll)), _exp_interval(draw.mean_interval(nll)), draw.tokens)


class Comparison:
    """Collects a language model and its reference window by window; keeps four numbers for each position, never logits.

    Args:
        seed, resamples, confidence: of the bootstrap over windows. With a single window, short runs of its positions
            are resampled instead.
    """

    kind: ClassVar = "language model"

    def __init__(self, *, seed: int = 0, resamples: int = 1000, confidence: float = 0.95) -> None:
        self.seed, self.resamples, self.confidence = seed, resamples, confidence
        self._windows: list[torch.Tensor] = []  # (4, T - 1) float32: reference nll, nll, divergence, agreement

    @torch.no_grad()
    def add(self, reference_logits: torch.Tensor, logits: torch.Tensor, input_ids: torch.Tensor) -> None:
        """One batch of windows; position t predicts token t + 1, so T - 1 positions of each window count.

        Args:
            reference_logits, logits: (B, T, V), any float dtype.
            input_ids: (B, T).

        Raises:
            ShapeError: the shapes do not match, or T < 2.
        """
        same_shape(reference_logits, logits)
        if logits.ndim != 3 or logits.shape[:-1] != input_ids.shape or logits.shape[1] < 2:
            shapes = f"{tuple(logits.shape)} and {tuple(input_ids.shape)}"
            raise ShapeError(
                f"Expected logits (B, T, V) and input_ids (B, T) with T ≥ 2, got {shapes}. Add a batch axis?"
            )
        for reference, other, ids in zip(reference_logits, logits, input_ids, strict=True):
            reference, other, targets = reference[:-1], other[:-1], ids[1:]
            rows = (
                token_nll(reference, targets),
                token_nll(other, targets),
                kl_divergence(reference, other),
                top1_agreement(reference, other),
            )
            self._windows.append(torch.stack([r.to("cpu", torch.float32) for r in rows]))

    def summary(self) -> ComparisonResult:
        """The summary of all windows added so far.

        Raises:
            DataError: none were added.
        """
        draw = WindowBootstrap([w[0] for w in self._windows], self.seed, self.resamples, self.confidence)
        reference, nll, kl, agree = torch.cat(self._windows, dim=-1)
        return ComparisonResult(
            _exp(draw.mean(nll)),
            _exp_interval(draw.mean_interval(nll)),
            _exp(draw.mean(reference)),
            _exp_interval(draw.mean_interval(reference)),
            _exp(draw.mean(nll - reference)) - 1,
            _exp_interval(draw.mean_interval(nll - reference), less=1),
            draw.mean(kl),
            draw.mean_interval(kl),
            draw.quantile(kl, 0.99),
            draw.quantile_interval(kl, 0.99),
            draw.mean(agree),
            draw.mean_interval(agree),
            draw.tokens,
        )


class EncoderComparison:
    """Collects an encoder's hidden states and its reference's, sentence by sentence; keeps one number for each token.

    Args:
        seed, resamples, confidence: of the bootstrap over sentences.
    """

    kind: ClassVar = "encoder"

    def __init__(self, *, seed: int = 0, resamples: int = 1000, confidence: float = 0.95) -> None:
        self.seed, self.resamples, self.confidence = seed, resamples, confidence
        self._tokens: list[torch.Tensor] = []  # (3, T) float32: cosine, squared error, squared norm of the reference
        self._sentences: list[torch.Tensor] = []  # (1,) float32: cosine of the means

    @torch.no_grad()
    def add(
        self,
        reference_hidden: torch.Tensor,
        hidden: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
    ) -> None:
        """One batch of sentences.

        Args:
            reference_hidden, hidden: (B, T, D), or (B, D) with one vector for a sentence; any float dtype, computed in
                float64.
            input_ids: not used; there so that both comparisons are fed alike.
            mask: (B, T), zero at padding, which is left out; None counts every token.

        Raises:
            ShapeError: the shapes do not match.
        """
        same_shape(reference_hidden, hidden)
        if hidden.ndim == 2:
            reference_hidden, hidden = reference_hidden.unsqueeze(1), hidden.unsqueeze(1)
        if hidden.ndim != 3 or (mask is not None and mask.shape != hidden.shape[:-1]):
            shapes = f"{tuple(hidden.shape)} and {None if mask is None else tuple(mask.shape)}"
            raise ShapeError(
                f"Expected hidden states (B, T, D) and a mask (B, T) or None, got {shapes}. Add a batch axis?"
            )
        for i, (reference, other) in enumerate(zip(reference_hidden, hidden, strict=True)):
            keep = slice(None) if mask is None else mask[i].bool()
            a, b = reference[keep].cpu().double(), other[keep].cpu().double()  # (T, D)
            if len(a):
                rows = (torch.cosine_similarity(a, b, dim=-1), (b - a).square().sum(dim=-1), a.square().sum(dim=-1))
                self._tokens.append(torch.stack(rows).float())
                self._sentences.append(torch.cosine_similarity(a.mean(dim=0), b.mean(dim=0), dim=0).float().reshape(1))

    def summary(self) -> EncoderResult:
        """The summary of all sentences added so far; of one sentence alone the sentence interval has no width.

        Raises:
            DataError: none were added.
        """
        draw = WindowBootstrap([w[0] for w in self._tokens], self.seed, self.resamples, self.confidence)
        whole = WindowBootstrap(self._sentences, self.seed, self.resamples, self.confidence)
        cosine, error, norm = torch.cat(self._tokens, dim=-1)
        sentences = torch.cat(self._sentences)
        return EncoderResult(
            draw.mean(cosine),
            draw.mean_interval(cosine),
            whole.mean(sentences),
            whole.mean_interval(sentences),
            draw.mean(error, norm),
            draw.mean_interval(error, norm),
            draw.tokens,
            whole.tokens,
        )


def _exp(x: float) -> float:
    """Infinity instead of an overflow error."""
    with np.errstate(over="ignore"):
        return float(np.exp(x))


def _exp_interval(interval: Interval, less: float = 0.0) -> Interval:
    return _exp(interval[0]) - less, _exp(interval[1]) - less
