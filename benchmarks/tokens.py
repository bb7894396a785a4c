"""Tokens per second of a whole model: a 512-token prompt, then decoding, beside transformers and llama.cpp.

    python benchmarks/tokens.py QUANTIZED --activations int8/g128 --plain MODEL --gguf FILE --gguf-python PYTHON

QUANTIZED is what `arrondi quantize` wrote, or a GGUF file of anybody, and is run through the loop of `arrondi run`, with inputs as they are and, with
`--activations`, rounded too; the time of loading it and what is in memory then are told; `--plain` is the model it came from, run
by the same loop in bfloat16; `--gguf` is the same model as llama.cpp's file (`benchmarks/products/make_gguf.py`) and
`--gguf-python` an interpreter with llama-cpp-python. Random weights do: only the time counts. All sides run in turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import arrondi  # before torch: see arrondi/__init__.py
from arrondi.native import multiplies_bfloat16
from arrondi.runtime.decoding import tokens


def measure(
    model: Any, prompt: int, decode: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Tokens per second of the prompt, median milliseconds of the tokens after it."""
    ids = torch.randint(0, 1000, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    moments = [clock()]
    for _ in tokens(model, ids, decode, temperature=0.0, stop=set()):
        moments.append(clock())
    steps = [b - a for a, b in itertools.pairwise(moments)]
    return prompt / steps[0], statistics.median(steps[1:]) * 1e3


def load(path: str) -> Any:
    before, started = memory("VmRSS"), time.perf_counter()
    model = arrondi.load(path, dtype="bfloat16")
    took = time.perf_counter() - started
    if before:
        found = [Path(path)] if Path(path).is_file() else Path(path).glob("*.safetensors")
        files = sum(file.stat().st_size for file in found) / 1e6
        resident, peak = memory("VmRSS") - before, memory("VmHWM") - before
        print(
            f"arrondi.load: {took:.1f} s; of {files:.0f} MB {resident:.0f} MB ({resident / files:.2f}x) are in memory, at most {peak:.0f} MB ({peak / files:.2f}x)"
        )
    return model


def memory(fact: str) -> float:
    """MB of this process, as Linux counts them; 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) for line in lines if line.startswith(fact)) / 1e3


def measure_llamacpp(
    python: str, file: str, prompt: int, decode: int, threads: int, more: list[str]
) -> tuple[float, float]:
    script = Path(__file__).parent / "products" / "llamacpp_tokens.py"
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        sizes = ["--prompt", str(prompt), "--decode", str(decode), "--threads", str(threads), "--rounds", "1", *more]
        own = {
            name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"
        }  # arrondi sets it for itself
        command = [python, str(script), file, *sizes, "--json", out.name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=own)
        record = json.loads(Path(out.name).read_text())[0]
    return record["prompt_tokens_per_s"], record["decode_ms"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("quantized")
    parser.add_argument("--activations", action="append", default=[], help="as arrondi run takes it; repeatable")
    parser.add_argument("--plain")
    parser.add_argument("--gguf", action="append", default=[])
    parser.add_argument("--gguf-python")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--unpacked", action="store_true", help="llama.cpp multiplies weights as they lie")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time of one thread, where others use the machine"
    )
    options = parser.parse_args()
    sides: dict[str, Any] = {"arrondi": load(options.quantized)}
    for activations in options.activations:
        sides[f"arrondi {activations}"] = arrondi.load(options.quantized, dtype="bfloat16", activations=activations)
    if options.plain:
        # Without products of bfloat16 in the CPU, PyTorch's take minutes for a prompt.
        name, dtype = ("bf16", torch.bfloat16) if multiplies_bfloat16() else ("fp32", torch.float32)
        sides[f"transformers {name}"] = AutoModelForCausalLM.from_pretrained(options.plain, dtype=dtype).eval()
    clock = time.process_time if options.cpu_time else time.perf_counter
    more = [f"--{name.replace('_', '-')}" for name in ("unpacked", "cpu_time") if getattr(options, name)]
    results: dict[str, list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        for name, model in sides.items():
            results.setdefault(name, []).append(measure(model, options.prompt, options.decode, clock))
        for file in options.gguf:
            found = measure_llamacpp(
                options.gguf_python, file, options.prompt, options.decode, torch.get_num_threads(), more
            )
            results.setdefault(f"llama.cpp {Path(file).stem}", []).append(found)
    for name, pairs in results.items():
        prompt, decode = (statistics.median(p[i] for p in pairs) for i in (0, 1))
        best = max(p[0] for p in pairs), min(p[1] for p in pairs)
        print(
            f"{name:24s} prompt {prompt:7.1f} tokens/s (best {best[0]:.1f})   decode {decode:7.2f} ms (best {best[1]:.2f})"
        )


if __name__ == "__main__":
    main()
