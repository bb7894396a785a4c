"""Products with quantized weights beside torch, torchao, ONNX Runtime, OpenVINO and llama.cpp.

    python benchmarks/kernels.py --peer torch=PYTHON --peer ggml=PYTHON … --shapes 4096x4096 --m 1,16,512

PYTHON is the interpreter of an environment that has the peer; a peer that is not given is left out. Each side runs in its
own process (they cannot share one environment), in turns, `--rounds` times; a case counts with the best median of its rounds.
Weights are rotated over 300 MB, so that M = 1 reads memory and not a cache. Columns: milliseconds, GB/s of packed weights,
TFLOP/s, and the time of the fastest peer of the same class (whole bits of a stored weight) over ours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "products"
PEERS = ("torch", "torchao", "onnxruntime", "openvino", "ggml")


def bits_class(record: dict[str, Any]) -> str:
    """Which cases compete: those with as many whole bits for a stored weight. Unpacked floats are everybody's yardstick."""
    bits = 8e9 * record["gbytes"] / (record["n"] * record["k"])
    return "float" if bits >= 16 else f"{int(bits)} bits"


def run_side(script: str, python: str, options: list[str]) -> list[dict[str, Any]]:
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        done = subprocess.run(
            [python, str(HERE / script), *options, "--json", out.name], stdout=sys.stderr, check=False
        )
        if done.returncode and (done.returncode == 2 or script == "ours.py"):
            sys.exit(done.returncode)  # a wrong option, or nothing of our own to compare: the script has said which
        if done.returncode:
            print(f"{script} failed and is left out", file=sys.stderr)
            return []
        return json.loads(Path(out.name).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer", action="append", default=[], help=f"NAME=PYTHON, NAME of {', '.join(PEERS)}")
    parser.add_argument("--shapes", default="4096x4096,11008x4096,4096x11008,2048x5632", help="outputs x inputs")
    parser.add_argument("--m", default="1,4,16,64,512")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", default="0.5")
    parser.add_argument("--rotate-mb", default="300", help="weights read before one comes again")
    parser.add_argument("--cases", default="", help="of arrondi: only those whose name contains one of these")
    parser.add_argument(
        "--peer-cases",
        action="append",
        default=[],
        help="NAME=PARTS: of that peer, only cases that contain one of them",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    only = {f"peer_{name}.py": cases for name, _, cases in (text.partition("=") for text in options.peer_cases)}
    only["ours.py"] = options.cases
    sides = [("ours.py", sys.executable)]
    for peer in options.peer:
        name, _, python = peer.partition("=")
        if name not in PEERS or not python:
            parser.error(f"--peer takes NAME=PYTHON with NAME of {', '.join(PEERS)}, got {peer!r}")
        sides.append((f"peer_{name}.py", python))
    shared = [
        "--shapes",
        options.shapes,
        "--m",
        options.m,
        "--threads",
        options.threads,
        "--seconds",
        options.seconds,
        "--rotate-mb",
        options.rotate_mb,
    ]
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for _ in range(options.rounds):
        for script, python in sides:
            own = ["--cases", only[script]] if only.get(script) else []
            for record in run_side(script, python, shared + own):
                key = (record["n"], record["k"], record["m"], record["peer"], record["case"])
                if key not in best or record["ms"] < best[key]["ms"]:
                    best[key] = record
    records = sorted(best.values(), key=lambda r: (r["n"], r["k"], r["m"], bits_class(r), r["ms"]))
    for record in records:
        rivals = [
            r["ms"]
            for r in records
            if r["peer"] != "arrondi"
            and (r["n"], r["k"], r["m"]) == (record["n"], record["k"], record["m"])
            and bits_class(r) == bits_class(record)
        ]
        lead = f"{min(rivals) / record['ms']:5.2f}x" if rivals and record["peer"] == "arrondi" else ""
        flops = 2 * record["m"] * record["n"] * record["k"] / record["ms"] / 1e9
        print(
            f"{record['n']}x{record['k']} m={record['m']:<4d} {bits_class(record):8s} {record['peer']:12s} "
            f"{record['case']:30s} {record['ms']:9.3f} ms {record['gbytes'] / record['ms'] * 1e3:7.1f} GB/s {flops:7.3f} TFLOP/s {lead}"
        )
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
