"""Codes of a trellis ↔ numbers.

Owns: the values of its states (`state_values`), the lines that codes of a matrix form (`to_lines`, `from_lines`), `ring_values`, and `search`,
the codes whose values are nearest. Both run compiled where they can; `values_reference` and `search_reference` give the same bits.
"""

from __future__ import annotations

import functools
from typing import Final

import torch

from arrondi.errors import ShapeError
from arrondi.formats import Trellis
from arrondi.formats.trellis import RING
from arrondi.formats.trellis import SIDE as TILE
from arrondi.native import available, native, operand, threads

_COARSE: Final = 4
"""Most bits of a code whose error is squared as it is; that of others is doubled first, once for each bit more."""
_MUL1, _MCG, _3INST = 0x83DCD12D, 0xCBAC1FED, (89226354, 64248484)
_FINEST: Final = 9000.0
"""Steps of a standard deviation in which costs are counted: the largest values just fit 16 bits."""
_WINDOW: Final = 32
"""Places on each side of a ring's seam that are searched first; twice as many gain less than half a percent."""
_RENEW: Final = 16


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def state_values(trellis: Trellis) -> torch.Tensor:
    """The value of every state, float32 (2^L,), each exact; about normal, of variance 1 but for "bytes", which are integers.

    The functions of EXL3 compute in float16 and round once: y = s · 0.00677 - 10.38 fused, the sum of two halves.
    """
    states = torch.arange(2**trellis.state, dtype=torch.int64, device="cpu")
    if trellis.function in ("bytes", "mul1"):
        product = states * _MUL1 & 0xFFFFFFFF
        total = sum((product >> shift & 255) for shift in (0, 8, 16, 24))
        assert isinstance(total, torch.Tensor)
        if trellis.function == "bytes":
            return (total - 510).float()
        factor, addend = (float(_half(torch.tensor([bits]))) for bits in (0x1EEE, 0xC931))
        return ((total + 1024).double() * factor + addend).half().float()
    multiply, add = (_MCG, 0) if trellis.function == "mcg" else _3INST
    product = (states * multiply + add & 0xFFFFFFFF) & 0x8FFF8FFF ^ 0x3B603B60
    return (_half(product & 0xFFFF).float() + _half(product >> 16).float()).half().float()


def _half(bits: torch.Tensor) -> torch.Tensor:
    """Bit patterns as float16."""
    return torch.where(bits >= 2**15, bits - 2**16, bits).to(torch.int16).view(torch.float16)


@functools.lru_cache(maxsize=16)
def spread_of(trellis: Trellis) -> float:
    """The standard deviation of the values."""
    return float(state_values(trellis).double().square().mean().sqrt())


# ── lines ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_shape(shape: tuple[int, ...], trellis: Trellis) -> None:
    """Refuse a matrix that no rings fill.

    Raises:
        ShapeError: it is no matrix, has too few rows for a state, or is not made of whole tiles.
    """
    reason = refuse_shape(shape, trellis)
    if reason is not None:
        raise ShapeError(reason)


def refuse_shape(shape: tuple[int, ...], trellis: Trellis) -> str | None:
    """Why a matrix cannot be written by a trellis; None if it can."""
    if len(shape) != 2:
        return f"A trellis writes matrices (out, in), got shape {shape}. Pass each matrix of a stack."
    rows, columns = shape
    if trellis.ring != "rows" and (rows % TILE or columns % TILE):
        return f"{trellis.name} writes {trellis.ring}s of 16 rows and 16 columns, got {rows} × {columns}. Leave '{trellis.ring}' out."
    if rows * trellis.bits[0] < trellis.state and rows * columns:
        return (
            f"Rings of {rows} rows hold less than a state of {trellis.state} bits. Use integer groups for this layer."
        )
    return None


@functools.lru_cache(maxsize=1)
def _tile_order() -> torch.Tensor:
    """Place in a ring → place in a tile (in, out) of row-major order: groups of eight for the threads of a tensor core, (256,)."""
    place = torch.arange(RING, device="cpu")
    thread, j = place // 8, place % 8
    row = 2 * (thread % 4) + torch.tensor([0, 1, 8, 9])[j % 4]
    return row * TILE + thread // 4 + 8 * (j // 4)


