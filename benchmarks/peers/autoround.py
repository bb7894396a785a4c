"""AutoRound, timed: the peer that our `--method autoround` and gptq are set beside.

Owns: one run of AutoRound's signed gradient descent on given windows of token ids, W4A16 in groups of 128, the head left alone, all else as its
defaults have it. Writes the dequantized weights as a plain float32 checkpoint. Runs in a virtual environment of its own, without the library
under test:

    python -m venv VENV
    VENV/bin/pip install torch==2.13.0                                  # first, so that a CPU build is taken
    VENV/bin/pip install "auto-round==0.16.*" torch==2.13.0
    VENV/bin/python benchmarks/peers/autoround.py MODEL WINDOWS.json OUT [--iterations 200] [--threads 1]

Prints one JSON line: wall and CPU seconds of quantization, without imports, loading and saving, and the peak resident memory up to its end.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description="AutoRound, timed.")
    parser.add_argument("model", type=Path, help="checkpoint with its tokenizer")
    parser.add_argument("windows", type=Path, help="JSON list of windows, each a list of token ids")
    parser.add_argument("out", type=Path, help="directory for the dequantized checkpoint")
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8, help="windows of an iteration")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with redirect_stdout(sys.stderr):
        result = run(options)
    print(json.dumps(result))


def run(options: argparse.Namespace) -> dict[str, object]:
    """Load, quantize and save; the timings and what they were taken with."""
    import auto_round
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    windows = torch.tensor(json.loads(options.windows.read_text()))
    wall, cpu = time.perf_counter(), cpu_seconds()
    rounder = auto_round.AutoRound(
        model,
        tokenizer,
        scheme=options.scheme,
        dataset=[{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in windows.split(options.batch_size)],
        iters=options.iterations,
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=options.batch_size,
        seed=options.seed,
        device_map="cpu",
    )  # fmt: skip
    model, _ = rounder.quantize()
    taken = {"wall_s": round(time.perf_counter() - wall, 3), "cpu_s": round(cpu_seconds() - cpu, 3)}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    model.float().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    return {
        **taken,
        "peak_rss_mb": round(peak, 1),
        "scheme": options.scheme,
        "iterations": options.iterations,
        "windows": list(windows.shape),
        "threads": torch.get_num_threads(),
        "versions": {m.__name__: m.__version__ for m in (auto_round, transformers, torch)},
    }


if __name__ == "__main__":
    main()
