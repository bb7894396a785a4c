"""Measuring what rounding cost: the data it is measured on, metrics with error bars, and the limits a user sets."""

from arrondi.measure.comparison import (
    Comparison,
    ComparisonResult,
    EncoderComparison,
    EncoderResult,
    PerplexityResult,
    perplexity,
)
from arrondi.measure.data import Data, Windows, read_windows
from arrondi.measure.intervals import WindowBootstrap, block_bootstrap
from arrondi.measure.limits import Limits, check_limits
from arrondi.measure.metrics import kl_divergence, token_nll, top1_agreement

__all__ = [
    "Comparison",
    "ComparisonResult",
    "Data",
    "EncoderComparison",
    "EncoderResult",
    "Limits",
    "PerplexityResult",
    "WindowBootstrap",
    "Windows",
    "block_bootstrap",
    "check_limits",
    "kl_divergence",
    "perplexity",
    "read_windows",
    "token_nll",
    "top1_agreement",
]
