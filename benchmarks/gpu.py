"""Products with packed weights on a GPU beside torch's, and the limit that memory sets.

    python benchmarks/gpu.py [--shapes 4096x4096,14336x4096,4096x14336] [--m 1,4,16,64,512,4096] [--schemes W4A16,W8A16] [--json FILE]

One line a product: microseconds of ours, of torch's int4 (`_weight_int4pack_mm`), of torch's product with an ordinary bfloat16 weight,
the time in which memory could deliver the packed weight, and the share of that which ours reaches. x is bfloat16. Weights are rotated over
more than three times the second-level cache, all products of a turn are one CUDA graph, and a number is the median of nine turns. Every
product is first held against float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from arrondi.formats import parse_scheme
from arrondi.kernels import KERNELS, Meta
from arrondi.tensor.nearest import quantize_tensor

TURNS = 9


def seconds(products: list[Callable[[], Any]]) -> float:
    """Median time of one of some products that read different weights."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for product in products[:2]:
            product()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    found = []
    for turn in range(TURNS + 2):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if turn > 1:
            found.append(begin.elapsed_time(end) / 1e3 / len(products))
    return statistics.median(found)


def copies_for(nbytes: int) -> int:
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-3 * cache // nbytes))


def bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / seconds([lambda: b.copy_(a)] * 4)


def packed_copies(scheme: str, n: int, k: int) -> tuple[list[dict[str, torch.Tensor]], Meta, torch.Tensor, int]:
    """The weight of a product as often as it takes to leave the cache, and what it means in float64."""
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(n, k, device="cuda", generator=generator) * 0.02
    q = quantize_tensor(weight, parse_scheme(scheme).weights)
    tensors = KERNELS["triton"].prepack(q, torch.bfloat16)
    nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
    copies = [tensors] + [{name: t.clone() for name, t in tensors.items()} for _ in range(copies_for(nbytes) - 1)]
    return copies, Meta(q.scheme, (n, k), torch.bfloat16), q.dequantize(torch.float32), nbytes


def torch_int4(x: torch.Tensor, n: int, k: int, group: int = 128) -> list[Callable[[], Any]]:
    nbytes = n * k // 2
    code = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(code, 8)
    grid = torch.rand(k // group, n, 2, dtype=torch.bfloat16, device="cuda") * 0.01
    weights = [packed] + [packed.clone() for _ in range(copies_for(nbytes) - 1)]
    return [lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w, group, grid) for w in weights]


def rows(scheme: str, n: int, k: int, tokens: list[int], speed: float) -> list[dict[str, Any]]:
    copies, meta, real, nbytes = packed_copies(scheme, n, k)
    dense = [real.bfloat16().clone() for _ in range(copies_for(2 * n * k))]
    found = []
    for m in tokens:
        x = torch.randn(m, k, device="cuda").bfloat16()
        bound = [KERNELS["triton"].bind(tensors, meta, None) for tensors in copies]
        exact = x[:64].double() @ real.double().T
        error = float((bound[0](x)[:64].double() - exact).norm() / exact.norm())
        assert error < 5e-3, (scheme, n, k, m, error)
        ours = seconds([partial(p, x) for p in bound])
        floating = seconds([partial(torch.nn.functional.linear, x, w) for w in dense])
        theirs = seconds(torch_int4(x, n, k)) if scheme == "W4A16" else None
        limit = (nbytes + 2 * m * (n + k)) / speed
        found.append(
            {
                "scheme": scheme, "n": n, "k": k, "m": m, "us": ours * 1e6, "torch_bf16_us": floating * 1e6,
                "torch_int4_us": None if theirs is None else theirs * 1e6, "memory_limit_us": limit * 1e6,
                "share_of_limit": limit / ours, "tflops": 2e-12 * m * n * k / ours, "error": error,
            }
        )  # fmt: skip
        print(" ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in found[-1].items()), flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", default="4096x4096,14336x4096,4096x14336", help="outputs x inputs")
    parser.add_argument("--m", default="1,4,16,64,512,4096")
    parser.add_argument("--schemes", default="W4A16", help="with ; between")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch has no CUDA device here")
    speed = bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: a copy moves {speed / 1e12:.2f} TB/s", flush=True
    )
    found = []
    for scheme in options.schemes.split(";"):
        for shape in options.shapes.split(","):
            n, k = (int(part) for part in shape.split("x"))
            found += rows(scheme, n, k, [int(m) for m in options.m.split(",")], speed)
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(
            json.dumps({"device": torch.cuda.get_device_name(), "bandwidth": speed, "rows": found}, indent=1)
        )


if __name__ == "__main__":
    main()
