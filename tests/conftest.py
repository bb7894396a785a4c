"""Small random models, every path of the compiled kernels, and the paths of real data where there is any."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from arrondi.native import native
from arrondi.sample import sample_path
from tests.zoo import ARCHITECTURES as ARCHITECTURES
from tests.zoo import VOCABULARY as VOCABULARY
from tests.zoo import build

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers in each run and in any order: what passes here passes everywhere."""
    torch.manual_seed(0)


@pytest.fixture(params=[] if native is None else [name for name, missing in native.paths() if missing is None])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every path of the compiled kernels that runs here, one after another."""
    assert native is not None
    before = native.path()
    native.use_path(request.param)
    yield request.param
    native.use_path(before)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`models("llama")` → directory of a random model, made once; read-only by agreement."""
    made: dict[tuple[Any, ...], Path] = {}

    def get(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        key = (name, dtype, repr(sorted(changes.items())))
        if key not in made:
            made[key] = build(name, tmp_path_factory.mktemp(name), dtype, **changes)
        return made[key]

    return get


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short English text: some 4,000 tokens of the sample's."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((sample_path() / "heldout.txt").read_text(encoding="utf-8")[:16000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data() -> Path:
    """Real models and texts, for tests marked `peer`; where they are is said by ARRONDI_DATA."""
    path = os.environ.get("ARRONDI_DATA", "")
    if not path or not Path(path).is_dir():
        if os.environ.get("ARRONDI_PEERS"):
            pytest.fail("make peers needs DATA=DIRECTORY of real models and texts")
        pytest.skip("ARRONDI_DATA does not name a directory of real models and texts")
    return Path(path)
