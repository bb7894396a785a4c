"""Runs `quantize_model` again and again in forked processes and kills each at another moment. A script, not a test.

Then it runs with files limited in size, and once more without. A moment is the n-th time that the run is about to change the disk: before a write (of which half is done), a flush, a rename,
a copied file, a removed folder. After each kill the same call runs to its end. One process does it once, so that all is imported,
and forks the others; it has one thread, because more would not survive a fork.

    python -m tests.pipeline.killer MODEL WORK TEXT METHOD EVERY    →  one JSON document
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.errors import FileFormatError, OutputError

LIMITS = (100, 4_000, 90_000)
"""Bytes that no file may exceed (RLIMIT_FSIZE): the journal, small files and weights meet them as they meet a full disk."""

TAIL = 18
"""The last moments, when files get their names, are all tried, whatever EVERY says."""


def arm(moment: int | None, log: Path) -> None:
    """Count every change of the disk in `log`, and die at the one numbered `moment`."""
    counter = itertools.count(1)

    def about_to() -> bool:
        number = next(counter)
        log.write_text(str(number))
        return number == moment

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if about_to():
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    pwrite = os.pwrite

    def half_written(handle: int, data: Any, offset: int) -> int:
        if about_to():
            pwrite(handle, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return pwrite(handle, data, offset)

    os.pwrite = half_written
    for name in ("fsync", "fdatasync", "replace", "ftruncate"):
        setattr(os, name, before(getattr(os, name)))
    for name in ("copyfile", "rmtree"):
        setattr(shutil, name, before(getattr(shutil, name)))


def child(job: Callable[[], object]) -> int:
    """The wait status of a forked process that does `job`."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            job()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def main(model: str, work: str, text: str, method: str, every: str) -> None:
    log = Path(work) / "log"
    recipe = arrondi.Recipe.simple("W4A16", method, group_size=32)
    options = arrondi.TextOptions(Path(text), samples=2, seq_len=24, eval_samples=2) if method == "gptq" else None

    def run(out: Path, moment: int | None = None) -> int:
        def job() -> None:
            arm(moment, log)
            arrondi.quantize_model(model, out, recipe, options, shard_bytes=100_000)

        return child(job)

    torch.set_num_threads(1)
    whole = Path(work) / "whole"
    arrondi.quantize_model(model, whole, recipe, options, shard_bytes=100_000)
    assert run(Path(work) / "counted") == 0
    total = int(log.read_text())
    tried = []
    for moment in range(1, total + 1):
        if moment % int(every) and moment <= total - TAIL:
            continue
        out = Path(work) / "killed"
        first = run(out, moment)
        half = state(out)
        again = run(out)
        tried.append(
            {
                "moment": moment,
                "killed": os.WIFSIGNALED(first) and os.WTERMSIG(first) == signal.SIGKILL,
                "half": half,
                "finished": again == 0,
                "changes": int(log.read_text()),
                "same": digest(out) == digest(whole),
                "files": sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir()),
            }
        )
        shutil.rmtree(out)
    out = Path(work) / "often"
    kills = sum(os.WIFSIGNALED(run(out, moment)) for moment in range(5, total, 9))
    often = {"kills": kills, "finished": run(out) == 0, "same": digest(out) == digest(whole)}
    limited = []
    for limit in LIMITS:
        out = Path(work) / f"limit {limit}"

        def full(out: Path = out, limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                arrondi.quantize_model(model, out, recipe, options, shard_bytes=100_000)
            except OutputError as error:
                os.write(end, str(error).encode())

        start, end = os.pipe()
        child(full)
        os.close(end)
        with os.fdopen(start) as pipe:
            error = pipe.read()
        half = state(out)
        limited.append({"error": error, "half": half, "finished": run(out) == 0, "same": digest(out) == digest(whole)})
    print(json.dumps({"total": total, "tried": tried, "often": often, "limited": limited}))


def state(out: Path) -> str:
    """What a reader makes of the directory: "finished", or the reason why it is none."""
    try:
        Checkpoint.open(out)
    except FileFormatError as error:
        return str(error).replace(str(out), "OUT")
    return "finished"


def digest(out: Path) -> dict[str, str]:
    """Every file's hash; of the report without how long it took."""
    found = {}
    for path in sorted(p for p in out.iterdir() if p.is_file()):
        content = path.read_bytes()
        if path.name == "report.json":
            content = json.dumps({**json.loads(content), "seconds": 0}).encode()
        found[path.name] = hashlib.sha256(content).hexdigest()
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
