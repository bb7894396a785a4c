"""How two models are compared: by what they compute from the same text, and product by product on the same inputs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import arrondi
from arrondi.kernels import FORCE
from arrondi.model import Instance
from arrondi.nn import QConv, QLinear
from tests.zoo import of_transformers

IDS = torch.randint(3, 2000, (4, 24), generator=torch.Generator().manual_seed(5))
SUMS = 3e-5
"""float32 sums in another order, through a few blocks of a lively random model; relative."""


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest number."""
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found - wanted).abs().max() / wanted.abs().max())


def divergence(reference: torch.Tensor, found: torch.Tensor, causal: bool) -> float:
    """By a plain loop: the mean KL of the next token, in nats, or the relative squared error of an encoder."""
    if not causal:
        return float((found - reference).double().square().sum() / reference.double().square().sum())
    total = count = 0.0
    for window, other in zip(reference.double(), found.double(), strict=True):
        for row, new in zip(window[:-1], other[:-1], strict=True):
            log_p, log_q = row.log_softmax(-1), new.log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
            count += 1
    return total / count


@contextmanager
def kernel(name: str) -> Iterator[None]:
    """Inside, products are computed by this kernel alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FORCE, name)
        yield


def packed(model: Any) -> dict[str, Any]:
    """The modules of `arrondi.load` that hold codes and multiply."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QLinear | QConv)}


def rounded_by_load(model: Any) -> set[str]:
    """Modules of `arrondi.load` whose inputs are rounded."""
    return {n for n, m in packed(model).items() if m.inputs is not None}


def rounded_by_transformers(model: Any) -> set[str]:
    """Modules of transformers, with compressed-tensors in it, whose inputs are rounded."""
    schemes = {n: getattr(m, "quantization_scheme", None) for n, m in model.named_modules()}
    return {n for n, s in schemes.items() if s is not None and s.input_activations is not None}


@contextmanager
def rounded_on_the_way() -> Iterator[set[str]]:
    """Collects the modules whose inputs `quantize` or `compare_models` round."""
    found: set[str] = set()
    usual = Instance.round_inputs

    def spy(self: Instance, inputs: Any) -> None:
        found.update(inputs)
        usual(self, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Instance, "round_inputs", spy)
        yield found


class Call(NamedTuple):
    """One product: what went in, what came out, and by how much two codes of an input that are others may move an output."""

    x: torch.Tensor
    y: torch.Tensor
    edge: float


Calls = dict[str, Call]


def products(model: Any, run: Callable[[Any], torch.Tensor]) -> tuple[torch.Tensor, Calls]:
    """What a model of `arrondi.load` computes, and the first product of each of its packed modules."""
    calls: Calls = {}
    hooks = []
    for name, module in packed(model).items():

        def keep(module: Any, args: Any, output: torch.Tensor, name: str = name) -> None:
            if name not in calls:
                x = args[0].detach().clone()
                step = 0.0 if module.inputs is None else float(x.abs().max()) / 127
                calls[name] = Call(x, output.detach().clone(), 2 * step * float(module.dequantize().abs().max()))

        hooks.append(module.register_forward_hook(keep))
    found = run(model)
    for hook in hooks:
        hook.remove()
    return found, calls


def wrong_product(model: Any, calls: Calls) -> str:
    """Which module of another model gives another output for the same input, "" if none does.

    The last bit of a quotient may move an input to its next code where it lies on the edge between two. This may happen to one
    row in twenty and must not cost more than the steps do.
    """
    for name, (x, y, edge) in calls.items():
        with torch.no_grad(), quiet():
            found = model.get_submodule(name)(x)
        rows = (found - y).abs().flatten(0, -2).amax(-1)
        exact, near = rows <= SUMS * y.abs().max(), rows <= edge
        moved = int((~exact).sum())
        if not bool((exact | near).all()) or moved > 1 + len(rows) // 20:
            return f"{name} is off in {moved} of {len(rows)} rows by up to {float(rows.max() / y.abs().max()):.1e}"
    return ""


def without_rounding(model: Any) -> Any:
    """A model of `arrondi.load`, on the kernel `reference`, that leaves all inputs as they are; changed in place."""
    for module in packed(model).values():
        assert getattr(module, "kernel", "reference") == "reference"
        module.inputs = None
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """No word of transformers about what it cannot load."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def loaded_by_transformers(name: str, folder: Path) -> Any:
    """A model as transformers loads it in float32, or what it says instead."""
    try:
        with quiet():
            return of_transformers(name, folder)
    except Exception as error:  # whatever it is, it has not loaded it
        return error


def loaded(folder: Path, by: str = "native", **options: Any) -> Any:
    """A model of `arrondi.load` on one kernel."""
    if by == "native":
        return arrondi.load(folder, **options)
    with kernel(by):
        return arrondi.load(folder, **options)
