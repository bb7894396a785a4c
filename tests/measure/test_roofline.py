"""The roofline on shapes of a moment: what is counted, and that everything is there."""

from __future__ import annotations

import json
import math

import pytest
import torch

from arrondi.errors import SchemeError
from arrondi.measure.roofline import OPERATORS, SCHEMES, _copies, bench

QUICK = 1e-4


@pytest.fixture(scope="module")
def document() -> dict:
    return bench([(64, 256)], [1, 5], seconds=QUICK)


def test_every_scheme_and_operator_has_its_rows(document: dict) -> None:
    rows = document["rows"]
    assert {row["operator"] for row in rows} == {*SCHEMES, *OPERATORS}
    assert len(rows) == len({*SCHEMES, *OPERATORS}) * 2 * 2
    assert {(row["dtype"], row["m"]) for row in rows} == {(d, m) for d in ("float32", "bfloat16") for m in (1, 5)}
    assert json.loads(json.dumps(document)) == document


def test_numbers_follow_from_each_other(document: dict) -> None:
    machine = document["machine"]
    assert machine["bandwidth_gb_s"] > 0
    assert {"torch.matmul"} < machine["peak_tflop_s"]["float32"].keys()
    assert all(value > 0 for found in machine["peak_tflop_s"].values() for value in found.values())
    for row in document["rows"]:
        seconds = row["ms"] / 1e3
        assert seconds > 0
        assert row["gb_s"] == pytest.approx(row["bytes"] / seconds / 1e9)
        assert row["bound"] in ("memory", "compute")
        assert 0 < row["share"] < math.inf
        if row["bound"] == "memory":
            assert row["share"] == pytest.approx(row["gb_s"] / machine["bandwidth_gb_s"])


def test_bytes_and_operations_by_hand() -> None:
    rows = bench([(64, 256)], [3], ["w=int4/g64/bfloat16", "hadamard", "quantize", "signs"], seconds=QUICK)["rows"]
    of = {(row["operator"], row["dtype"]): row for row in rows}
    # 64 × 256 half bytes, 64 × 4 scales of two bytes, and x and y; a kernel that keeps scales in float32 has 512 more.
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        row = of["w=int4/g64/bfloat16", dtype]
        assert row["bytes"] - 3 * (64 + 256) * size - 64 * 128 in (512, 1024)
        assert row["tflop_s"] * row["ms"] * 1e9 == pytest.approx(2 * 3 * 64 * 256)
        assert of["hadamard", dtype]["bytes"] == 2 * 3 * 256 * size
        assert of["quantize", dtype]["bytes"] == 3 * 256 * (size + 1)
        assert of["signs", dtype]["bytes"] == 64 * 256 // 8 + 3 * 256 * size + 3 * 64 * 4


def test_activations_are_rounded_inside_or_before() -> None:
    rows = bench([(32, 64)], [2], ["W8A8", "w=int8,a=fp8_e4m3/token"], seconds=QUICK)["rows"]
    assert len(rows) == 4


def test_learned_values_are_timed_with_any() -> None:
    rows = bench([(32, 64)], [2], ["w=lut4/g32", "w=lut5/channel,a=int8/token"], seconds=QUICK)["rows"]
    assert len(rows) == 4


def test_copies_are_equal_and_apart() -> None:
    arena = torch.ones(1 << 12, dtype=torch.uint8)
    tensors = [torch.arange(70, dtype=torch.uint8), torch.randn(3, 5)]
    copies = _copies(tensors, arena)
    assert len(copies) == (1 << 12) // (128 + 64)
    for copy in copies:
        assert all(torch.equal(a, b) for a, b in zip(copy, tensors, strict=True))
    assert len({copy[1].data_ptr() for copy in copies}) == len(copies)
    large = [torch.zeros(1 << 13, dtype=torch.uint8)]
    assert _copies(large, arena)[0][0] is large[0]


def test_unknown_names_and_sizes() -> None:
    with pytest.raises(SchemeError, match="W4A15"):
        bench([(64, 64)], [1], ["W4A15"], seconds=QUICK)
    with pytest.raises(SchemeError, match="positive"):
        bench([(64, 0)], [1], seconds=QUICK)
