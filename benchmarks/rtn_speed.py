"""How fast round-to-nearest goes from file to file: GB of bf16 weights a second and core.

Owns: that one number. Writes a random model (default 0.5 billion weights) to a scratch directory, reads it once so that it lies in
the page cache, quantizes it to W4A16 on one thread, with the range searched (the default) and at its widest, and divides. Beside it: the same bytes only copied, which is the limit.

    python benchmarks/rtn_speed.py [--model DIR] [--repeat 3]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.model import OnDisk
from arrondi.pipeline.ledger import recorded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model
        if model is None:
            model = Path(scratch) / "model"
            script = Path(__file__).parent / "make_llama.py"
            subprocess.run(
                [sys.executable, script, str(model), "--size", "0.5b", "--tokenizer", str(arrondi.sample_path())],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        nbytes = sum(len(p.read_bytes()) for p in model.glob("*.safetensors"))
        OnDisk(Checkpoint.open(model))  # imports are not part of the measurement
        runs: dict[str, list[tuple[float, float]]] = {"absmax": [], "auto": []}
        copies, hashes = [], []
        for i in range(args.repeat):
            for range_, taken in runs.items():
                started, wall = time.process_time(), time.monotonic()
                arrondi.quantize(model, "W4A16", out=Path(scratch) / f"{range_}{i}", options={"range": range_})
                taken.append((time.process_time() - started, time.monotonic() - wall))
            started = time.process_time()
            for path in model.glob("*.safetensors"):
                (Path(scratch) / "copy").write_bytes(path.read_bytes())
            copies.append(time.process_time() - started)
            started = time.process_time()
            checkpoint, ledger = recorded(Checkpoint.open(model))
            for name in checkpoint.names:
                ledger.check(name)
            hashes.append(time.process_time() - started)
        (cpu, wall), (searched, _) = (
            [statistics.median(t[k] for t in taken) for k in (0, 1)] for taken in runs.values()
        )
        copy, hashing = statistics.median(copies), statistics.median(hashes)
        for what, seconds in (
            ("RTN W4A16, range searched", searched),
            ("RTN W4A16, widest range", cpu),
            ("without the model's SHA-256", cpu - hashing),
            ("a plain copy", copy),
        ):
            print(f"{what:28s} {seconds:6.2f} CPU s = {nbytes / seconds / 1e9:.2f} GB/s a core")
        print(f"{nbytes / 1e9:.2f} GB of bf16 weights, {wall:.2f} s wall at the widest range, median of {args.repeat}")


if __name__ == "__main__":
    main()
