"""Attention of one token to keys and values along principal directions: `attend_along`, and what of a `Basis` the kernel wants.

Keys become numbers four tokens at a time and are turned to their positions where they lie; of values the kernel sums codes, so that
directions are multiplied once for all tokens. What is not packed, the first tokens and the newest, joins the softmax here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch

from arrondi.native import native, operand, threads
from arrondi.tensor.spectrum import Basis, Turn

_STEP: Final = 32
"""Positions between two rows of the table of angles, as the kernel has it."""
_WIDEST: Final = 512
_PART: Final = 1024
"""Tokens that are worth a thread of their own."""
SPARE: Final = 16
"""Bytes behind the last token that the kernel may read."""


class Angles:
    """Cosines and sines of a rotary embedding, at every 32nd position and between them."""

    def __init__(self, frequencies: tuple[float, ...]) -> None:
        self.frequencies = torch.tensor(frequencies, dtype=torch.float64)
        self.steps = self._table(torch.arange(_STEP))
        self.starts = self._table(torch.arange(0))

    def _table(self, positions: torch.Tensor) -> torch.Tensor:
        """(positions, 2, half) float32; pairs that fill up the last sixteen do not turn."""
        angles = positions.double()[:, None] * self.frequencies
        filled = torch.zeros(len(positions), _up(len(self.frequencies)), dtype=torch.float64)
        filled[:, : angles.shape[1]] = angles
        return torch.stack([filled.cos(), filled.sin()], dim=1).float()

    def upto(self, stop: int) -> torch.Tensor:
        """`starts` for all positions before `stop`."""
        need = -(-stop // _STEP)
        if need > len(self.starts):
            self.starts = self._table(_STEP * torch.arange(need + need // 2 + 16))
        return self.starts


@functools.lru_cache(maxsize=16)
def _angles(frequencies: tuple[float, ...]) -> Angles:
    """The same table for all layers that turn alike."""
    return Angles(frequencies)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A basis as the kernel wants it.

    Attributes:
        bytes: of a token, those with codes of 8, 4 and 2 bits.
        size: numbers that a token unpacks to.
        places: (n,) int32: where among them each direction is.
        half, plain: channels that are turned by pairs, and others; multiples of sixteen.
        channels: (half + half + plain,) int64: the head's channel at each place; its width where there is none.
        rows: (heads, n, half + half + plain): what a code of each direction is worth.
        base: (heads, half + half + plain): what a token is whose codes are all 0.
        worth: (heads, size, half + half + plain): `rows` by place, zero where a token unpacks to noise.
    """

    bytes: tuple[int, int, int]
    size: int
    places: torch.Tensor
    half: int
    plain: int
    channels: torch.Tensor
    rows: torch.Tensor
    base: torch.Tensor
    worth: torch.Tensor
    angles: Angles | None

    @classmethod
    def of(cls, basis: Basis) -> Prepared:
        eight, four, two = basis.counts
        held = eight, four // 2, two // 4
        width = basis.mean.shape[-1]
        half, plain, channels = _order(width, basis.turn)
        rows = basis.back * basis.scale[..., None]
        base = basis.mean - (basis.levels()[:, None] / 2 * rows).sum(1)
        rows, base = (torch.nn.functional.pad(x, (0, 1))[..., channels].contiguous() for x in (rows, base))
        places, size = _places(held)
        worth = rows.new_zeros(rows.shape[0], size, rows.shape[2])
        worth[:, places] = rows
        turn = basis.turn
        angles = None if turn is None else _angles(tuple(turn.frequencies.tolist()))
        return cls(held, size, places.int(), half, plain, channels, rows, base, worth, angles)


class Stretch(NamedTuple):
    """Keys or values of one text.

    codes: (1, heads, tokens, bytes), contiguous; `SPARE` bytes follow the last of the tokens that are seen.
    first, stop: those of them that are seen.
    others: (1, heads, tokens, width) that are seen as they are.
    """

    codes: torch.Tensor
    first: int
    stop: int
    others: torch.Tensor


def available() -> bool:
    """Whether the extension is there and has this attention."""
    return hasattr(native, "attend_along")


def takes_along(query: torch.Tensor, keys: Prepared, values: Prepared) -> bool:
    """Whether `attend_along` computes this: one sequence, one new token, no gradients."""
    return (
        available()
        and type(query) is torch.Tensor
        and query.dim() == 4
        and query.shape[0] == query.shape[2] == 1
        and query.device.type == "cpu"
        and max(2 * keys.half + keys.plain, keys.size, values.size) <= _WIDEST
        and not (torch.is_grad_enabled() and query.requires_grad)
        and not torch.compiler.is_compiling()
    )


