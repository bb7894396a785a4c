"""Attention of one token to keys and values that are packed: `attend_packed`, its slow reference, and what the kernel takes.

The kernel multiplies codes as they lie (see `arrondi.tensor.states`); scales are taken up by the query where they follow channels, and
by the sums of sixteen tokens or the weights of a token where they follow tokens.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch

from arrondi.errors import SchemeError
from arrondi.formats import ActivationScheme
from arrondi.native import TYPES, native, operand, threads
from arrondi.tensor.states import Lanes, real_states

_QUERIES: Final = (torch.float32, torch.bfloat16)
_WIDEST: Final = 256
_LONGEST: Final = 128


class Packed(NamedTuple):
    """Keys or values of one text, as they are kept.

    codes, scale, offset: buffers (1, heads, …) of `lanes`, whose first block holds token 0.
    first, stop: the tokens that are seen.
    unit: factor on every code where there are no scales.
    new: (1, heads, tokens, width), what follows, in the type of the query.
    """

    lanes: Lanes
    codes: torch.Tensor
    scale: torch.Tensor | None
    offset: torch.Tensor | None
    first: int
    stop: int
    unit: float
    new: torch.Tensor

    def restored(self) -> torch.Tensor:
        """The packed tokens as numbers, (1, heads, tokens, width) float32."""
        scale = self.unit if self.scale is None else self.lanes.read_scale(self.scale, self.first, self.stop)
        offset = None if self.offset is None else self.lanes.read_scale(self.offset, self.first, self.stop)
        return real_states(self.lanes.read(self.codes, self.first, self.stop), self.lanes.lowest, scale, offset)


def available() -> bool:
    """Whether the extension is there and has this attention."""
    return hasattr(native, "attend_packed")


def takes_packed(query: torch.Tensor, keys: Lanes, values: Lanes) -> bool:
    """Whether `attend_packed` computes this: one sequence, one new token, heads of up to 256 in steps of 16, no gradients."""
    width = keys.width
    return (
        available()
        and type(query) is torch.Tensor
        and query.dim() == 4
        and query.shape[0] == query.shape[2] == 1
        and query.shape[3] == width == values.width
        and width % 16 == 0
        and 0 < width <= _WIDEST
        and query.dtype in _QUERIES
        and query.device.type == "cpu"
        and max(keys.block, values.block) <= _LONGEST
        and (keys.groups <= 0 or width // keys.groups % keys.per_byte == 0)
        and (values.groups <= 0 or width // values.groups % 16 == 0)
        and not (torch.is_grad_enabled() and query.requires_grad)
        and not torch.compiler.is_compiling()
    )


def attend_packed(
    query: torch.Tensor, keys: Packed, values: Packed, scale: float, *, turned: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(scale · q Kᵀ) V for what `takes_packed`, computed in float32.

    Args:
        query: (1, heads, 1, width); every key head serves heads / key heads queries in a row.
        keys, values: the same number of tokens, packed and new ones together.
        turned: the query for packed keys, where these were rotated; None: the same.

    Returns:
        (1, 1, heads, width) in the type of the query, as transformers' attention functions do.

    Raises:
        ShapeError: shapes, types or devices do not go together.
    """
    heads, width, key_heads, dtype = query.shape[1], query.shape[3], keys.new.shape[1], query.dtype
    length = keys.stop - keys.first + keys.new.shape[2]
    query = query.contiguous()
    real = (query if turned is None else turned).float().contiguous()
    y = torch.empty((1, 1, heads, width), dtype=dtype, device="cpu")
    new_at = [
        operand(name, side.new, (1, key_heads, length - (side.stop - side.first), width), dtype, "last")
        for name, side in (("new keys", keys), ("new values", values))
    ]
    module: Any = native
    if not available():
        raise SchemeError("The compiled kernels are not there: install a C++ compiler, then arrondi anew.")
    module.attend_packed(
        heads, key_heads, width, length, operand("query", query, query.shape, _QUERIES),
        operand("turned query", real, query.shape, torch.float32), _side("keys", keys), _side("values", values),
        new_at[0], keys.new.stride(1), keys.new.stride(2), new_at[1], values.new.stride(1), values.new.stride(2),
        y.data_ptr(), TYPES[dtype], scale, threads(),
    )  # fmt: skip
    return y


