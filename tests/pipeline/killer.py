"""Makes the same call again and again in forked processes and ends each at another moment. A script, not a test.

A moment is the n-th time that the run is about to change the disk: before a write (of which half is done), a flush, a rename,
a copied file, a removed folder. After each kill the same call runs to its end. Then files are limited in size, and the run goes
on without the limit. One process does it once, so that all is imported, and forks the others; it has one thread, because
more would not survive a fork.

    python -m tests.pipeline.killer MODEL WORK TEXT METHOD KILLS    →  one JSON document

METHOD is one that rounds, or `dequantize`, which restores what `rtn` wrote. KILLS moments are spread over the call; the last ones, when
files get their names, are among them.
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
from arrondi.pipeline import TextOptions, dequantize_model, quantize_model, restore

LIMITS = (100, 4_000, 90_000)
"""Bytes that no file may exceed (RLIMIT_FSIZE): the journal, small files and weights meet them as they meet a full disk."""

TAIL = 4
"""So many of the last moments, when files get their names, are tried, whatever KILLS says."""


def call_of(model: str, work: Path, text: str, method: str) -> Callable[[Path], object]:
    """What is to be killed: a function of the output."""
    if method == "dequantize":
        recipe = arrondi.Recipe.simple("W4A16", "rtn", group_size=32)
        quantize_model(model, work / "packed", recipe)
        restore._GROUP_BYTES = 50_000
        return lambda out: dequantize_model(work / "packed", out, shard_bytes=100_000)
    searched = method.startswith("trellis")
    scheme = "w=tcq2-l8-square/channel/float16/rht16" if searched else "W4A16"
    recipe = arrondi.Recipe.simple(scheme, method, group_size=None if searched else 32)
    texts = TextOptions(Path(text), samples=2, seq_len=24, eval_samples=2) if method != "rtn" else None
    return lambda out: quantize_model(model, out, recipe, texts, shard_bytes=100_000)


class Killer:
    """The same call, made in processes of its own.

    Attributes:
        whole: the output of a call that nothing disturbed.
        total: how often such a call changes the disk.
    """

    def __init__(self, call: Callable[[Path], object], work: Path) -> None:
        self.call, self.work = call, work
        self.whole = work / "whole"
        self.call(self.whole)
        self.run(work / "counted")
        self.total = self.changes

    def run(self, out: Path, moment: int | None = None) -> int:
        """The wait status of a process that makes the call, and is killed at `moment`."""

        def job() -> None:
            arm(moment, self.work / "log")
            self.call(out)

        return child(job)

    @property
    def changes(self) -> int:
        """How often the last call changed the disk."""
        return int((self.work / "log").read_text())

    def ends_well(self, out: Path) -> dict[str, Any]:
        """Make the call once more, undisturbed, and compare."""
        finished = self.run(out) == 0
        return {"finished": finished, "same": digest(out) == digest(self.whole), "changes": self.changes}

    def killed(self, out: Path, moments: list[int]) -> dict[str, Any]:
        """One call after the other in the same directory, each killed, then one that is not."""
        kills = sum(os.WIFSIGNALED(s) and os.WTERMSIG(s) == signal.SIGKILL for s in (self.run(out, m) for m in moments))
        return {"moments": moments, "kills": kills, "half": state(out), **self.ends_well(out)}

    def limited(self, out: Path, limit: int) -> dict[str, Any]:
        """A call under a limit that the kernel holds, then one without."""
        said = self.work / f"said at {limit}"

        def job() -> None:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                self.call(out)
            except OutputError as error:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
                said.write_text(str(error))

        child(job)
        return {"said": said.read_text() if said.exists() else "", "half": state(out), **self.ends_well(out)}


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


def main(model: str, work: str, text: str, method: str, kills: str) -> None:
    torch.set_num_threads(1)
    killer = Killer(call_of(model, Path(work), text, method), Path(work))
    spread = torch.linspace(1, killer.total - TAIL, int(kills)).round().int().tolist()
    moments = [*dict.fromkeys(spread), *range(killer.total - TAIL + 1, killer.total + 1)]
    result = {
        "total": killer.total,
        "once": [killer.killed(killer.work / f"killed at {m}", [m]) for m in moments],
        "often": killer.killed(killer.work / "killed often", list(range(5, killer.total, 15))),
        "limited": [killer.limited(killer.work / f"limited to {limit}", limit) for limit in LIMITS],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
