"""Whatever is given to a public function, the answer is a result or one sentence that an ArrondiError carries."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import arrondi
from arrondi.errors import ArrondiError

WEIGHT = torch.linspace(-1, 1, 16 * 32).reshape(16, 32)
LAYER = arrondi.parse_scheme("w=int4/g16")
SCHEME = LAYER.weights
ROUNDED = arrondi.quantize_tensor(WEIGHT, SCHEME)


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 16))


STRANGE: list[Any] = [
    None, "", "nonsense", 3, -1, 0, 2.5, float("nan"), True, b"x", [], {}, (1, 2), ["a"], object(), type, 10**30, "re:[",
    np.zeros((4, 8), np.float32), torch.zeros(4, 8), torch.zeros(0, 8), torch.tensor(1.0), torch.zeros(2, 3, 4),
    torch.zeros(4, 8, dtype=torch.int64), torch.full((4, 8), torch.nan), torch.zeros(4, 8, device="meta"),
    torch.zeros(4, 8).to_sparse(), torch.zeros(4, 8, dtype=torch.complex64), nn.Linear(4, 8), SCHEME, LAYER, ROUNDED,
    arrondi.PerGroup(8), arrondi.get_format("int4"), Path("/nonexistent/model"),
]  # fmt: skip

GOOD: dict[str, Callable[[], list[Any]]] = {
    "quantize_tensor": lambda: [WEIGHT, SCHEME],
    "fake_quantize": lambda: [WEIGHT, SCHEME],
    "rtn": lambda: [WEIGHT, SCHEME],
    "hqq": lambda: [WEIGHT, "w=int4/g16/offset"],
    "gptq": lambda: [WEIGHT, SCHEME, arrondi.SecondMoment.from_packed(torch.ones(32 * 33 // 2), 1)],
    "pack": lambda: [torch.zeros(4, 8, dtype=torch.uint8), 4],
    "unpack": lambda: [torch.zeros(4, 4, dtype=torch.uint8), 4, 8],
    "parse_scheme": lambda: ["W4A16"],
    "get_format": lambda: ["int4"],
    "codebook": lambda: ["mine", [-1, 0, 0.5, 1.0]],
    "PerChannel": lambda: [0],
    "PerGroup": lambda: [8],
    "PerBlock": lambda: [8, 8],
    "Scheme": lambda: [arrondi.get_format("int4"), arrondi.PerGroup(16)],
    "ActivationScheme": lambda: [arrondi.Scheme(arrondi.get_format("int8"), arrondi.PerToken())],
    "LayerScheme": lambda: [SCHEME],
    "QTensor": lambda: [ROUNDED.codes, ROUNDED.scale, None, None, SCHEME],
    "SecondMoment": lambda: [8],
    "Rule": lambda: [LAYER],
    "Recipe": lambda: [(arrondi.Rule(LAYER),)],
    "Limits": lambda: [0.1],
    "quantize": lambda: [module(), LAYER],
    "plan": lambda: ["/nonexistent/model", "W4A16"],
    "load": lambda: ["/nonexistent/model"],
    "inspect": lambda: ["/nonexistent/model"],
    "dequantize": lambda: ["/nonexistent/model", "/nonexistent/out"],
    "evaluate": lambda: ["/nonexistent/model", "/nonexistent/model", "text.txt"],
    "save": lambda: [module(), "/nonexistent/out"],
}
"""Public name → arguments that fit, before one of them is made strange."""
_UNUSED = {"name", "facts", "options", "progress", "planned"}


def calls(name: str) -> list[tuple[str, list[Any], dict[str, Any]]]:
    """(what is strange, arguments, keywords) with every argument strange once in every way."""
    parameters = list(inspect.signature(getattr(arrondi, name)).parameters.values())
    places = range(len(GOOD[name]()))
    found = []
    for i, value in itertools.product(places, STRANGE):
        args = GOOD[name]()
        args[i] = value
        found.append((f"argument {i}", args, {}))
    for parameter, value in itertools.product(parameters[len(places) :], STRANGE):
        if parameter.kind is not parameter.VAR_KEYWORD and parameter.name not in _UNUSED:
            found.append((parameter.name, GOOD[name](), {parameter.name: value}))
    return found


@pytest.mark.parametrize("name", GOOD)
def test_strange_arguments_are_refused_in_one_sentence(name: str) -> None:
    function = getattr(arrondi, name)
    for strange, args, keywords in calls(name):
        try:
            function(*args, **keywords)
        except ArrondiError as error:
            said = str(error)
            assert "\n" not in said and len(said) < 900, (strange, said)
        except Exception as error:
            pytest.fail(f"{name}: {strange} is strange: {type(error).__name__}: {error}")
