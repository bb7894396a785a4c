"""Lists of pairs that are joined, and whether it matters that llama.cpp has them otherwise.

Owns: `pairs_of`, `scores_of` and `all_reached`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from arrondi.checkpoint.containers.gguf.tokens import BYTES
from arrondi.errors import SchemeError


def pairs_of(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The pairs that the model of a tokenizer.json joins, in its order."""
    for merge in model.get("merges") or []:
        one, two = merge.split(" ", 1) if isinstance(merge, str) else merge
        yield one, two


def scores_of(document: Mapping[str, Any]) -> dict[str, float]:
    """A score for every piece, so that joining the pair with the highest score does what the list of pairs does.

    llama.cpp joins whatever gives a piece, and has one score for a piece. That is the same where a list has all pairs that give a piece, one after
    another, and also where pairs that it leaves out never lie side by side.

    Raises:
        SchemeError: it is not the same.
    """
    model = document["model"]
    order = [piece for piece, _ in itertools.groupby(one + two for one, two in pairs_of(model))]
    if len(order) != len(set(order)):
        raise SchemeError("it merges the same piece early and late, and llama.cpp has one score for each piece.")
    if not ((not model.get("ignore_merges") and _all_pairs(document)) or all_reached(document)):
        raise SchemeError("some of its pieces are not what its merges make of their letters; llama.cpp would use them.")
    rank = {piece: i for i, piece in enumerate(order)}
    return {token: -float(rank.get(token, len(order))) for token in model.get("vocab") or {}}


def all_reached(document: Mapping[str, Any]) -> bool:
    """Whether merging the letters of a piece gives that piece, for all that merges make or whose parts are pieces.

    Then two neighbours that no merge names never lie side by side, so that it does not matter whether pairs or pieces have ranks, nor whether
    a word that is a piece is merged at all.
    """
    from tokenizers.models import BPE

    model = document["model"]
    pairs, vocabulary = list(pairs_of(model)), model.get("vocab") or {}
    merger, made = BPE(vocab=vocabulary, merges=pairs), {one + two for one, two in pairs}
    return all(
        [part.value for part in merger.tokenize(piece)] == [piece]
        for piece in _cut_out(document)
        if piece in made or any(_halves(piece, vocabulary))
    )


def _all_pairs(document: Mapping[str, Any]) -> bool:
    """Whether two pieces that give a piece are always a pair of the list."""
    model = document["model"]
    pairs, vocabulary = set(pairs_of(model)), model.get("vocab") or {}
    return all(pair in pairs for piece in _cut_out(document) for pair in _halves(piece, vocabulary))


def _cut_out(document: Mapping[str, Any]) -> Iterator[str]:
    """The pieces that texts are cut into: not those that are found before that, nor bytes."""
    before = {t["content"] for t in document.get("added_tokens") or []} | BYTES
    return (piece for piece in document["model"].get("vocab") or {} if piece not in before)


def _halves(piece: str, vocabulary: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The ways in which two pieces give this one."""
    for i in range(1, len(piece)):
        if piece[:i] in vocabulary and piece[i:] in vocabulary:
            yield piece[:i], piece[i:]
