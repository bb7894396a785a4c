"""The journal of a run: what is finished, so that a killed run continues where it was.

Owns: `Journal`, the folder `OUT/.arrondi` with its lock, and the rule of what an output directory may hold before a run.
A line is added only after the bytes that it speaks of are on the disk. A line cut off by a kill is ignored.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

from arrondi.checkpoint import guard_disk
from arrondi.errors import OutputError

WORK: Final = ".arrondi"
MANIFEST: Final = "manifest.json"


def finished_key(out: Path) -> str | None:
    """The key of the finished run that made this directory, or None."""
    try:
        found = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["run"]
        return str(found) if (out / "config.json").exists() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Journal:
    """The open journal of one run. Use as a context manager; it holds a lock on the output directory.

    Attributes:
        work: `OUT/.arrondi`.
        steps: finished steps, name → what was recorded with them.
    """

    def __init__(self, out: Path, key: str, *, overwrite: bool = False) -> None:
        """Open or create the journal of the run `key` in `out`.

        Raises:
            OutputError: the directory holds something else, another run's state, or a run that is going on.
        """
        self.out, self.work = out, out / WORK
        self.steps: dict[str, Any] = {}
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out}: a file. Give a directory that does not exist yet.")
        finished = finished_key(out) is not None
        if finished and not overwrite:
            raise OutputError(
                f"{out}: already holds a finished model of another run. Nothing was touched: choose a new directory or add --overwrite."
            )
        if not finished and not self.work.exists() and out.exists() and any(out.iterdir()):
            first = min(p.name for p in out.iterdir())
            raise OutputError(
                f"{out}: already holds {first} and maybe more. Nothing was touched: choose a new directory."
            )
        self._lock = self._take_lock()
        try:
            if finished:
                self._discard()
            self._file = self._open(key)
        except BaseException:
            os.close(self._lock)
            raise

    def _take_lock(self) -> int:
        with guard_disk(self.out):
            self.work.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise OutputError(
                f"{self.out}: another run is writing here. Wait for it, or choose a new directory."
            ) from error
        return lock

    def _open(self, key: str) -> Any:
        path = self.work / "journal.jsonl"
        lines = _complete_lines(path)
        if lines and lines[0].get("run") != key:
            self._discard()
            lines = []
        for line in lines[1:]:
            self.steps[line["step"]] = line["data"]
        fresh = path.with_suffix(".new")  # without the line that a kill cut off
        with guard_disk(self.out):
            with fresh.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines or [{"run": key}])
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
            return path.open("a", encoding="utf-8")

    def _discard(self) -> None:
        """Remove what another run wrote here. Its config goes first: what is left is never mistaken for a model."""
        written = [self.out / n for n in ("config.json", MANIFEST, "report.json", "model.safetensors.index.json")]
        written += [self.out / "model.safetensors", *self.out.glob("model-?????-of-?????.safetensors")]
        written += [p for p in self.work.iterdir() if p.name != "lock"]
        for path in written:
            path.unlink(missing_ok=True)

    def record(self, step: str, data: Any) -> None:
        """Note a step as finished. What it wrote must be on the disk already."""
        self.steps[step] = data
        with guard_disk(self.out):
            self._file.write(json.dumps({"step": step, "data": data}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def remove(self) -> None:
        """The run is complete: the working folder goes."""
        self.close()
        shutil.rmtree(self.work, ignore_errors=True)  # the same command, run again, does it as well

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
            os.close(self._lock)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not text.endswith("\n") or not isinstance(line, dict):
            break
        lines.append(line)
    return lines