def attend_along(
    query: torch.Tensor, keys: tuple[Prepared, Stretch], values: tuple[Prepared, Stretch], position: int, scale: float
) -> torch.Tensor:
    """softmax(scale · q Kᵀ) V for what `takes_along`, computed in float32.

    Args:
        query: (1, heads, 1, width); every key head serves heads / key heads queries in a row.
        keys, values: the same tokens of both, at least one of them packed.
        position: in the text, of the first packed token that is seen.

    Returns:
        (1, 1, heads, width) in the type of the query.
    """
    (kp, k), (vp, v) = keys, values
    key_heads, count = k.others.shape[1], k.stop - k.first
    grouped = query.detach().float()[0, :, 0].unflatten(0, (key_heads, -1)) * scale
    heads = query.shape[1]
    padded = torch.nn.functional.pad(grouped, (0, 1))[..., kp.channels].contiguous()
    parts = max(min(-(-threads() // key_heads), count // _PART), 1)
    sums = torch.empty(parts, heads, vp.size)
    tops, totals = torch.empty(parts, heads), torch.empty(parts, heads)
    starts = None if kp.angles is None else kp.angles.upto(position + count)
    steps = None if kp.angles is None else kp.angles.steps
    module: Any = native
    module.attend_along(
        heads, key_heads, kp.half, kp.plain, count, parts, padded.data_ptr(), _side("keys", kp, k), _side("values", vp, v),
        len(kp.places), operand("rows", kp.rows, (key_heads, len(kp.places), len(kp.channels)), torch.float32),
        kp.places.data_ptr(), operand("base", kp.base, (key_heads, len(kp.channels)), torch.float32), position,
        0 if starts is None else starts.data_ptr(), 0 if steps is None else steps.data_ptr(), sums.data_ptr(),
        tops.data_ptr(), totals.data_ptr(), threads(),
    )  # fmt: skip
    others = grouped @ k.others[0].float().mT
    tops, totals = (x.unflatten(1, (key_heads, -1)) for x in (tops, totals))
    top = tops.amax(0)
    if others.shape[-1]:
        top = torch.maximum(top, others.amax(-1))
    weight = (tops - top).exp()
    along = (sums.unflatten(1, (key_heads, -1)) * weight[..., None]).sum(0) @ vp.worth
    packed, shares = (totals * weight).sum(0), (others - top[..., None]).exp()
    total = (
        along[..., : query.shape[3]]
        + packed[..., None] * vp.base[:, None, : query.shape[3]]
        + shares @ v.others[0].float()
    )
    return (total / (packed + shares.sum(-1))[..., None]).reshape(1, 1, heads, -1).to(query.dtype)


def _side(name: str, prepared: Prepared, side: Stretch) -> tuple[int, int, int, int, int]:
    heads, room, size = side.codes.shape[1], side.codes.shape[2], sum(prepared.bytes)
    at = operand(f"codes of {name}", side.codes, (1, heads, room, size), torch.uint8)
    if (room - side.stop) * size < SPARE:
        raise ValueError(f"{SPARE} bytes must follow the last of the {name}.")
    return at + side.first * size, room * size, *prepared.bytes


def _up(count: int) -> int:
    return -(-count // 16) * 16


def _places(held: tuple[int, int, int]) -> tuple[torch.Tensor, int]:
    """Where the directions are in what a token unpacks to, and the size of that: sixteen bytes at a time, by place in the byte."""
    places: list[int] = []
    begin = 0
    for count, per in zip(held, (1, 2, 4), strict=True):
        byte, code = torch.arange(count * per) // per, torch.arange(count * per) % per
        places += (begin + byte // 16 * 16 * per + code * 16 + byte % 16).tolist()
        begin += _up(count) * per
    return torch.tensor(places, dtype=torch.int64), begin


def _order(width: int, turn: Turn | None) -> tuple[int, int, torch.Tensor]:
    """Turned channels by halves, then the others, each filled up to a multiple of sixteen by a channel that is zero."""
    none, pairs = width, 0 if turn is None else len(turn.frequencies)
    channels = torch.arange(width)
    skipped = width - 2 * pairs if turn is not None and turn.last else 0
    part, rest = (
        channels[skipped : skipped + 2 * pairs],
        torch.cat([channels[:skipped], channels[skipped + 2 * pairs :]]),
    )
    one, two = (part[::2], part[1::2]) if turn is not None and turn.neighbours else (part[:pairs], part[pairs:])
    filled = [torch.cat([x, x.new_full((_up(len(x)) - len(x),), none)]) for x in (one, two, rest)]
    return len(filled[0]), len(filled[2]), torch.cat(filled)
