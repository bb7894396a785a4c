"""Trellis codes: values by a decoder written apart, the search against its slow twin and against the rate of normal numbers, rings and files."""

from __future__ import annotations

import pytest
import torch

from arrondi.errors import SchemeError, ShapeError
from arrondi.formats import Scheme, Turned, parse_scheme
from arrondi.formats.format import get_format
from arrondi.formats.trellis import Trellis
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.storage import load_codes, store_codes, stored_shape
from arrondi.tensor.trellis import (
    from_lines,
    ring_values,
    search,
    search_reference,
    spread_of,
    state_values,
    to_lines,
    values_reference,
)
from arrondi.tensor.turned import sides_of, turn, unturn


def of(name: str) -> Trellis:
    trellis = get_format(name).trellis
    assert trellis is not None
    return trellis


def normal(rings: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rings, length, generator=torch.Generator().manual_seed(seed))


def random_codes(rows: int, columns: int, trellis: Trellis) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 2 ** trellis.bits[1], (rows, columns), generator=generator, dtype=torch.uint8)
    if trellis.bits[0] < trellis.bits[1]:
        codes[::2] %= 2 ** trellis.bits[0]
    return codes


def walked(codes: list[int], trellis: Trellis) -> list[float]:
    """The values of one ring, a bit at a time: its line of bits is closed, and a state is the last L of them."""
    line: list[int] = []
    ends = []
    for place, code in enumerate(codes):
        bits = trellis.bits[place % 2]
        line += [code >> (bits - 1 - i) & 1 for i in range(bits)]
        ends.append(len(line))
    table = state_values(trellis).tolist()
    found = []
    for end in ends:
        state = 0
        for i in range(end - trellis.state, end):
            state = 2 * state + line[i % len(line)]
        found.append(table[state])
    return found


@pytest.mark.parametrize(
    ("name", "rows"),
    [("tcq2", 256), ("tcq3-l14", 300), ("tcq2-l9", 600), ("tcq2.5", 261), ("tcq1.5-l9", 40), ("tcq4-l8", 7)],
)
def test_values_are_those_of_a_walk_along_the_bits(name: str, rows: int) -> None:
    trellis = of(name)
    codes = random_codes(rows, 3, trellis)
    values = ring_values(codes, trellis)
    rings = [256, rows - 256] if rows >= 512 else [rows]
    for column in range(3):
        at = 0
        for length in rings:
            wanted = walked(codes[at : at + length, column].tolist(), trellis)
            assert values[at : at + length, column].tolist() == wanted
            at += length
    line = to_lines(codes, trellis)[0]
    assert torch.equal(values_reference(line, trellis), to_lines(values, trellis)[0])


def test_values_of_states_are_what_the_formulas_say() -> None:
    """By integers and by NumPy's float16, state by state."""
    import numpy as np

    some = [0, 1, 2, 77, 4095, 40000, 65535]
    halves = {name: state_values(of(f"tcq3-l16-{name}"))[some].tolist() for name in ("mul1", "mcg", "3inst")}
    plain = state_values(of("tcq3-l16"))[some].tolist()
    for i, x in enumerate(some):
        product = x * 0x83DCD12D % 2**32
        total = sum(product.to_bytes(4, "little"))
        assert plain[i] == total - 510
        fused = (1024 + total) * float(np.uint16(0x1EEE).view(np.float16)) + float(np.uint16(0xC931).view(np.float16))
        assert halves["mul1"][i] == float(np.float16(fused))
        for name, y in (("mcg", x * 0xCBAC1FED), ("3inst", x * 89226354 + 64248484)):
            bits = (y % 2**32 & 0x8FFF8FFF) ^ 0x3B603B60
            low, high = (np.uint16(part).view(np.float16) for part in (bits & 0xFFFF, bits >> 16))
            assert halves[name][i] == float(low + high)
    assert abs(spread_of(of("tcq2-l16-mul1")) - 1) < 0.01
    assert abs(spread_of(of("tcq2")) - 147.8) < 1


@pytest.mark.parametrize(
    ("name", "length"),
    [("tcq2-l10", 256), ("tcq4-l8", 37), ("tcq2.5-l9", 300), ("tcq1-l8", 64), ("tcq3.5-l10", 51), ("tcq3-l10", 256)],
)
def test_the_search_finds_the_codes_of_its_slow_twin(name: str, length: int) -> None:
    trellis = of(name)
    targets = normal(3, length) * spread_of(trellis) * torch.tensor([[1.0], [0.2], [3.0]])
    assert torch.equal(search(targets, trellis), search_reference(targets, trellis))


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("tcq2-l10", 0.0775),
        ("tcq2", 0.0726),
        ("tcq3", 0.0190),
        ("tcq4", 0.0052),
        pytest.param("tcq2-l14", 0.0703, marks=pytest.mark.full),
    ],
)
def test_normal_numbers_are_met_as_nearly_as_the_trellis_can(name: str, published: float) -> None:
    """Mean squares that a search with exact costs reaches on rings of 256; the limits are 1/16, 1/64 and 1/256."""
    trellis = of(name)
    x, wider = normal(120, 256), {2: 1.06, 3: 1.1, 4: 1.1}[trellis.bits[0]]
    values = values_reference(search(x * spread_of(trellis) / wider, trellis), trellis) / spread_of(trellis) * wider
    assert float((values - x).square().mean()) < 1.03 * published


