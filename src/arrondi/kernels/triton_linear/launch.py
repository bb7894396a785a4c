"""Which program runs, and in what blocks.

Owns: `prepack` and `unpack`; `linear` and `bind`; `blocks_of`, the small table of block sizes, from measurements on an H100 (one token
and sixteen, 4096 × 4096). Nothing is tuned at run time, so the first call compiles one program and no more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch

from arrondi.formats import Scheme, tile_shape
from arrondi.kernels.kernel import Bound, Meta, Tensors
from arrondi.kernels.packed import on_grid, pack_grid
from arrondi.kernels.triton_linear.words import NUMBERS, PLANES, lanes_of, pack_words, unpack_words
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.storage import signed, unsigned
from arrondi.tensor.tables import STEP

_MANTISSA: Final = {"fp8_e4m3": (3, 7), "fp8_e5m2": (2, 15), "fp6_e3m2": (2, 3), "fp6_e2m3": (3, 1), "fp4_e2m1": (1, 1)}
"""Small floats: bits of the mantissa, bias of the exponent."""

_DECODED: Final = 1 << 26
"""Weights that are decoded at a time for many tokens."""

_STREAMED: Final = {torch.float32: 8}
"""Most tokens of which each is multiplied by itself; of other types one."""

_TILED: Final = 128
"""Most tokens that are multiplied by decoded tiles; with more, decoding all of the weight first is faster."""

_INTEGER, _FLOAT, _TABLE = range(3)


class Blocks(NamedTuple):
    """How a product is cut: tokens and rows of a block, programs that share a row, warps, stages."""

    tokens: int
    rows: int
    split: int
    warps: int
    stages: int = 1


def prepack(q: QTensor, dtype: torch.dtype) -> Tensors:
    """`codes` as words (see `words`), the grid as `pack_weight` keeps it, and `values` of a codebook."""
    format, width = q.scheme.format, tile_shape(q.scheme.granularity, q.shape)[1]
    words = pack_words(unsigned(q.codes, format), format.bits, lanes_of(q.shape[1], width))
    tensors = {"codes": words} | {name: part.clone().contiguous() for name, part in pack_grid(q).items()}
    if format.values is not None and format.name not in _MANTISSA:
        tensors["values"] = torch.tensor(format.values, dtype=torch.float32, device=q.codes.device)
    return tensors


def unpack(tensors: Tensors, meta: Meta) -> QTensor:
    """The weight that `prepack` was given."""
    codes = unpack_words(tensors["codes"], meta.scheme.format.bits, meta.shape[1])
    return on_grid(signed(codes, meta.scheme.format), tensors, meta.scheme)


def linear(x: torch.Tensor, tensors: Tensors, meta: Meta, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., in) → (..., out)."""
    return bind(tensors, meta, bias)(x)


def bind(tensors: Tensors, meta: Meta, bias: torch.Tensor | None) -> Bound:
    """The product with all that does not depend on x worked out once."""
    product = _Product(tensors, meta, bias)
    return lambda x: _Linear.apply(x, product) if x.requires_grad and torch.is_grad_enabled() else product(x)


