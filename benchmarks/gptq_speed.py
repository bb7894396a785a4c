"""GPTQ of a 57-million-parameter Llama beside llm-compressor: CPU seconds, peak memory, layer loss and KL, in one run.

Owns: the ratio in the README. Both sides get the same model, the same 32 × 256 calibration tokens, one thread and a process of their own;
llm-compressor runs in its own environment (`--peer-python`). Timed: quantization, without imports and loading.

    python benchmarks/gptq_speed.py --data DIR --peer-python ENV/bin/python [--model DIR] [--repeat 3]

DIR holds `text/wikipedia_calib.txt`, `text/the_time_machine.txt` and `books-llama-6m` (its tokenizer, and a trained model as a
second case).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

OURS = """
import json, resource, sys, time
import arrondi, transformers
from arrondi.model import OnDisk
from arrondi.checkpoint import Checkpoint
from arrondi.measure.text import load_tokenizer
from pathlib import Path
model, text, out, textbook = sys.argv[1:5]
OnDisk(Checkpoint.open(model)); load_tokenizer(Path(model))
options = {"range": "absmax"} if textbook == "textbook" else {}
cpu, wall = time.process_time(), time.monotonic()
arrondi.quantize(model, "W4A16", method="gptq", options=options, calibration=text, out=out, samples=32, seq_len=256, evaluate=False)
print(json.dumps({"cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - wall,
                  "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def last_json(command: list[str]) -> dict[str, Any]:
    """Run a command on one thread and read the last line that it prints."""
    done = subprocess.run(command, env=ONE_THREAD, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    text, held = args.data / "text" / "wikipedia_calib.txt", args.data / "text" / "the_time_machine.txt"
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model
        if model is None:
            model = Path(scratch) / "llama-57m"
            maker = [
                sys.executable,
                str(HERE / "make_llama.py"),
                str(model),
                "--size",
                "57m",
                "--tokenizer",
                str(args.data / "books-llama-6m"),
            ]
            subprocess.run(maker, check=True, stdout=subprocess.DEVNULL)
        for case in (model, args.data / "books-llama-6m"):
            if not case.is_dir():
                print(f"{case} is not there and is left out")
                continue
            compare(case, text, held, args.peer_python, args.repeat, Path(scratch) / f"{case.name}-runs")


def compare(model: Path, text: Path, held: Path, peer: Path | None, repeat: int, scratch: Path) -> None:
    """Time each side `repeat` times in turn, then measure what they wrote."""
    scratch.mkdir()
    times: dict[str, list[dict[str, Any]]] = {}
    folders: dict[str, Path] = {}
    for i in range(repeat):
        for name in ("arrondi", "arrondi, textbook settings"):
            folders[name] = scratch / f"{'textbook' if ',' in name else 'ours'}-{i}"
            mode = "textbook" if "," in name else "default"
            times.setdefault(name, []).append(
                last_json([sys.executable, "-c", OURS, str(model), str(text), str(folders[name]), mode])
            )
        if peer is not None:
            folders["llm-compressor"] = scratch / f"peer-{i}"
            script = HERE / "peers" / "llmcompressor_gptq.py"
            command = [
                str(peer),
                str(script),
                str(model),
                str(text),
                str(folders["llm-compressor"]),
                "--samples",
                "32",
                "--seq-len",
                "256",
            ]
            times.setdefault("llm-compressor", []).append(last_json(command))
    print(f"\n{model.name}, W4A16 g128, 32 × 256 tokens, one thread, median of {repeat}")
    for name, found in times.items():
        cpu, wall, rss = (statistics.median(f[k] for f in found) for k in ("cpu_s", "wall_s", "peak_rss_mb"))
        print(f"  {name:28s} {cpu:7.1f} CPU s  {wall:7.1f} s wall  {rss:6.0f} MB peak")
    if peer is not None:
        ours, theirs = (statistics.median(f["cpu_s"] for f in times[n]) for n in ("arrondi", "llm-compressor"))
        print(f"  ratio llm-compressor / arrondi: {theirs / ours:.2f}")
    loss = [sys.executable, str(HERE / "layer_loss.py"), str(model), *map(str, folders.values()), "--text", str(held)]
    print(subprocess.run(loss, env=ONE_THREAD, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
