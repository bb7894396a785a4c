"""What a rounded cache costs: the text is read through it, and nothing else differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arrondi.errors import FileFormatError, SchemeError
from arrondi.measure.limits import Limits
from arrondi.runtime.kv import kv_cache
from arrondi.runtime.kv.measure import compare_caches, compare_with_cache
from tests.runtime.test_decoding import made

Models = Callable[..., Path]
IDS = [torch.arange(96).reshape(2, 48) * 31 % 95 + 2]


def test_only_rounding_costs_and_fewer_bits_cost_more():
    model = made("llama")
    found = {
        kind: compare_caches(model, model, IDS, lambda kind=kind: kv_cache(model, kind), chunk=5).summary().kl_mean
        for kind in ("full", "int8", "k=uint4/g16/offset,v=uint4/g16/offset", "k=uint2/g16/offset,v=uint2/g16/offset")
    }
    full, *others = found.values()
    assert abs(full) < 1e-6 and others == sorted(others) and others[0] > 1e-7 and others[2] > 4 * others[1]


def test_a_text_that_is_read_at_once_never_reads_a_rounded_key():
    model = made("llama")
    once, each = (
        compare_caches(model, model, IDS, lambda: kv_cache(model, "int8"), chunk=chunk).summary().kl_mean
        for chunk in (48, 1)
    )
    assert abs(once) < 1e-6 < each


def test_a_directory_is_measured(models: Models, text: Path):
    path = models("llama")
    found = compare_with_cache(path, path, text, "int8", seq_len=48, samples=3)
    assert 0 < found["kl_mean"] < 0.01 and found["windows"] == 3 and found["kv"] == "int8"
    assert "read 16 tokens at a time through a cache of the kind int8" in found["protocol"]
    with pytest.raises(SchemeError, match="these have 16"):
        compare_with_cache(path, path, text, "kivi2", seq_len=48, samples=3)


def test_what_cannot_be_measured_is_refused(models: Models, text: Path):
    llama = models("llama")
    with pytest.raises(FileFormatError, match="is another model than"):
        compare_with_cache(models("gemma2"), llama, text, "int8")
    with pytest.raises(SchemeError, match="one or more tokens at a time"):
        compare_with_cache(llama, llama, text, "int8", chunk=0, limits=Limits())