class _Linear(torch.autograd.Function):
    """With a gradient for x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, product: _Product) -> torch.Tensor:
        ctx.product = product
        return product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (y,) = gradients
        weight = ctx.product.decoded()
        return sum((y[..., rows] @ part for rows, part in weight), start=y.new_zeros(())), None


def blocks_of(tokens: int, rows: int, columns: int) -> Blocks:
    """How a product of so many tokens, of 16-bit types where there is more than one, with a weight (rows, columns) is cut."""
    chunks = -(-columns // 1024)
    if tokens == 1:
        return Blocks(1, 32, min(_share(-(-rows // 32), 512), chunks), 8)
    block = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    height = 64
    split = min(_share(-(-rows // height) * -(-tokens // block), 528), chunks)
    return Blocks(block, height, split, 4, 2 if block == 16 else 1)


def _share(programs: int, wanted: int) -> int:
    """In how many parts rows are cut, so that there are about as many programs as wanted."""
    return max(1, round(wanted / max(programs, 1)))


class _Product:
    """One packed weight as the programs take it."""

    def __init__(self, tensors: Tensors, meta: Meta, bias: torch.Tensor | None) -> None:
        self.meta, self.bias = meta, bias
        (self.rows, self.columns), scheme = meta.shape, meta.scheme
        words = tensors["codes"]
        scale, outer = tensors.get("scale"), tensors.get("scale_scale")
        scale = tensors["scale_codes"] if scale is None else scale
        zero, offset = tensors.get("zero_point"), tensors.get("offset")
        table = tensors.get("table", tensors.get("values"))
        height, width = tile_shape(scheme.granularity, meta.shape)
        lanes = words.shape[3]
        self.chunks, self.scale, self.words = words.shape[1], scale, words
        any_ = scale  # programs take a pointer for what is not there, and do not read it
        self.pointers = [words, scale, *(any_ if t is None else t for t in (zero, offset, outer, table))]
        self.named: dict[str, Any] = {
            **_planes(scheme.format.bits),
            **_meaning(scheme, table),
            "HEIGHT": height,
            "WIDTH": min(width, self.columns) if width < self.columns else NUMBERS * lanes * self.chunks,
            "RUN": NUMBERS if width >= self.columns else math.gcd(width // lanes, NUMBERS),
            "TALL": _rows_of_a_table(scheme, self.rows),
            "SCALE": 2 if outer is not None and "scale" not in tensors else int(scale.dtype == torch.uint8),
            "ZERO": zero is not None,
            "OFFSET": offset is not None,
            "L": lanes,
        }
        self.even = self.columns == self.chunks * NUMBERS * lanes
        self.groups = -(-self.columns // width)

    def __call__(self, x: torch.Tensor, blocks: Blocks | None = None) -> torch.Tensor:
        """x (..., in) → (..., out)."""
        flat = x.reshape(-1, self.columns).contiguous()
        tokens, y = len(flat), x.new_empty((*x.shape[:-1], self.rows))
        if not tokens:
            return y
        out = y.view(-1, self.rows)
        with _on(x.device):
            if tokens <= _STREAMED.get(x.dtype, 1):
                self._stream(flat, out, blocks or blocks_of(1, self.rows, self.columns))
            elif tokens <= _TILED and x.dtype != torch.float32:
                self._tiles(flat, out, blocks or blocks_of(tokens, self.rows, self.columns))
            else:
                for rows, part in self.decoded():
                    out[:, rows] = torch.nn.functional.linear(
                        flat, part, None if self.bias is None else self.bias[rows]
                    )
        return y

    def _stream(self, x: torch.Tensor, y: torch.Tensor, b: Blocks) -> None:
        grid = (-(-self.rows // b.rows), b.split, len(x))
        _programs().stream[grid](
            x, *self.pointers, *self._ends(x, y, b, grid[0] * len(x)), self.rows, self.columns, self.chunks, self.groups,
            **self.named, BIAS=self.bias is not None, EVEN=self.even, BN=b.rows, SPLIT=b.split, num_warps=b.warps,
        )  # fmt: skip

    def _tiles(self, x: torch.Tensor, y: torch.Tensor, b: Blocks) -> None:
        grid = (-(-self.rows // b.rows), b.split, -(-len(x) // b.tokens))
        _programs().tiles[grid](
            x, *self.pointers, *self._ends(x, y, b, grid[0] * grid[2]), len(x), self.rows, self.columns, self.chunks,
            self.groups, **self.named | {"RUN": min(self.named["RUN"], 8)}, BIAS=self.bias is not None, EVEN=self.even, BM=b.tokens, BN=b.rows, SPLIT=b.split,
            num_warps=b.warps, num_stages=b.stages,
        )  # fmt: skip

    def _ends(self, x: torch.Tensor, y: torch.Tensor, b: Blocks, count: int) -> Sequence[torch.Tensor]:
        """Bias, output, the sums of every share of a row, and the count of those that are done."""
        bias = y if self.bias is None else self.bias
        if b.split == 1:
            return bias, y, y, y
        partial = torch.empty(b.split * len(x) * self.rows, dtype=torch.float32, device=x.device)
        return bias, y, partial, _counters(x.device, count)

    def decoded(self) -> Any:
        """The weight in the compute type, some rows at a time: (rows, values)."""
        step = max(_DECODED // self.columns // 16 * 16, 16)
        for first in range(0, self.rows, step):
            rows = slice(first, min(first + step, self.rows))
            out = torch.empty(rows.stop - first, self.columns, dtype=self.meta.dtype, device=self.words.device)
            _programs().decode[(-(-len(out) // 16), self.chunks)](
                *self.pointers, out, first, rows.stop, self.columns, self.chunks, self.groups, **self.named, BN=16, num_warps=4
            )  # fmt: skip
            yield rows, out


def _planes(bits: int) -> dict[str, int]:
    widths = (*PLANES[bits], 0, 0)
    return {f"B{i}": widths[i] for i in range(3)}


def _meaning(scheme: Scheme, table: torch.Tensor | None) -> dict[str, Any]:
    """How codes become values."""
    format = scheme.format
    found: dict[str, Any] = {
        "KIND": _TABLE,
        "BASE": 0,
        "MIDDLE": 0,
        "MANTISSA": 0,
        "UNIT": 1.0,
        "LEVELS": format.levels,
    }
    if table is not None:
        return found | {"UNIT": STEP if table.dtype == torch.int8 else 1.0}
    if format.kind != "integer":
        mantissa, bias = _MANTISSA[format.name]
        return found | {"KIND": _FLOAT, "MANTISSA": mantissa, "UNIT": 2.0 ** (15 - bias)}
    base = -format.qmin if scheme.symmetric or scheme.zero_point == "float" else 2 ** (format.bits - 1)
    return found | {"KIND": _INTEGER, "BASE": base, "MIDDLE": base + format.qmin}


def _rows_of_a_table(scheme: Scheme, rows: int) -> int:
    own = scheme.table
    return rows if own is None else own.rows or rows


@functools.cache
def _programs() -> Any:
    from arrondi.kernels.triton_linear import programs

    return programs


def _on(device: torch.device) -> Any:
    """Triton runs programs on the device that is current."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()


_counted: dict[tuple[torch.device, int], torch.Tensor] = {}


def _counters(device: torch.device, count: int) -> torch.Tensor:
    """Zeros, which every program leaves as it found them; each stream has its own."""
    key = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if key not in _counted or len(_counted[key]) < count:
        _counted[key] = torch.zeros(max(count, 1 << 16), dtype=torch.int32, device=device)
    return _counted[key]