def test_a_ring_that_a_trellis_can_write_is_found_again() -> None:
    trellis = of("tcq3-l10")
    values = values_reference(random_codes(256, 4, trellis).T.contiguous(), trellis)
    assert torch.equal(values_reference(search(values, trellis), trellis), values)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("tcq2", (300, 5)), ("tcq2.5", (257, 4)), ("tcq3-l16-3inst-tile", (32, 48)), ("tcq1.5", (700, 3))],
)
def test_lines_and_stored_codes_come_back(name: str, shape: tuple[int, int]) -> None:
    format, trellis = get_format(name), of(name)
    codes = random_codes(*shape, trellis) if trellis.ring == "rows" else random_codes(shape[0], shape[1], trellis)
    assert torch.equal(from_lines(to_lines(codes, trellis), shape, trellis), codes)
    stored = store_codes(codes, format)
    assert tuple(stored.shape) == stored_shape(shape, format)
    assert torch.equal(load_codes(stored, shape, format), codes)
    assert stored.numel() * 8 <= codes.numel() * trellis.rate + shape[1] * 15


def test_turning_is_orthogonal_and_blocks_of_rows_stand_alone() -> None:
    turned, weight = Turned(seed=3), normal(384, 96)
    sides = sides_of((384, 96), turned)
    there = turn(weight, sides, turned)
    assert torch.allclose(unturn(there, sides, turned), weight, atol=1e-5)
    assert torch.allclose(there.norm(), weight.norm())
    block = sides_of((128, 96), turned)
    assert torch.equal(block.rows, sides.rows[128:256])
    assert torch.allclose(turn(weight[128:256], block, turned), there[128:256], atol=1e-5)
    assert not torch.equal(sides_of((384, 96), Turned(seed=4)).columns, sides.columns)


def test_a_turned_tensor_is_signs_and_hadamard_around_its_values() -> None:
    scheme = parse_scheme("w=tcq2/channel/float16/rht128").weights
    codes = random_codes(256, 64, of("tcq2"))
    scale = normal(256, 1).abs().half().float()
    q = QTensor(codes, scale, None, None, scheme)
    hadamard = torch.ones(1, 1)
    for _ in range(6):
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    rows = torch.block_diag(*[torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)] * 2) / 128**0.5
    sides = sides_of((256, 64), Turned())
    wanted = (
        torch.diag(sides.rows)
        @ rows
        @ (ring_values(codes, of("tcq2")) * scale)
        @ (hadamard / 8)
        @ torch.diag(sides.columns)
    )
    assert torch.allclose(q.dequantize(), wanted, rtol=1e-4, atol=1e-2)
    assert q.bits_per_weight == 2 + 16 / 64


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("w=tcq2/g128", SchemeError),
        ("w=tcq2/channel/asym", SchemeError),
        ("w=int4/channel/rht128", SchemeError),
        ("w=tcq2/channel/rht100", SchemeError),
        ("w=tcq9/channel", SchemeError),
        ("w=tcq2-l20/channel", SchemeError),
        ("w=tcq2.5-l16-tile/channel", SchemeError),
    ],
)
def test_schemes_that_make_no_sense_are_refused(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        parse_scheme(text)


def test_matrices_that_no_rings_fill_are_refused() -> None:
    scheme = parse_scheme("w=tcq2/channel").weights
    with pytest.raises(ShapeError, match="less than a state of 12 bits"):
        QTensor(torch.zeros(4, 8, dtype=torch.uint8), torch.ones(4, 1), None, None, scheme)
    tiles = Scheme(get_format("tcq3-l16-3inst-tile"), parse_scheme("w=int8/tensor").weights.granularity)
    with pytest.raises(ShapeError, match="tiles of 16 rows"):
        QTensor(torch.zeros(24, 16, dtype=torch.uint8), torch.ones(1, 1), None, None, tiles)


@pytest.mark.parametrize(
    "text",
    ["TCQ2", "TCQ3.5", "TCQ2.5S", "w=tcq2-l14/channel/float16/rht128:7", "w=tcq3-l16-mcg-tile/tensor/rht128:sides"],
)
def test_the_grammar_says_them(text: str) -> None:
    scheme = parse_scheme(text)
    assert parse_scheme(str(scheme)) == scheme


@pytest.mark.parametrize("name", ["tcq2-square", "tcq2.5-l14-square"])
def test_squares_are_lines_of_columns(name: str) -> None:
    trellis = of(name)
    codes = random_codes(48, 32, trellis)
    values = ring_values(codes, trellis)
    for top in range(0, 48, 16):
        for left in range(0, 32, 16):
            line = [int(codes[top + row, left + column]) for column in range(16) for row in range(16)]
            wanted = torch.tensor(walked(line, trellis)).reshape(16, 16).T
            assert torch.equal(values[top : top + 16, left : left + 16], wanted)
    with pytest.raises(ShapeError, match="squares of 16 rows"):
        ring_values(codes[:40], trellis)
