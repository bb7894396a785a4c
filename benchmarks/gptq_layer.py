"""GPTQ of one layer from given statistics, timed beside llm-compressor.

    python benchmarks/gptq_layer.py [--size 4096] [--peer-python PYTHON] [--threads 1] [--rounds 3]

The weight is normal, the statistics are those of correlated random inputs. W4A16: int4, groups of 128. Ours runs twice: with the
grid that the others use (`absmax`) and as it comes (`search`). All sides take turns; the median counts. PYTHON is the interpreter of
an environment with llm-compressor; without it that side is left out. `loss` is Σ (w - ŵ) H (w - ŵ)ᵀ over Σ w H wᵀ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

import arrondi
from arrondi.calibration import SecondMoment
from arrondi.rounding.gptq import gptq

PEER = Path(__file__).parent / "peers" / "llmcompressor_gptq_layer.py"


def inputs(size: int, generator: torch.Generator) -> torch.Tensor:
    """(2 · size, size) with channels of different power that go together, as activations do."""
    mixing = torch.randn(size, size // 8, generator=generator) / (size // 8) ** 0.5
    power = torch.randn(size, generator=generator).exp()
    common = torch.randn(2 * size, size // 8, generator=generator) @ mixing.T
    return (common + 0.3 * torch.randn(2 * size, size, generator=generator)) * power


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--peer-python")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(options.size, options.size, generator=generator) * 0.02
    moment = SecondMoment(options.size)
    moment.update(inputs(options.size, generator))
    hessian = moment.matrix(torch.float32)
    scheme = arrondi.parse_scheme("W4A16").weights
    whole = (weight @ hessian * weight).sum(dtype=torch.float64)

    def loss(rounded: torch.Tensor) -> float:
        difference = weight - rounded
        return float((difference @ hessian * difference).sum(dtype=torch.float64) / whole)

    sides: dict[str, Callable[[], torch.Tensor]] = {
        "arrondi, search": lambda: gptq(weight, scheme, moment).dequantize(),
        "arrondi, absmax": lambda: gptq(weight, scheme, moment, range="absmax").dequantize(),
    }
    seconds: dict[str, list[float]] = {}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "layer.safetensors")
        save_file({"weight": weight, "hessian": hessian.contiguous()}, file)
        for _ in range(options.rounds):
            for name, run in sides.items():
                started = time.perf_counter()
                rounded = run()
                seconds.setdefault(name, []).append(time.perf_counter() - started)
                if name not in losses:
                    losses[name] = loss(rounded)
            if options.peer_python:
                command = [options.peer_python, str(PEER), file, "--threads", str(options.threads)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                seconds.setdefault("llm-compressor", []).extend(found["seconds"])
                losses["llm-compressor"] = found["loss"]
    ours = statistics.median(seconds["arrondi, search"])
    for name, taken in seconds.items():
        median = statistics.median(taken)
        print(
            f"{name:22s} {median:6.2f} s (best {min(taken):.2f})   {median / ours:4.2f} x ours   loss {losses[name]:.6f}"
        )


if __name__ == "__main__":
    main()
