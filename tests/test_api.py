"""What users of Python get wrong is an ArrondiError with a way out; what works as a value works as a word."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import arrondi

BATCH = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32))


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "a tensor is no model": (lambda: arrondi.quantize(BATCH, "W4A16"), "model takes .*Module, got .*Tensor"),
    "a number is no scheme": (lambda: arrondi.quantize(net(), 4), "scheme takes a word .*got 4"),
    "a format is no scheme": (
        lambda: arrondi.quantize(net(), arrondi.get_format("int4")),
        "scheme takes a word .*class Format",
    ),
    "a function is no name": (
        lambda: arrondi.quantize(net(), method=arrondi.gptq),
        "method takes a word or None, got .*function",
    ),
    "nothing is no scheme": (lambda: arrondi.parse_scheme(None), "such as .W4A16., got None"),
    "nothing is no format": (lambda: arrondi.get_format(None), "number format is a word, got NoneType"),
    "a number in a rule": (lambda: arrondi.Rule(4), "A scheme is a word"),
    "a word is no rule": (lambda: arrondi.Recipe("W4A16"), "made of rules"),
    "a module is not planned": (lambda: arrondi.plan(net()), "model takes a word or a Path, got .*Sequential"),
    "nothing is not loaded": (lambda: arrondi.load(None), "path takes a word or a Path, got None"),
    "nothing is not inspected": (lambda: arrondi.inspect(None), "takes a word or a Path, got None"),
    "a module is not evaluated": (
        lambda: arrondi.evaluate(net(), net(), "x"),
        "takes a word or a Path, got .*Sequential",
    ),
    "batches of another width": (
        lambda: arrondi.quantize(net(), "w=int4/g32", method="gptq", calibration=[BATCH[:, 1:]]),
        "does not run on this data .*4x63 and 64x32",
    ),
    "batches of NumPy": (
        lambda: arrondi.quantize(net(), "w=int4/g32", method="gptq", calibration=[np.zeros((4, 64), np.float32)]),
        "batches as it is called .*ndarray",
    ),
    "an empty text": (lambda: arrondi.quantize(net(), "w=int4/g32", calibration=""), "got str"),
    "an output of a module": (lambda: arrondi.quantize(net(), out="x"), "it takes no out"),
    "a recipe and a method": (
        lambda: arrondi.quantize(net(), method="gptq", recipe=arrondi.Recipe((arrondi.Rule("W4A16"),))),
        "A recipe says method itself",
    ),
    "a recipe and targets": (
        lambda: arrondi.plan("m", targets=["Conv2d"], recipe=arrondi.Recipe((arrondi.Rule("W4A16"),))),
        "A recipe says targets itself",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_an_arrondi_error_that_says_what_is_wanted(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, words = WRONG[case]
    with pytest.raises(arrondi.ArrondiError, match=words):
        call()
    assert not list(tmp_path.iterdir())


def test_words_and_values_are_the_same_everywhere() -> None:
    word, value = "w=int4/g32", arrondi.parse_scheme("w=int4/g32")
    assert arrondi.Rule(word) == arrondi.Rule(value) == arrondi.Rule(value.weights)
    assert arrondi.Recipe([arrondi.Rule(word)]) == arrondi.Recipe.simple(value)
    weight = next(net().parameters()).detach()
    moment = arrondi.SecondMoment(64)
    moment.update(BATCH)
    for method in (arrondi.rtn, arrondi.hqq, arrondi.gptq):
        assert torch.equal(method(weight, word, moment).codes, method(weight, value.weights, moment).codes)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_token_ids_of_a_module_that_does_not_name_them(as_tuple: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 32))
    ids, weight = torch.randint(0, 50, (4, 7)), copy.deepcopy(model[1].weight.detach())
    arrondi.quantize(model, "w=int8/g32", method="gptq", calibration=[(ids,) if as_tuple else ids])
    wanted = torch.nn.functional.embedding(ids, model[0].weight) @ weight.T + model[1].bias
    torch.testing.assert_close(model(ids), wanted, rtol=0.02, atol=0.02)
