"""Whether a consumer's answer is what the files mean: `judged`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from arrondi.verification.difference import measure
from arrondi.verification.expected import Expected
from arrondi.verification.predict import Predicted
from arrondi.verification.process import Answer

_TOLD: Final = 8
"""Tokens that a sentence shows."""


def judged(answer: Answer, expected: Expected, predicted: Predicted, ids: Sequence[int]) -> dict[str, Any]:
    """The verdict on an answer.

    Args:
        answer: of the consumer.
        expected: how far it may be off.
        predicted: what it should give; it is held to the nearer of `exact` and `likely`.
        ids: how the text should be cut into tokens.

    Returns:
        `ok`, `max_difference`, `relative_difference`, `bound`, `reason`, `exact_difference`, `agreement` and `failure`; see
        `arrondi.verification.verify_model`.
    """
    cost = measure(predicted.moved, predicted.exact)
    assert not isinstance(cost, str)
    bound = expected.least + expected.times * cost.relative
    row: dict[str, Any] = {
        "ok": False, "max_difference": None, "relative_difference": None, "bound": bound, "reason": f"{expected.reason}.",
        "exact_difference": None, "agreement": None, "failure": None,
    }  # fmt: skip
    exact, likely = (measure(answer.values, p) for p in (predicted.exact, predicted.likely))
    if answer.failure or isinstance(exact, str) or isinstance(likely, str):
        return row | {"failure": answer.failure or str(exact)}
    near = min(exact, likely, key=lambda apart: apart.relative)
    failure, tokens = None, answer.about.get("tokens")
    if not near.relative <= bound:
        failure = (
            f"its outputs are {near.relative:.2g} off what the files mean here, and at most {bound:.2g} is expected"
        )
    elif tokens is not None and list(tokens) != list(ids):
        failure = f"it cuts the text into other tokens than the model's tokenizer does: {tokens[:_TOLD]} …, not {list(ids[:_TOLD])} …"
    return row | {
        "ok": failure is None,
        "max_difference": near.most,
        "relative_difference": near.relative,
        "exact_difference": exact.relative,
        "agreement": near.agree,
        "failure": failure,
    }
