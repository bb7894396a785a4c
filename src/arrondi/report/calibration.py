"""What a report says of calibration, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def calibration_lines(facts: Mapping[str, Any]) -> list[str]:
    """The text, how experts were reached, and how far statistics move inside it; see `arrondi.pipeline.coverage`."""
    return [*([_text(facts)] if "text" in facts else []), *_images(facts), *_experts(facts), *_moved(facts)]


def _text(facts: Mapping[str, Any]) -> str:
    share = facts["vocabulary_share"]
    known = "" if share is None else f" ({100 * share:.0f} % of the vocabulary)"
    lengths, documents = facts["document_tokens"], ""
    if lengths and facts["documents"] > 1:
        documents = f", from {facts['documents']:,} documents of {lengths['least']:,} to {lengths['most']:,} tokens"
    scripts = ", ".join(f"{name} {100 * share:.3g} %" for name, share in (facts["scripts"] or {}).items())
    return (
        f"Calibrated on {facts['windows']:,} windows of {facts['window_tokens']:,} tokens of {facts['text']}{documents}: "
        f"{facts['tokens']:,} tokens, {facts['distinct_tokens']:,} distinct{known}{f'; script: {scripts}' if scripts else ''}."
    )


def _images(facts: Mapping[str, Any]) -> list[str]:
    images = facts.get("images")
    if not images:
        return []
    return [
        f"Calibrated on {images['count']:,} images of {images['folder']}, {images['tokens']:,} positions with their questions."
    ]


def _experts(facts: Mapping[str, Any]) -> list[str]:
    experts = facts.get("experts")
    if not experts:
        return []
    tokens = experts["tokens"]
    return [
        f"{experts['matrices']:,} matrices of experts: {tokens['least']:,} to {tokens['most']:,} calibration tokens each, "
        f"{tokens['median']:,} in the middle{_everywhere(experts)}."
    ]


def _everywhere(experts: Mapping[str, Any]) -> str:
    count = experts.get("on_all_tokens")
    return f"; {count:,} that few tokens reached were calibrated on all tokens of their block" if count else ""


def _moved(facts: Mapping[str, Any]) -> list[str]:
    moved = facts.get("moved")
    if not moved:
        return []
    second, largest = moved["second_moments"], moved["absmax"]
    return [
        f"Between two halves of the text (every other batch), second moments of inputs change by {100 * second['median']:.0f} % "
        f"(worst {100 * second['worst']:.0f} %, {second['weight']}), largest values by {100 * largest['median']:.0f} % (worst {100 * largest['worst']:.0f} %)."
    ]
