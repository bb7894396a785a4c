"""Who reads what is written, and who is known to compute something else: consumer × layout × scheme.

Owns: `readers_of`, which `plan`, `quantize` and the report print.
"""

from __future__ import annotations

from dataclasses import dataclass

from arrondi.checkpoint.layouts.layout import Layout, ModelFacts, Placed


@dataclass(frozen=True)
class Verdict:
    """What one reader does with an output.

    Attributes:
        reader: its name and version.
        ok: it loads the files and computes what `arrondi.load` computes.
        sentence: for people; says what differs where `ok` is false.
    """

    reader: str
    ok: bool
    sentence: str


def readers_of(placed: list[Placed], layout: Layout, facts: ModelFacts = ModelFacts()) -> list[Verdict]:
    """What every known reader does with these layers in this layout."""
    return [Verdict("arrondi", True, "arrondi reads it.")]
