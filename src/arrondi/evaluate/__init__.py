"""Measuring what rounding cost: metrics with error bars, and the text they are measured on."""

from arrondi.evaluate.metrics import (
    Comparison,
    ComparisonResult,
    EncoderComparison,
    EncoderResult,
    PerplexityResult,
    block_bootstrap,
    kl_divergence,
    perplexity,
    token_nll,
    top1_agreement,
)

__all__ = [
    "Comparison",
    "ComparisonResult",
    "EncoderComparison",
    "EncoderResult",
    "PerplexityResult",
    "block_bootstrap",
    "kl_divergence",
    "perplexity",
    "token_nll",
    "top1_agreement",
]
