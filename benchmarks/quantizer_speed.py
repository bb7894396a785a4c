"""The compiled quantizers beside their references in PyTorch, on one thread: rounding and packing, and HQQ.

    python benchmarks/quantizer_speed.py [--repeat 5] [--rows 2048]

Owns: those two numbers. The reference runs in a process of its own, with `ARRONDI_CPU=none`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from arrondi.formats import parse_scheme
from arrondi.rounding import hqq
from arrondi.tensor.nearest import quantize_tensor
from arrondi.tensor.packing import pack
from arrondi.tensor.quantizers import round_packed


def median_seconds(run: Callable[[], object], repeat: int) -> float:
    run()
    taken = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measure(repeat: int, rows: int) -> dict[str, float]:
    """GB/s of bfloat16 weights that are rounded to W4A16 and packed, 64 × 4096 from cache; seconds of HQQ, rows × 4096."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(64, 4096, generator=generator).bfloat16()
    large = torch.randn(rows, 4096, generator=generator)
    four, offset = parse_scheme("W4A16").weights, parse_scheme("w=int4/g64/offset").weights

    def packed() -> object:
        made = round_packed(small, four)
        return pack(quantize_tensor(small, four).codes, 4, lowest=four.format.qmin) if made is None else made

    rounding = 2 * small.numel() / median_seconds(packed, 40 * repeat) / 1e9
    return {"round and pack, GB/s": rounding, "hqq, s": median_seconds(lambda: hqq(large, offset), repeat)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2048, help="of the weight that HQQ rounds")
    parser.add_argument("--json", action="store_true", help="print only this process's numbers")
    options = parser.parse_args()
    mine = measure(options.repeat, options.rows)
    if options.json:
        print(json.dumps(mine))
        return
    command = [sys.executable, __file__, "--json", "--repeat", str(options.repeat), "--rows", str(options.rows)]
    environment = os.environ | {"ARRONDI_CPU": "none"}
    reference = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    for name, value in mine.items():
        print(f"{name:22s} compiled {value:.3g}   reference {reference[name]:.3g}")


if __name__ == "__main__":
    main()
