"""A small quantized model, and the same model with ordinary weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import arrondi as ar


@pytest.fixture(scope="session")
def bases(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """`bases("NF4_DQ")` → directories of a quantized model and of its dequantized twin; read-only by agreement."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(scheme: str) -> tuple[Path, Path]:
        if scheme not in made:
            packed, plain = (tmp_path_factory.mktemp("base") / name for name in ("packed", "plain"))
            ar.quantize(models("llama"), scheme, out=packed, evaluate=False)
            ar.dequantize(packed, plain, "float32")
            made[scheme] = packed, plain
        return made[scheme]

    return get
