"""What rounding cost, in numbers with error bars. Pure functions on tensors, and two accumulators.

Owns: `token_nll`, `kl_divergence`, `top1_agreement`, `block_bootstrap`, `perplexity`, `Comparison`,
`EncoderComparison`.

Perplexity is exp(mean -ln p(token | context)); the divergence is KL(P‖Q) = Σ P (ln P - ln Q) in nats with the reference
first. Neighbouring tokens are not independent, so intervals come from resampling whole windows of text with replacement
(Künsch 1989, "The jackknife and the bootstrap for general stationary observations"; percentile intervals).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from arrondi.errors import DataError, ShapeError

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]

_CHUNK: Final = 1 << 20
"""Logits handled at a time: 8 MB in float64 for each of a few temporaries."""

_RESAMPLED: Final = 1 << 22
"""Numbers that a bootstrap draws at a time."""


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
    _same_shape(reference_logits, logits)
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
    """Whether both prefer the same token at each position, (..., V) twice → (...) bool.

    Raises:
        ShapeError: the shapes differ.
    """
    _same_shape(reference_logits, logits)
    return reference_logits.argmax(dim=-1) == logits.argmax(dim=-1).to(reference_logits.device)


def block_bootstrap(
    values: npt.ArrayLike,
    statistic: Callable[[Floats], npt.ArrayLike] | None = None,
    *,
    block: int,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of a statistic of a series, by resampling blocks of neighbours (circular block bootstrap).

    Args:
        values: (n,), in the order in which they depend on each other.
        statistic: (r, n) → (r,), one number for each row; None is the mean.
        block: neighbours drawn together; a series that depends over k steps wants blocks well above k.
        resamples: series drawn.
        seed: of a generator of its own; the same seed gives the same interval.
        confidence: share of resampled statistics inside the interval.

    Raises:
        DataError: no values, or a parameter out of range.

    Source: Politis and Romano 1992, "A circular block-resampling procedure for stationary data".
    """
    series = np.asarray(values, dtype=np.float64).reshape(-1)
    n = series.size
    if n == 0:
        raise DataError("The bootstrap needs at least one value, got none.")
    if block < 1 or resamples < 1 or not 0 < confidence < 1:
        raise DataError(
            f"The bootstrap needs block and resamples of at least 1 and a confidence between 0 and 1, "
            f"got block={block}, resamples={resamples}, confidence={confidence}."
        )
    block = min(block, n)
    generator = np.random.default_rng(seed)
    count = -(-n // block)
    step = max(_RESAMPLED // n, 1)
    found = []
    for start in range(0, resamples, step):
        starts = generator.integers(n, size=(min(step, resamples - start), count, 1))
        rows = series[((starts + np.arange(block)) % n).reshape(len(starts), -1)[:, :n]]
        found.append(np.asarray(rows.mean(axis=-1) if statistic is None else statistic(rows), dtype=np.float64))
    return _interval(np.concatenate(found), confidence)


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of one model on one text; the interval is for the mean over texts like this one."""

    perplexity: float
    perplexity_interval: Interval
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON; intervals become lists of two."""
        return _plain(self)


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
        """For JSON; intervals become lists of two."""
        return _plain(self)


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
        """For JSON; intervals become lists of two."""
        return _plain(self)


def perplexity(
    windows: Sequence[torch.Tensor], *, seed: int = 0, resamples: int = 1000, confidence: float = 0.95
) -> PerplexityResult:
    """exp(mean) of the `token_nll` of each window, with its interval.

    Args:
        windows: each (n,), the scored positions of one window; lengths may differ.

    Raises:
        DataError: no positions.
    """
    draw = _Draw(windows, seed, resamples, confidence)
    nll = torch.cat(list(windows))
    return PerplexityResult(_exp(draw.mean(nll)), _exp_interval(draw.mean_interval(nll)), draw.tokens)


class Comparison:
    """Collects a language model and its reference window by window; keeps four numbers for each position, never logits.

    Args:
        seed, resamples, confidence: of the bootstrap over windows. With a single window, short runs of its positions
            are resampled instead.
    """

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
        _same_shape(reference_logits, logits)
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
        draw = _Draw([w[0] for w in self._windows], self.seed, self.resamples, self.confidence)
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
        _same_shape(reference_hidden, hidden)
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
        draw = _Draw([w[0] for w in self._tokens], self.seed, self.resamples, self.confidence)
        whole = _Draw(self._sentences, self.seed, self.resamples, self.confidence)
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


class _Draw:
    """How often each window is in each resample; the statistics of positions then follow from sums over windows."""

    def __init__(self, windows: Sequence[torch.Tensor], seed: int, resamples: int, confidence: float) -> None:
        lengths = [len(w) for w in windows if len(w)]
        self.tokens = sum(lengths)
        if not self.tokens:
            raise DataError("Nothing was measured: no window has been added. Give a longer text.")
        if len(lengths) == 1:  # nothing to resample but the window's own parts
            size = round(self.tokens ** (1 / 3))
            lengths = [min(size, self.tokens - start) for start in range(0, self.tokens, size)]
        self.confidence = confidence
        self.window_of = np.repeat(np.arange(len(lengths)), lengths)  # (tokens,)
        count = len(lengths)
        self.times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)  # (r, W)

    def mean(self, values: torch.Tensor, weights: torch.Tensor | None = None) -> float:
        """Σ values / Σ weights over all positions; the weights are 1 when not given."""
        above, below = self._sums(values), self._sums(weights)
        return float(above.sum() / below.sum())

    def mean_interval(self, values: torch.Tensor, weights: torch.Tensor | None = None) -> Interval:
        """The interval of `mean`."""
        above, below = self._sums(values), self._sums(weights)
        return _interval((self.times @ above) / (self.times @ below), self.confidence)

    def quantile(self, values: torch.Tensor, share: float) -> float:
        """The smallest value that at least `share` of the positions do not exceed."""
        ranked = np.sort(_numbers(values))
        return float(ranked[max(int(np.ceil(share * ranked.size)) - 1, 0)])

    def quantile_interval(self, values: torch.Tensor, share: float) -> Interval:
        """The interval of `quantile`."""
        numbers = _numbers(values)
        order = np.argsort(numbers, kind="stable")
        found = []
        step = max(_RESAMPLED // numbers.size, 1)
        for start in range(0, len(self.times), step):
            seen = np.cumsum(self.times[start : start + step, self.window_of[order]], axis=-1)  # (r, tokens)
            rank = (seen < share * seen[:, -1:]).sum(axis=-1)
            found.append(numbers[order[rank]])
        return _interval(np.concatenate(found), self.confidence)

    def _sums(self, values: torch.Tensor | None) -> Floats:
        """The sum of each window, (W,)."""
        return np.bincount(self.window_of, None if values is None else _numbers(values)).astype(np.float64)


def _numbers(values: torch.Tensor) -> Floats:
    return values.detach().cpu().double().numpy()


def _interval(found: Floats, confidence: float) -> Interval:
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _exp(x: float) -> float:
    """Infinity instead of an overflow error."""
    with np.errstate(over="ignore"):
        return float(np.exp(x))


def _exp_interval(interval: Interval, less: float = 0.0) -> Interval:
    return _exp(interval[0]) - less, _exp(interval[1]) - less


def _plain(result: Any) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(result).items()}


def _position_chunks(logits: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """(first position, (positions, V)) pieces of about `_CHUNK` logits."""
    flat = logits.reshape(-1, logits.shape[-1])
    step = max(_CHUNK // max(flat.shape[-1], 1), 1)
    return [(start, flat[start : start + step]) for start in range(0, len(flat), step)]


def _joined(parts: list[torch.Tensor], logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    flat = torch.cat(parts) if parts else logits.new_empty(0, dtype=dtype)
    return flat.reshape(logits.shape[:-1])


def _same_shape(reference: torch.Tensor, other: torch.Tensor) -> None:
    if reference.shape != other.shape:
        shapes = f"{tuple(reference.shape)} and {tuple(other.shape)}"
        raise ShapeError(f"Both models must give the same shape, got {shapes}. Use the same text and tokenizer.")
