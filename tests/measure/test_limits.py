"""Limits: the upper end of the interval counts, and what cannot be measured is refused."""

from __future__ import annotations

import math

import pytest

from arrondi.documents import finite
from arrondi.errors import SchemeError
from arrondi.measure import Comparison, EncoderComparison, Limits, check_limits


def result(value: float, low: float, high: float, key: str = "kl_mean") -> dict:
    return finite({key: value, f"{key}_interval": [low, high]})


@pytest.mark.parametrize(
    ("value", "low", "high", "kept"),
    [
        (0.01, 0.008, 0.019, True),
        (0.01, 0.008, 0.02, True),
        (0.01, 0.008, 0.021, False),
        (0.03, 0.02, 0.04, False),
        (0.021, 0.008, 0.019, False),
        (math.inf, 0.01, math.inf, False),
        (0.01, 0.008, math.inf, False),
        (math.nan, math.nan, math.nan, False),
        (0.01, 0.008, math.nan, False),
    ],
)
def test_the_upper_end_counts(value: float, low: float, high: float, kept: bool) -> None:
    missed = Limits(kl=0.02).missed(result(value, low, high))
    assert (not missed) == kept
    if missed:
        assert missed[0].startswith("--max-kl 0.02 was missed: kl_mean is")


def test_a_miss_names_value_interval_and_limit() -> None:
    (sentence,) = Limits(kl=0.02).missed(result(0.01, 0.008, 0.021))
    expected = "kl_mean is 0.01, 95 % interval 0.008 … 0.021 (the upper end counts)."
    assert sentence == f"--max-kl 0.02 was missed: {expected}"
    (sentence,) = Limits(kl=1).missed(result(math.inf, 0.5, math.inf))
    assert "kl_mean is ∞, 95 % interval 0.5 … ∞." in sentence
    (sentence,) = Limits(ppl_increase=0.05).missed(result(0.06, 0.05, 0.07, "perplexity_increase"))
    assert sentence.startswith("--max-ppl-increase 0.05 was missed: perplexity_increase is 0.06")


def test_what_was_not_measured_misses() -> None:
    assert Limits(kl=1).missed({}) == ["--max-kl 1 was missed: kl_mean was not measured."]
    assert not Limits().missed({}) and not Limits() and Limits(kl=0.0)


def test_limits_of_models_without_a_distribution_over_tokens_are_refused() -> None:
    check_limits(Comparison.kind, 0.1, 0.1)
    check_limits(EncoderComparison.kind, None, None)
    with pytest.raises(SchemeError, match="--max-kl cannot be checked: this is no language model"):
        check_limits(EncoderComparison.kind, 0.1, None)
    with pytest.raises(SchemeError, match="--max-ppl-increase cannot be checked"):
        check_limits(EncoderComparison.kind, None, 0.1)


def test_a_limit_that_is_no_number() -> None:
    with pytest.raises(SchemeError, match="--max-kl takes a number, got nan"):
        Limits(kl=math.nan)