def to_lines(x: torch.Tensor, trellis: Trellis) -> list[torch.Tensor]:
    """A matrix (m, n) as its rings: (rings, length) each, for rings of 256 and then for the longer or shorter ones."""
    rows, columns = x.shape
    if trellis.ring != "rows":
        squares = x.T.reshape(columns // TILE, TILE, rows // TILE, TILE).transpose(1, 2).reshape(-1, RING)
        return [squares[:, _tile_order().to(x.device)] if trellis.ring == "tile" else squares]
    whole = max(rows // RING - (rows % RING > 0), 0) * RING
    tall = x.T
    parts = [tall[:, :whole].reshape(-1, RING), tall[:, whole:]]
    return [part.contiguous() for part in parts if part.numel()]


def from_lines(lines: list[torch.Tensor], shape: tuple[int, ...], trellis: Trellis) -> torch.Tensor:
    """The inverse of `to_lines`."""
    rows, columns = shape
    if trellis.ring != "rows":
        squares = lines[0]
        if trellis.ring == "tile":
            squares = torch.empty_like(lines[0])
            squares[:, _tile_order().to(squares.device)] = lines[0]
        shaped = squares.reshape(columns // TILE, rows // TILE, TILE, TILE).transpose(1, 2)
        return shaped.reshape(columns, rows).T.contiguous()
    return torch.cat([part.reshape(columns, -1) for part in lines], 1).T.contiguous()


# ── values ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def ring_values(codes: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """The value of every code of a matrix.

    Args:
        codes: (m, n) uint8.

    Returns:
        float32 (m, n).
    """
    if not codes.numel():
        return codes.float()
    check_shape(tuple(codes.shape), trellis)
    return from_lines([_values(line, trellis) for line in to_lines(codes, trellis)], tuple(codes.shape), trellis)


def _values(codes: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    if codes.device.type != "cpu" or not available() or native is None:
        return values_reference(codes, trellis)
    values = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
    table = state_values(trellis)
    native.ring_values(
        *codes.shape, *trellis.bits, trellis.state, operand("codes", codes, codes.shape, torch.uint8),
        operand("table", table, table.shape, torch.float32), operand("values", values, values.shape, torch.float32), threads(),
    )  # fmt: skip
    return values


def values_reference(codes: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """The slow reference of the compiled values: (rings, length) codes → float32."""
    bits = _bits(codes.shape[1], trellis, codes.device)
    states = torch.zeros(codes.shape, dtype=torch.int64, device=codes.device)
    shift = torch.zeros_like(bits)
    for back in range(min(trellis.state, codes.shape[1])):
        states |= torch.where(shift < trellis.state, torch.roll(codes, back, 1).long() << shift.clamp(max=32), 0)
        shift = shift + torch.roll(bits, back)
    return state_values(trellis).to(codes.device)[states & (2**trellis.state - 1)]


def _bits(length: int, trellis: Trellis, device: torch.device) -> torch.Tensor:
    """Bits of the codes at every place."""
    return torch.tensor(trellis.bits, device=device)[torch.arange(length, device=device) % 2]


# ── search ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def ring_codes(column: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """The codes of one column (m,) in units of the values, uint8 (m,), for rings of rows."""
    lines = [search(part, trellis) for part in to_lines(column[:, None], trellis)]
    return from_lines(lines, (len(column), 1), trellis)[:, 0]


def search(targets: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """Codes whose values lie nearest to rings of numbers, in the sum of squares.

    Args:
        targets: (rings, length) float32, in units of the values; beyond four standard deviations of these all are one, and of codes of more
            than four bits beyond the values.

    Returns:
        uint8 (rings, length).

    The search is Viterbi's with costs of 16 bits, closed by a first one across the seam; "nearest" is within about one percent of the best.
    """
    steps, unit = _steps(trellis)
    if trellis.bits[1] > _COARSE:
        values = state_values(trellis)
        targets = targets.clamp(float(values.min()), float(values.max()))
    if targets.device.type != "cpu" or not available() or native is None:
        return search_reference(targets, trellis)
    codes = torch.empty(targets.shape, dtype=torch.uint8, device="cpu")
    native.search_rings(
        *targets.shape, *trellis.bits, trellis.state, operand("targets", targets, targets.shape, torch.float32), unit,
        operand("steps", steps, steps.shape, torch.int16), operand("codes", codes, codes.shape, torch.uint8), _WINDOW, threads(),
    )  # fmt: skip
    return codes


def search_seconds(trellis: Trellis) -> float:
    """About how long a core searches the codes of 10⁹ weights with AVX-512; up to half as long again with AVX2."""
    return 40.0 * 1.75 ** (trellis.state - 8) * (1.0 if trellis.state <= 12 else 1.25 ** (trellis.state - 12))


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _steps(trellis: Trellis) -> tuple[torch.Tensor, float]:
    """Values in steps, int16, with room behind the last; and steps of a unit."""
    unit = _FINEST / spread_of(trellis)
    steps = (state_values(trellis) * unit).round().clamp(-(2**15), 2**15 - 1).to(torch.int16)
    return torch.cat([steps, steps.new_zeros(64)]), unit


def search_reference(targets: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """The slow reference of `search`, for all rings at once: the same integers, so the same codes."""
    steps, unit = _steps(trellis)
    values = steps[: 2**trellis.state].to(targets.device, torch.int32)
    numbers = (targets * torch.tensor(unit, dtype=torch.float32, device=targets.device)).round()
    numbers = numbers.clamp(-(2**15), 2**15 - 1).int()
    rings, length = targets.shape
    side = min(_WINDOW, length // 2)
    picks, costs = _forward(
        numbers, values, trellis, length - side, length + side, numbers.new_zeros(rings, len(values))
    )
    seam = _back(picks, costs.min(1).values[:, None].eq(costs).int().argmax(1), trellis, length - side, length, length)[
        0
    ]
    begin = numbers.new_full((rings, len(values)), 65535)
    begin[torch.arange(rings, device=targets.device), seam] = 0
    picks, _ = _forward(numbers, values, trellis, 0, length, begin)
    return _back(picks, seam, trellis, 0, length, 0)[1]


def _forward(
    numbers: torch.Tensor, values: torch.Tensor, trellis: Trellis, first: int, last: int, costs: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The best predecessor of every state but for its newest code, place by place, and the costs at the end."""
    picks, length = [], numbers.shape[1]
    for j in range(first, last):
        place = j % length
        if (j - first) % _RENEW == _RENEW - 1:
            costs = costs - costs.min(1, keepdim=True).values
        bits = trellis.bits[place % 2]
        choices = costs.reshape(len(costs), 2**bits, -1)
        least, pick = choices[:, 0], torch.zeros_like(choices[:, 0])
        for number in range(1, 2**bits):
            pick = torch.where(choices[:, number] < least, number, pick)
            least = torch.minimum(least, choices[:, number])
        picks.append(pick)
        distance = (numbers[:, place, None] - values).clamp(-(2**15), 2**15 - 1)
        distance = (distance << max(bits - _COARSE, 0)).clamp(-(2**15), 2**15 - 1)
        costs = (least.repeat_interleave(2**bits, 1) + ((distance * distance + 2**14) >> 15)).clamp(max=65535)
    return picks, costs


def _back(
    picks: list[torch.Tensor], state: torch.Tensor, trellis: Trellis, first: int, length: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states before place `stop`, and the codes on the way there."""
    state, codes = state.long(), torch.zeros(len(state), length, dtype=torch.uint8, device=state.device)
    for j in range(first + len(picks) - 1, stop - 1, -1):
        bits = trellis.bits[j % length % 2]
        codes[:, j % length] = state & (2**bits - 1)
        kept = state >> bits
        state = picks[j - first].gather(1, kept[:, None])[:, 0].long() << (trellis.state - bits) | kept
    return state, codes
