"""A short run of the fuzzer, and that it would notice."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

import pytest

from arrondi.checkpoint.layouts.arrondi import digest
from tests.fuzz.checkpoints import READERS, base, mutant, run, verdict


def test_mutants_are_read_or_refused() -> None:
    with warnings.catch_warnings():
        result = run(list(READERS), seed=2026, mutants=120, seconds=300)
    assert result.mutants == 120 * len(READERS)
    assert not result.failures, result.failures[:3]


def test_the_same_seed_gives_the_same_mutants() -> None:
    of = base("arrondi", "NF4")
    assert mutant(of, random.Random("a")) == mutant(of, random.Random("a"))
    assert mutant(of, random.Random("a")) != mutant(of, random.Random("b"))


@pytest.mark.parametrize("reader", ["arrondi", "compressed-tensors"])
def test_a_number_that_is_silently_another_one_is_noticed(reader: str, tmp_path: Path) -> None:
    of = base(reader, "w=int4/g32")
    config = json.loads(json.dumps(of.config))
    assert verdict(reader, of, json.dumps(config).encode(), of.file, tmp_path) is None
    if reader == "arrondi":  # another meaning of the same bytes, signed
        tensors = config["quantization_config"]["tensors"]
        next(iter(tensors.values()))["scheme"] = "w=uint4/g32"
        config["quantization_config"]["digest"] = digest(tensors)
        assert "other numbers" in str(verdict(reader, of, json.dumps(config).encode(), of.file, tmp_path))
    damaged = bytearray(of.file)
    damaged[-40] ^= 1
    found = verdict(reader, of, json.dumps(of.config).encode(), bytes(damaged), tmp_path)
    assert found is None if reader == "compressed-tensors" else "other numbers" in str(found), "the package agrees"
