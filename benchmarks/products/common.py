"""Shared by the peers here: the options, the rotation of the weights, the timing and the JSON.

Owns: how one product y = x W^T of x (m, k) and W (n, k) is timed.  Uses the standard library alone, so that it runs in
any peer's virtual environment; nothing here imports the library under test.

Every case keeps so many copies of its packed weights that one round over them reads more than `--rotate-mb`: a product
finds no weight in a cache, as in a model that is larger than them. Calls go round over the copies, first one untimed
round, then calls one by one until `--seconds` are spent and there are at least `LEAST` of them; `ms` is their median.
`best_ms` is the shortest: where the two lie far apart, something else had the cores. With `--cpu-time` both are the process's own time on all of
its cores: of use with one thread, beside other work. `gbytes` are the bytes of one copy
of the packed weights, scales and zero points included, over 1e9.

OpenMP's threads are held on cores of their own: a scheduler may leave two of them on one core, where each spins until
its slice of time is over and a product of 0.3 ms takes 8.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Final

LEAST: Final = 7  # timed calls
PATIENCE: Final = 30.0  # seconds after which the untimed round is cut short; a first call may prepare a copy

Run = Callable[[int], object]  # do the product with this copy of the weights
Bind = Callable[[int], Run]  # make the activations of so many rows, and what multiplies them


@dataclass(frozen=True, slots=True)
class Case:
    """One way of a peer to multiply: `build(n, k, copies)` packs the weights, untimed."""

    name: str
    bits: float  # of a packed weight, with its share of what its group stores
    build: Callable[[int, int, int], Bind]
    row_bytes: int = 0  # stored once for each row of W

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of one copy of the packed weights."""
        return round(n * k * self.bits / 8) + n * self.row_bytes


def shapes(text: str) -> list[tuple[int, int]]:
    """Parse `NxK,NxK`: outputs times inputs.

    >>> shapes("4096x4096,11008x4096")
    [(4096, 4096), (11008, 4096)]
    """
    pairs = [part.lower().split("x") for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"not a list of shapes: got {text!r}. Write it as 4096x4096,11008x4096.")
    return [(int(n), int(k)) for n, k in pairs]


def bind_threads() -> None:
    """Start again with OMP_PROC_BIND set, unless it is: OpenMP reads it while torch or ggml are imported."""
    if "OMP_PROC_BIND" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"OMP_PROC_BIND": "true"})


def times_ms(run: Run, copies: int, seconds: float, clock: Callable[[], float]) -> tuple[float, float]:
    """Median and least milliseconds of one call of `run`, after an untimed round; a slow one gets fewer of both."""
    taken: list[float] = []

    def call() -> None:
        start = clock()
        run(len(taken) % copies)
        taken.append(clock() - start)

    while len(taken) < copies and (len(taken) < 2 or sum(taken) < PATIENCE):
        call()
    untimed = len(taken)
    while (spent := sum(timed := taken[untimed:])) < seconds or len(timed) < (LEAST if spent < 8 * seconds else 3):
        call()
    return statistics.median(timed) * 1e3, min(timed) * 1e3


def main(
    peer: str, prepare: Callable[[int], Sequence[Case]], about: str | None, arguments: list[str] | None = None
) -> None:
    """Read the options, time every case of `prepare(threads)` and write the JSON; a case that fails is left out.

    Ends with status 2 when `--cases` matches nothing, and with 1 when no case could be timed.
    """
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--shapes", type=shapes, default=shapes("4096x4096"), help="NxK,...: outputs x inputs")
    parser.add_argument("--m", type=lambda text: [int(m) for m in text.split(",")], default=[1], help="rows of x: 1,16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the list of results here")
    parser.add_argument("--cases", default="", help="only cases whose name contains one of these (comma-separated)")
    parser.add_argument("--seconds", type=float, default=0.5, help="timed for each m (0.5)")
    parser.add_argument("--rotate-mb", type=float, default=300, help="weights read before one comes again (300)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="time of the process on its cores, not of the clock on the wall"
    )
    options = parser.parse_args(arguments)
    clock = time.process_time if options.cpu_time else time.perf_counter
    bind_threads()
    wanted = options.cases.split(",")
    known = list(prepare(options.threads))
    chosen = [case for case in known if any(part in case.name for part in wanted)]
    if not chosen:
        parser.error(f"--cases {options.cases} matches none of: {', '.join(case.name for case in known)}")
    results: list[dict[str, object]] = []
    for case in chosen:
        for n, k in options.shapes:
            nbytes = case.nbytes(n, k)
            copies = max(2, ceil(options.rotate_mb * 1e6 / nbytes))
            try:
                bind = case.build(n, k, copies)
                for m in options.m:
                    ms, best = times_ms(bind(m), copies, options.seconds, clock)
                    times = {"ms": round(ms, 4), "best_ms": round(best, 4), "gbytes": round(nbytes / 1e9, 9)}
                    results.append({"peer": peer, "case": case.name, "n": n, "k": k, "m": m, **times})
                    speed = f"{nbytes / ms / 1e6:7.1f} GB/s  {2 * m * n * k / ms / 1e6:8.1f} GFLOP/s"
                    print(
                        f"{peer:12s} {case.name:30s} {n}x{k} m={m:<4d} {ms:9.3f} ms (best {best:.3f})  {speed}",
                        flush=True,
                    )
            except Exception as error:  # a peer may refuse a shape: the others are still timed
                reason = str(error).strip().partition("\n")[0][:200]
                print(f"{peer} {case.name} {n}x{k}: left out, {type(error).__name__}: {reason}", file=sys.stderr)
    if not results:
        parser.exit(1, f"{peer}: no case could be timed\n")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
