"""GPTQ, AWQ and AutoRound beside llm-compressor and AutoRound itself: CPU seconds, peak memory, layer loss and KL, in one run.

Owns: the ratios in docs/benchmarks.md. All sides get the same model, the same windows, one thread and a process of their own; a peer runs in
its own environment. Timed: quantization, without imports and loading.

    python benchmarks/gptq_speed.py --data DIR [--model DIR] [--repeat 3] [--peer-python LLMCOMPRESSOR_ENV/bin/python]
    python benchmarks/gptq_speed.py --data DIR --methods awq --peer-python … --text TEXT --samples 128
    python benchmarks/gptq_speed.py --data DIR --methods autoround --autoround-python AUTOROUND_ENV/bin/python [--iterations 200]

DIR holds `text/wikipedia_calib.txt`, `text/the_time_machine.txt` and `books-llama-6m` (its tokenizer, and a trained model as a
second case). Without `--model` the first case is a random Llama of 57 million parameters; `--model none` leaves it out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from yardstick import token_windows

HERE = Path(__file__).parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

OURS = """
import json, resource, sys, time
import arrondi, torch, transformers
from arrondi.model import OnDisk
from arrondi.checkpoint import Checkpoint
from pathlib import Path
model, windows, out, settings = sys.argv[1:5]
OnDisk(Checkpoint.open(model))
ids = torch.tensor(json.loads(Path(windows).read_text()))
cpu, wall = time.process_time(), time.monotonic()
arrondi.quantize(model, "W4A16", **json.loads(settings), calibration=ids, out=out, samples=len(ids), seq_len=ids.shape[1], evaluate=False)
print(json.dumps({"cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - wall,
                  "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6}))
"""

SETTINGS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "gptq": {
        "arrondi": {"method": "gptq"},
        "arrondi, textbook settings": {"method": "gptq", "options": {"range": "absmax"}},
    },
    "awq": {"arrondi": {"method": "awq"}},
    "autoround": {
        "arrondi": {"method": "autoround"},
        "arrondi gptq": {"method": "gptq"},
        "arrondi gptaq": {"method": "gptaq"},
    },
}
"""What is compared → our sides, by what `arrondi.quantize` is told. The first is the one that the ratios are of."""


def last_json(command: list[str]) -> dict[str, Any]:
    """Run a command on one thread and read the last line that it prints."""
    done = subprocess.run(command, env=ONE_THREAD, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=list(SETTINGS), default=["gptq"])
    parser.add_argument("--peer-python", type=Path, help="of an environment with llm-compressor")
    parser.add_argument("--autoround-python", type=Path, help="of an environment with AutoRound")
    parser.add_argument("--model", help="instead of the random Llama; 'none' for neither")
    parser.add_argument("--text", type=Path, help="to calibrate on, instead of the Wikipedia")
    parser.add_argument("--samples", type=int, default=32, help="windows of 256 tokens")
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound, both sides")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    args.text = args.text or args.data / "text" / "wikipedia_calib.txt"
    with tempfile.TemporaryDirectory() as scratch:
        books = args.data / "books-llama-6m"
        first = [] if args.model == "none" else [Path(args.model) if args.model else random_llama(Path(scratch), books)]
        for case in (*first, books):
            if not case.is_dir():
                print(f"{case} is not there and is left out")
                continue
            for method in args.methods:
                compare(args, case, method, Path(scratch) / f"{case.name}-{method}")


def random_llama(scratch: Path, tokenizer: Path) -> Path:
    """57 million random parameters."""
    model = scratch / "llama-57m"
    maker = [sys.executable, HERE / "make_llama.py", model, "--size", "57m", "--tokenizer", tokenizer]
    subprocess.run(list(map(str, maker)), check=True, stdout=subprocess.DEVNULL)
    return model


def sides(args: argparse.Namespace, model: Path, method: str, windows: Path) -> dict[str, Callable[[Path], list[str]]]:
    """Who takes part → the command that writes into a folder."""
    found: dict[str, Callable[[Path], list[Any]]] = {}
    for name, settings in SETTINGS[method].items():
        if settings["method"] == "autoround":
            settings = {**settings, "options": {"signround.iterations": args.iterations}}
        found[name] = lambda out, s=json.dumps(settings): [sys.executable, "-c", OURS, model, windows, out, s]
    if method == "autoround" and args.autoround_python:
        script = HERE / "peers" / "autoround.py"
        more = ("--iterations", args.iterations)
        found["AutoRound"] = lambda out: [args.autoround_python, script, model, windows, out, *more]
    if method != "autoround" and args.peer_python:
        script = HERE / "peers" / "llmcompressor_gptq.py"
        options = ("--method", method, "--samples", args.samples, "--seq-len", 256)
        found["llm-compressor"] = lambda out: [args.peer_python, script, model, args.text, out, *options]
    return {name: lambda out, make=make: list(map(str, make(out))) for name, make in found.items()}


def compare(args: argparse.Namespace, model: Path, method: str, scratch: Path) -> None:
    """Time each side `repeat` times in turn, then measure what they wrote."""
    scratch.mkdir()
    windows = scratch / "windows.json"  # the first of the text, as llm-compressor's script takes them
    windows.write_text(json.dumps(token_windows(model, args.text, args.samples).tolist()))
    takes_part = sides(args, model, method, windows)
    times: dict[str, list[dict[str, Any]]] = {name: [] for name in takes_part}
    folders: dict[str, Path] = {}
    for i in range(args.repeat):
        for name, command in takes_part.items():
            folders[name] = scratch / f"{name.replace(', ', '-').replace(' ', '-')}-{i}"
            times[name].append(last_json(command(folders[name])))
    print(
        f"\n{model.name}, {method} W4A16 g128, {args.samples} × 256 tokens of {args.text.name}, one thread, median of {args.repeat}"
    )
    medians = {
        n: [statistics.median(f[k] for f in found) for k in ("cpu_s", "wall_s", "peak_rss_mb")]
        for n, found in times.items()
    }
    ours = medians["arrondi"]
    for name, (cpu, wall, rss) in medians.items():
        print(
            f"  {name:28s} {cpu:7.1f} CPU s ({cpu / ours[0]:5.2f} ×)  {wall:7.1f} s wall  {rss:6.0f} MB peak ({rss / ours[2]:5.2f} ×)"
        )
    held = args.data / "text" / "the_time_machine.txt"
    loss = [sys.executable, HERE / "layer_loss.py", model, *folders.values(), "--text", held, "--samples", 48]
    print(subprocess.run(list(map(str, loss)), env=ONE_THREAD, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    main()
