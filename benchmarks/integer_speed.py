"""Integer networks: our compiled executor beside ONNX Runtime's int8, one thread.

Every network is quantized to W8A8 by rounding to nearest, and lowered (`arrondi.graph.lower`). Ours and ONNX Runtime take turns on the same samples; a row
has the median time of one call of each (ONNX Runtime on the file with QuantizeLinear and DequantizeLinear, which it fuses as far as it can), their
ratio, the float32 file's time in ONNX Runtime, and that of our reference in PyTorch. Before, the codes are compared: ours with the reference's and with
those of ONNX Runtime on the lowered file, bit for bit.

    python benchmarks/integer_speed.py --data DIR --trained DIR
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import arrondi
from arrondi.graph import Executor, Graph, Program, lower, read_graph, write_graph
from networks import NETWORKS, TRAINED, built

DEFAULT: Final = ("resnet20", "lenet", "ds-cnn", "mobilenet")
BATCHES: Final = (1, 32)
TURNS: Final = 60
REFERENCE_TURNS: Final = 5


def session(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A file in ONNX Runtime, with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    made = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = made.get_inputs()[0].name
    return lambda x: made.run(None, {name: x})[0]  # type: ignore[no-any-return]


def medians(turns: int, **calls: Callable[[], Any]) -> dict[str, float]:
    """Seconds of each call, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def quantized(name: str, data: Path, trained: Path | None, folder: Path) -> tuple[Path, Path, Graph, np.ndarray]:
    """Files in float32 and W8A8, the lowered graph, and samples."""
    calibration, test = NETWORKS[name].samples(data, max(BATCHES))
    whole, out = folder / f"{name}.onnx", folder / f"{name}.int8.onnx"
    write_graph(read_graph(built(name, data, trained), torch.from_numpy(calibration["inputs"][:2])), whole)
    given = {"inputs": calibration["inputs"][:256]}
    arrondi.quantize(whole, "W8A8", calibration=given, out=out, evaluate=False, overwrite=True)
    found = lower(read_graph(out))
    print(f"{name}: {found.integer} operators on codes, {sum(found.floats.values())} in floating point")
    return whole, out, found.graph, test["inputs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(), help="directory of real networks and samples")
    parser.add_argument("--trained", type=Path, help="directory of what train_networks.py wrote")
    parser.add_argument("--networks", help=f"default: those of {', '.join(DEFAULT)} whose weights are there")
    parser.add_argument("--turns", type=int, default=TURNS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.networks.split(",") if args.networks else [n for n in DEFAULT if args.trained or n not in TRAINED]
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            folder = Path(scratch)
            whole, out, graph, samples = quantized(name, args.data, args.trained, folder)
            write_graph(graph, folder / "lowered.onnx")
            ours, reference = Executor(graph), Program(graph)
            floats, int8, codes = session(whole), session(out), session(folder / "lowered.onnx")
            print(
                f"{'batch':>6s} {'ours':>10s} {'ORT int8':>10s} {'ratio':>7s} {'ORT fp32':>10s} {'PyTorch':>10s}  codes as"
            )
            for batch in BATCHES:
                x = samples[:batch]
                given = torch.from_numpy(x)
                made, expected = ours(given), reference(given)
                same = [
                    n for n, y in (("PyTorch", expected), ("ORT", torch.from_numpy(codes(x)))) if torch.equal(made, y)
                ]
                took = medians(args.turns, ours=lambda: ours(given), int8=lambda: int8(x), floats=lambda: floats(x))  # noqa: B023
                slow = medians(REFERENCE_TURNS, reference=lambda: reference(given))["reference"]  # noqa: B023
                ratio = took["ours"] / took["int8"]
                print(
                    f"{batch:6d} {1e3 * took['ours']:7.3f} ms {1e3 * took['int8']:7.3f} ms {ratio:6.2f}x {1e3 * took['floats']:7.3f} ms "
                    f"{1e3 * slow:7.1f} ms  {', '.join(same) or 'none'}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
