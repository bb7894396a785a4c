"""The error tree, the sentence for an unknown name, and what is said of any exception."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from arrondi import errors
from arrondi.errors import ArrondiError, DataError, OutputError, SchemeError, say, unknown

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
        ("", ["rtn", "gptq"], "Unknown method ''. Known: gptq, rtn."),
        (
            "FP8",
            ["MXFP8", "FP8A16", "FP8_X"],
            "Unknown method 'FP8'. Did you mean 'FP8A16' or 'FP8_X'? Known: FP8A16, FP8_X, MXFP8.",
        ),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, known: list[str], sentence: str) -> None:
    assert str(unknown("method", name, known)) == sentence


def test_the_kind_of_error_can_be_chosen() -> None:
    assert type(unknown("tensor", "a", ["b"], DataError)) is DataError


def test_a_hint_stands_instead_of_the_nearest_names() -> None:
    sentence = "Unknown scheme 'Q4'. Use W4A16. Known: Q4_X, W4A16."
    assert str(unknown("scheme", "Q4", ["W4A16", "Q4_X"], hint="Use W4A16.")) == sentence


def because(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def during(error: BaseException, first: BaseException) -> BaseException:
    error.__context__ = first
    return error


def system(number: int, file: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), file)


MEMORY, DESCRIPTORS = "out of memory. Use fewer --samples", "too many open files. Raise the limit (ulimit -n 4096)"

SAID: dict[str, tuple[Callable[[], BaseException], str, int]] = {
    "ours": (lambda: SchemeError("No.\nUse x."), "No. Use x.", 2),
    "our own system error": (lambda: OutputError("out: something is there."), "out: something is there.", 2),
    "Ctrl-C": (KeyboardInterrupt, "stopped.", 130),
    "memory": (MemoryError, MEMORY, 2),
    "memory, says torch": (lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), MEMORY, 2),
    "memory of a GPU": (lambda: RuntimeError("CUDA out of memory. Tried to allocate 2 GiB."), MEMORY, 2),
    "memory behind": (lambda: because(SchemeError("The model does not run."), MemoryError()), MEMORY, 2),
    "descriptors": (lambda: system(errno.EMFILE, "shard"), DESCRIPTORS, 2),
    "descriptors behind": (lambda: because(SchemeError("The model does not run."), system(errno.EMFILE)), DESCRIPTORS, 2),
    "descriptors before": (lambda: during(ValueError("no header"), system(errno.EMFILE)), DESCRIPTORS, 2),
    "disk": (lambda: system(errno.ENOSPC, "/x/y"), "/x/y: the disk is full. Free some space", 2),
    "permissions": (lambda: system(errno.EACCES, "/x/y"), "/x/y: Permission denied. Check the path and its permissions.", 2),
    "a bare system error": (lambda: OSError("what?"), "what?. Check the path and its permissions.", 2),
    "a defect": (lambda: TypeError("x is\nNone"), "this is a defect of arrondi, not of your input: TypeError: x is None", 1),
    "torch's defect": (lambda: RuntimeError("shape '[3]' is invalid"), "this is a defect of arrondi", 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAID)
def test_one_sentence_and_its_status(kind: str) -> None:
    make, sentence, status = SAID[kind]
    said = say(make())
    assert said.status == status
    assert said.sentence.startswith(sentence) and "\n" not in said.sentence


def test_what_was_hidden_on_purpose_is_not_looked_at() -> None:
    error = during(SchemeError("No."), MemoryError())
    error.__suppress_context__ = True
    assert say(error).sentence == "No."


@pytest.mark.parametrize("kind", BUILT_IN)
def test_a_message_is_one_printable_line_whatever_is_in_a_file(kind: str) -> None:
    error = getattr(errors, kind)("tensor a\nb\r\nc \x1b[2Jd \u202e \udcff é: no.")
    assert str(error) == r"tensor a b c \x1b[2Jd \u202e \udcff é: no."
    str(error).encode()
    assert str(getattr(errors, kind)("Plain – as ever.")) == "Plain – as ever."
