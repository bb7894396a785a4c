"""Models of the contract, by both spellings; made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.cases import respelled
from tests.contract.measures import IDS, quiet
from tests.zoo import of_transformers, outputs


@pytest.fixture(scope="session")
def spelled(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`spelled("llama", "other")` → directory of a random model with these names; read-only by agreement."""
    made: dict[str, Path] = {}

    def get(model: str, spelling: str) -> Path:
        if spelling == "usual":
            return models(model)
        if model not in made:
            made[model] = respelled(models(model), tmp_path_factory.mktemp("other") / model, model)
        return made[model]

    return get


@pytest.fixture(scope="session")
def originals(models: Callable[..., Path]) -> Callable[[str], torch.Tensor]:
    """`originals("llama")` → what transformers computes with the unquantized model from `IDS`."""
    made: dict[str, Any] = {}

    def get(model: str) -> torch.Tensor:
        if model not in made:
            with quiet():
                made[model] = outputs(of_transformers(model, models(model)), IDS)
        found: torch.Tensor = made[model]
        return found

    return get