def append_token(
    x: torch.Tensor,
    how: ActivationScheme,
    lanes: Lanes,
    buffers: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    at: int,
    clip: float | None,
) -> bool:
    """Round one token and put it at place `at` of codes, scales and offsets, (batch, heads, …) each.

    False where the kernel does not take it, or a number is not finite; then nothing counts that was written. The reference is
    `round_states` with `Lanes.write` and `Lanes.write_scale`: the same bytes.

    Args:
        x: (batch, heads, 1, width).
        how: what it becomes.
        clip: as in `round_states`.
    """
    codes, scale, offset = buffers
    if not hasattr(native, "append_token") or not x.is_cpu or not lanes.groups or torch.compiler.is_compiling():
        return False
    module: Any = native
    rows, width, format = x.shape[0] * x.shape[1], lanes.width, how.scheme.format
    real = x.detach().float().reshape(rows, width).contiguous()
    blocks = codes.shape[2] if lanes.keys else codes.shape[2] * lanes.per_byte // lanes.block
    if at >= blocks * lanes.block:
        return False
    codes_at = operand("codes", codes, (*x.shape[:2], *lanes.codes_shape(blocks)), torch.uint8)
    shape, places, stride = lanes.scale_shape(blocks), [0, 0], 0
    if shape is not None:
        stride = shape[0] * shape[1] * shape[2]
        places = [operand("scales", part, (*x.shape[:2], *shape), lanes.stored) for part in (scale, offset)]
    found: bool = module.append_token(
        rows, width, operand("x", real, (rows, width), torch.float32), lanes.bits, lanes.block, lanes.groups, lanes.keys, at,
        codes_at, lanes.code_bytes * blocks, *places, TYPES[lanes.stored], stride,
        (format.qmax - format.qmin) / 2 if format.qmin < 0 else float(format.qmax), float(lanes.lowest), clip or 0.0,
        1.0 if clip is None else clip / format.qmax,
    )  # fmt: skip
    return found


def attend_packed_reference(
    query: torch.Tensor, keys: Packed, values: Packed, scale: float, *, turned: torch.Tensor | None = None
) -> torch.Tensor:
    """The slow reference of `attend_packed`: everything unpacked, in float64."""
    heads, shared = query.shape[1], query.shape[1] // keys.new.shape[1]
    old, new = (
        x.double()[0, :, 0].reshape(heads // shared, shared, -1) for x in (query if turned is None else turned, query)
    )
    scores = torch.cat([old @ keys.restored()[0].double().mT, new @ keys.new[0].double().mT], dim=-1)
    states = torch.cat([values.restored()[0].double(), values.new[0].double()], dim=1)
    seen = torch.softmax(scores * scale, dim=-1) @ states
    return seen.reshape(1, 1, heads, -1).to(query.dtype)


def _side(name: str, side: Packed) -> tuple[Any, ...]:
    """What a side of the cache is, as the extension takes it; buffers begin with the block of the first token that is seen."""
    lanes, at = side.lanes, side.first // side.lanes.block
    blocks = side.codes.shape[2] if lanes.keys else side.codes.shape[2] * lanes.per_byte // lanes.block
    heads = side.new.shape[1]
    codes_at = operand(f"codes of {name}", side.codes, (1, heads, *lanes.codes_shape(blocks)), torch.uint8)
    codes_at += lanes.code_bytes * at
    shape = lanes.scale_shape(blocks)
    places, stride = [0, 0], 0
    if shape is not None and side.scale is not None:
        stride, size = side.scale.stride(1), lanes.stored.itemsize
        per_block = stride // max(blocks, 1)
        for i, part in enumerate((side.scale, side.offset)):
            if part is not None:
                places[i] = operand(f"scales of {name}", part, (1, heads, *shape), lanes.stored) + per_block * at * size
    skipped = at * lanes.block
    return (
        lanes.bits, side.stop - skipped, side.first - skipped, lanes.block, lanes.groups, codes_at, side.codes.stride(1), *places,
        TYPES[lanes.stored], stride, side.unit, float(lanes.lowest),
    )  # fmt: skip
