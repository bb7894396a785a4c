"""What each method costs networks of convolutions and vision transformers at each width: the tables in the README and in docs/benchmarks.md.

Owns: the cases, each a scheme and what `arrondi.quantize` is told, and the table of their top-1, agreement with the network in floating point, signal to
difference, bytes and CPU seconds. ONNX Runtime runs every file. Peers quantize the same network on the same samples, in environments of their own.

    python benchmarks/vision.py --data DIR                               every case on every network
    python benchmarks/vision.py --data DIR --networks resnet20 --only 'W4A16 (rtn|adaround)' --rows FILE.jsonl
    python benchmarks/vision.py --data DIR --peer ort=PYTHON --peer nncf=PYTHON --peer pt2e=PYTHON    also aimet=PYTHON, see benchmarks/peers

`--latency` adds the time of one sample and of 32 in ONNX Runtime, over that of the float file, best of several turns.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

import arrondi
from arrondi.graph import read_graph, write_graph
from networks import NETWORKS, REAL, built

PEERS: Final = Path(__file__).parent / "peers"
TURNS: Final = 15
BATCH: Final = 32


class Case(NamedTuple):
    """Schemes, and what they are made by: arguments of `arrondi.quantize`."""

    name: str
    schemes: tuple[str, ...]
    settings: dict[str, Any]


EIGHT: Final = ("W8A8",)
WEIGHTS: Final = ("w=int4/channel", "w=int3/channel", "w=int2/channel")
LOW: Final = ("w=int4/channel,a=int8/token", "w=int4/channel,a=int4/token")
ATTENTION: Final = ("W6A6", "W4A4", "W3A3")
"""For networks with attention: there products alone are rounded, both of their sides."""
TWIN: Final = {"softmax": "twin", "gelu": "twin"}
OBSERVERS: Final = ("min-max", "moving-average", "percentile", "histogram", "mse", "kl", "cosine")
CASES: Final = (
    *(Case(f"rtn {observer}", EIGHT, {"method": "rtn", "observer": observer}) for observer in OBSERVERS),
    Case("rtn", (*WEIGHTS, *LOW), {"method": "rtn"}),
    Case("gptq", (*EIGHT, *WEIGHTS), {"method": "gptq"}),
    Case("adaround", (*EIGHT, *WEIGHTS, *LOW), {"method": "adaround"}),
    Case("adaquant", (*WEIGHTS, *LOW), {"method": "adaquant"}),
    Case("brecq", (*WEIGHTS, *LOW), {"method": "brecq"}),
    Case("qdrop", LOW, {"method": "qdrop"}),
    Case("easyquant", (*EIGHT, *LOW), {"method": "easyquant"}),
    Case("rtn", ATTENTION, {"method": "rtn"}),
    Case("qdrop", ATTENTION[1:], {"method": "qdrop"}),
    Case("liu", ATTENTION, {"method": "liu"}),
    Case("ptq4vit uniform", ATTENTION, {"method": "ptq4vit"}),
    Case("ptq4vit twin", ATTENTION, {"method": "ptq4vit", "grids": TWIN}),
    Case("ptq4vit log2", ATTENTION[1:], {"method": "ptq4vit", "grids": {"softmax": "log2"}}),
    Case("fima-q", ATTENTION[1:], {"method": "fima-q"}),
)  # fmt: skip


class Refused(Exception):
    """A peer has no such scheme, or failed."""


Job = tuple[str, Callable[..., dict[str, Any]], tuple[Any, ...]]
"""Label, what makes the row, and what it is given."""


def rows_of(pattern: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    every = ((f"{scheme} {case.name}", scheme, case.settings) for case in CASES for scheme in case.schemes)
    return (row for row in every if re.search(pattern, row[0]))


def session_of(path: Path) -> Any:
    """ONNX Runtime on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def outputs_of(path: Path, inputs: np.ndarray) -> np.ndarray:
    """(samples, classes): what a file gives, or what a peer says that it gives."""
    if path.suffix == ".npz":
        return np.load(path)["outputs"]
    session = session_of(path)
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: inputs[i : i + BATCH]})[0] for i in range(0, len(inputs), BATCH)]
    return np.concatenate(parts)


def latency(path: Path, sample: np.ndarray, batch: int) -> float:
    """Seconds of one call in ONNX Runtime, the best of several."""
    session = session_of(path)
    feed = {session.get_inputs()[0].name: np.repeat(sample, batch, 0)}
    times = []
    for _ in range(TURNS):
        began = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - began)
    return min(times)


