"""The error tree and the sentence for an unknown name."""

from __future__ import annotations

import pytest

from arrondi import errors
from arrondi.errors import ArrondiError, DataError, unknown

BUILT_IN = {
    "ShapeError": ValueError,
    "SchemeError": ValueError,
    "DataError": ValueError,
    "FileFormatError": ValueError,
    "OutputError": OSError,
    "MissingExtraError": ImportError,
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_error_is_ours_and_also_the_built_in_kind(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, ArrondiError)
    assert issubclass(kind, BUILT_IN[name])
    assert name in (errors.__doc__ or ""), "the tree in the docstring lists it"


def test_the_tree_has_no_other_branches() -> None:
    assert {kind.__name__ for kind in ArrondiError.__subclasses__() if kind.__module__ == "arrondi.errors"} == set(
        BUILT_IN
    )


@pytest.mark.parametrize(
    ("name", "known", "sentence"),
    [
        ("gptqq", ["rtn", "gptq"], "Unknown method 'gptqq'. Did you mean 'gptq'? Known: gptq, rtn."),
        ("GPTQ", ["rtn", "gptq"], "Unknown method 'GPTQ'. Did you mean 'gptq'? Known: gptq, rtn."),
        ("w4a61", ["W4A16", "W8A8"], "Unknown method 'w4a61'. Did you mean 'W4A16'? Known: W4A16, W8A8."),
        ("zzz", ["rtn", "gptq"], "Unknown method 'zzz'. Known: gptq, rtn."),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, known: list[str], sentence: str) -> None:
    assert str(unknown("method", name, known)) == sentence


def test_the_kind_of_error_can_be_chosen() -> None:
    assert type(unknown("tensor", "a", ["b"], DataError)) is DataError
