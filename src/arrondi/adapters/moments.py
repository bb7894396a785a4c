"""Second moments of what the layers of a quantized model are given: `input_moments`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.calibration import SecondMoment
from arrondi.model import OnDisk
from arrondi.pipeline import Recipe, TextOptions
from arrondi.pipeline.texts import read_texts
from arrondi.runtime.load import load

_BYTES: Final = 1 << 31
"""Of moments that are summed up in one pass over the text; more layers take more passes."""


@torch.no_grad()
def input_moments(
    source: OnDisk, base: Path, modules: Sequence[str], text: TextOptions, recipe: Recipe
) -> Iterator[tuple[str, torch.Tensor]]:
    """(module, Σ x xᵀ (n, n) float32) of every module.

    Args:
        source: the original, whose tokenizer is used.
        base: directory of the quantized model, which is run.
        modules: of its linear layers.
        text: calibration data.
        recipe: of the base; refused where it lacks data.
    """
    batches = read_texts(source, replace(text, evaluate=False), recipe).calibration_batches
    model = load(base, fuse=False)
    for part in _parts(model, modules):
        moments = {name: SecondMoment(model.get_submodule(name).in_features, name=name) for name in part}

        def see(name: str, sums: dict[str, SecondMoment]) -> Any:
            return lambda module, given: sums[name].update(given[0])

        hooks = [model.get_submodule(n).register_forward_pre_hook(see(n, moments)) for n in part]
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(input_ids=batch)
        for hook in hooks:
            hook.remove()
        for name, moment in moments.items():
            yield name, moment.matrix()


def _parts(model: Any, modules: Sequence[str]) -> Iterator[list[str]]:
    part: list[str] = []
    used = 0
    for name in modules:
        size = 4 * model.get_submodule(name).in_features ** 2
        if part and used + size > _BYTES:
            yield part
            part, used = [], 0
        part.append(name)
        used += size
    yield part