class Bench:
    """One network, its file and its samples."""

    def __init__(
        self, name: str, data: Path, count: int, folder: Path, with_latency: bool, trained: Path | None
    ) -> None:
        self.name, self.folder, self.with_latency = name, folder, with_latency
        self.calibration, self.test = NETWORKS[name].samples(data, count)
        self.float_file = folder / f"{name}.onnx"
        self.module = built(name, data, trained)
        write_graph(read_graph(self.module, torch.from_numpy(self.calibration["inputs"][:2])), self.float_file)
        self.expected = outputs_of(self.float_file, self.test["inputs"])
        self.given = [folder / f"{name}.{part}.npz" for part in ("calibration", "test")]
        for path, arrays in zip(self.given, (self.calibration, self.test), strict=True):
            np.savez(path, **arrays)

    def ours(self, scheme: str, settings: dict[str, Any]) -> dict[str, Any]:
        out = self.folder / "out.onnx"
        began = time.process_time()
        arrondi.quantize(
            self.float_file,
            scheme,
            **settings,
            calibration=self.calibration,
            out=out,
            evaluate=False,
            overwrite=True,
            samples=1024,
        )
        return self.measured(out, time.process_time() - began)

    def exported(self) -> Path:
        """The network as torch.export keeps it, for peers that want it so."""
        path = self.folder / f"{self.name}.pt2"
        if not path.exists():
            batch = torch.export.Dim("batch", min=1, max=1024)
            sample = torch.from_numpy(self.calibration["inputs"][:2])
            torch.export.save(torch.export.export(self.module, (sample,), dynamic_shapes=({0: batch},)), path)
        return path

    def peer(self, name: str, python: str, scheme: str) -> dict[str, Any]:
        out = self.folder / ("peer.npz" if name == "pt2e" else "peer.onnx")
        given = [self.exported(), out, *self.given] if name == "pt2e" else [self.float_file, out, self.given[0]]
        made = subprocess.run([python, PEERS / f"{name}_networks.py", *given, scheme], capture_output=True, text=True)
        if made.returncode:
            raise Refused(made.stderr.strip().splitlines()[-1])
        return self.measured(out, json.loads(made.stdout.splitlines()[-1])["seconds"])

    def measured(self, out: Path, seconds: float) -> dict[str, Any]:
        found, wanted = outputs_of(out, self.test["inputs"]), self.expected
        classes, labels = found.argmax(1), self.test["labels"]
        noise = float(np.square(found.astype(np.float64) - wanted).sum())
        row = {
            "top1": float((classes == labels).mean()), "agreement": float((classes == wanted.argmax(1)).mean()),
            "sqnr_db": 10 * math.log10(float(np.square(wanted.astype(np.float64)).sum()) / noise) if noise else math.inf,
            "bytes": out.stat().st_size if out.suffix == ".onnx" else None, "seconds": seconds,
        }  # fmt: skip
        if self.with_latency and out.suffix == ".onnx":
            for batch in (1, 32):
                sample = self.test["inputs"][:1]
                row[f"speed_{batch}"] = latency(self.float_file, sample, batch) / latency(out, sample, batch)
        return row


def show(label: str, row: dict[str, Any]) -> None:
    speed = "".join(f"  {row[key]:5.2f} x" for key in ("speed_1", "speed_32") if key in row)
    size = "–" if row["bytes"] is None else f"{row['bytes']:,}"
    print(
        f"{label:46s} {100 * row['top1']:6.2f} %  {100 * row['agreement']:6.2f} %  {row['sqnr_db']:6.2f} dB  {size:>9s}  {row['seconds']:7.1f}{speed}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of real networks and samples")
    parser.add_argument("--trained", type=Path, help="directory of what train_networks.py wrote")
    parser.add_argument("--networks", default=",".join(REAL))
    parser.add_argument("--only", default="", help="regular expression for labels such as 'W8A8 rtn mse'")
    parser.add_argument("--samples", type=int, default=10_000, help="samples to measure on at most")
    parser.add_argument("--rows", type=Path, help="JSON lines of finished rows, read and added to")
    parser.add_argument("--peer", action="append", default=[], help="NAME=PYTHON, see benchmarks/peers; repeatable")
    parser.add_argument("--latency", action="store_true", help="time ONNX Runtime on what was written")
    args = parser.parse_args()
    known = {}
    if args.rows and args.rows.exists():
        known = {(r["network"], r["asked"], r["label"]): r for r in map(json.loads, args.rows.open())}
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.networks.split(","):
            bench = Bench(name, args.data, args.samples, Path(scratch), args.latency, args.trained)
            asked = f"{len(bench.calibration['inputs'])} samples to calibrate, {len(bench.test['inputs'])} to measure"
            print(f"{name}: {asked}")
            print(
                f"{'scheme and method':46s} {'top-1':>8s}  {'agreement':>8s}  {'signal':>9s}  {'bytes':>9s}  {'CPU s':>7s}"
            )
            show("float32", bench.measured(bench.float_file, 0.0))
            jobs: list[Job] = [
                (label, bench.ours, (scheme, settings)) for label, scheme, settings in rows_of(args.only)
            ]
            for peer in args.peer:
                other, _, python = peer.partition("=")
                schemes = dict.fromkeys(scheme for _, scheme, _ in rows_of(args.only))
                jobs += [(f"{scheme} {other}", bench.peer, (other, python, scheme)) for scheme in schemes]
            for label, job, given in jobs:
                key = name, asked, label
                if key not in known:
                    try:
                        known[key] = job(*given)
                    except Refused as why:
                        print(f"{label:46s} {why}", flush=True)
                        continue
                    if args.rows:
                        with args.rows.open("a") as file:
                            print(
                                json.dumps(
                                    {**dict(zip(("network", "asked", "label"), key, strict=True)), **known[key]}
                                ),
                                file=file,
                            )
                show(label, known[key])


if __name__ == "__main__":
    main()
