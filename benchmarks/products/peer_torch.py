"""Products by torch itself: fp32, bf16 and the low-bit operators of ATen.

Owns: the calls of torch.  `_int_mm` is the int8 product alone, its activations already int8 and its result int32; all
other cases take and give floats.  The int4 operator stores a scale and a zero point of x's type for each group.

    VENV/bin/pip install torch==2.13.0 numpy
    VENV/bin/python peer_torch.py --shapes 4096x4096 --m 1,16 --threads 2 --json out.json
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import torch
from common import Bind, Case, Run

GROUP = 128


def dense(dtype: torch.dtype) -> Case:
    """`F.linear` with weights of this type."""

    def build(n: int, k: int, copies: int) -> Bind:
        weights = [torch.randn(n, k).mul_(0.02).to(dtype) for _ in range(copies)]

        def bind(m: int) -> Run:
            x = torch.randn(m, k).to(dtype)
            return lambda copy: torch.nn.functional.linear(x, weights[copy])

        return bind

    return Case(f"linear {name(dtype)}", 8 * dtype.itemsize, build)


def int4pack(dtype: torch.dtype) -> Case:
    """`_weight_int4pack_mm_for_cpu`, groups of 128."""

    def build(n: int, k: int, copies: int) -> Bind:
        packed, grids = [], []
        for _ in range(copies):
            codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
            packed.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
            grids.append(torch.stack([torch.full((k // GROUP, n), 0.01), torch.zeros(k // GROUP, n)], -1).to(dtype))

        def bind(m: int) -> Run:
            x = torch.randn(m, k).to(dtype)
            return lambda copy: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed[copy], GROUP, grids[copy])

        return bind

    return Case(f"int4pack g{GROUP} {name(dtype)}", 4 + 16 * dtype.itemsize / GROUP, build)


def int8pack(dtype: torch.dtype) -> Case:
    """`_weight_int8pack_mm`: one scale for each row of W."""

    def build(n: int, k: int, copies: int) -> Bind:
        weights = [torch.randint(-127, 128, (n, k), dtype=torch.int8) for _ in range(copies)]
        scales = torch.full((n,), 0.0002, dtype=dtype)

        def bind(m: int) -> Run:
            x = torch.randn(m, k).to(dtype)
            return lambda copy: torch.ops.aten._weight_int8pack_mm(x, weights[copy], scales)

        return bind

    return Case(f"int8pack {name(dtype)}", 8, build, row_bytes=dtype.itemsize)


def int_mm(dtype: torch.dtype) -> Case:
    """`_int_mm` of int8 weights and activations of this type, without any quantization or scale."""
    low, high = (0, 256) if dtype == torch.uint8 else (-127, 128)

    def build(n: int, k: int, copies: int) -> Bind:
        weights = [torch.randint(-127, 128, (n, k), dtype=torch.int8).t() for _ in range(copies)]

        def bind(m: int) -> Run:
            x = torch.randint(low, high, (m, k), dtype=dtype)
            return lambda copy: torch._int_mm(x, weights[copy])

        return bind

    return Case(f"int_mm {name(dtype)}", 8, build)


def name(dtype: torch.dtype) -> str:
    """Short name of a type: `torch.bfloat16` is bf16."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def prepare(threads: int) -> Sequence[Case]:
    """The cases, with torch set to so many threads."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    floats = (torch.float32, torch.bfloat16)
    return [
        *(make(dtype) for make in (dense, int4pack, int8pack) for dtype in floats),
        *(int_mm(dtype) for dtype in (torch.int8, torch.uint8)),
    ]


if __name__ == "__main__":
    with torch.inference_mode():
        common.main("torch", prepare, __doc__)
