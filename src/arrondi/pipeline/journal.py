"""The journal of a run: what is finished, so that a killed run continues where it was.

Owns: `Journal`, the folder `OUT/.arrondi` with its lock, and the rule of what an output directory may hold before a run.

A line says that a step is finished, and what that claims: the digest of every tensor that it wrote, and of every tensor of the
source that was read for it. It is added only after the bytes are on the disk. Nothing in it is trusted: a line carries a checksum
that covers the lines before it, and `verify` compares each claim with the bytes that are there. From the first step that does
not hold, the run is done again; if it was made of other weights, all of it is.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from arrondi.checkpoint import WORK, guard_disk, sync_folder
from arrondi.errors import OutputError
from arrondi.pipeline.lines import VERSION, Digests, line_of, read_lines, seal
from arrondi.pipeline.manifest import CONFIG, MANIFEST, Manifest, finished_key, inside

_WEIGHTS: Final = ("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors")
"""What a run whose journal cannot be read has published at most, besides what is listed somewhere."""


class Journal:
    """The open journal of one run. Use as a context manager; it holds a lock on the output directory.

    Attributes:
        work: `OUT/.arrondi`.
        steps: finished steps, name → what was recorded with them.
        note: why an unfinished run that was here is not continued, for people; empty if there was none or it is.
    """

    def __init__(
        self,
        out: Path,
        key: str,
        files: Sequence[str] = (),
        machine: Mapping[str, str] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """Open or create the journal of the run `key` in `out`.

        Args:
            files: every file that the run will write into `out`, so that whoever comes after knows what is to be removed.
            machine: what the run's bytes depend on besides its inputs; to say why it is another run.

        Raises:
            OutputError: the directory holds something else, another run's state, or a run that is going on.
        """
        self.out, self.work = out, out / WORK
        self.steps: dict[str, Any] = {}
        self.note = ""
        self._machine = dict(machine or {})
        self._head = {"journal": VERSION, "run": key, "machine": self._machine, "files": list(files)}
        self._claims: dict[str, tuple[Digests, Digests]] = {}
        replacing = self._refuse(overwrite)
        self._lock = self._take_lock()
        try:
            if self._refuse(overwrite) or replacing:  # the run that held the lock may have finished meanwhile
                self._discard([])
            self._open()
        except BaseException:
            os.close(self._lock)
            raise

    # ── whose directory it is ─────────────────────────────────────────────────────────────────────────────────────────

    def _refuse(self, overwrite: bool) -> bool:
        """Whether a finished output is to be replaced; refuses whatever must not be touched."""
        out = self.out
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out}: a file. Give a directory that does not exist yet.")
        if self.work.is_symlink():  # what it leads to is not ours to clear
            raise OutputError(f"{self.work}: is in the way (a link). Choose a new directory.")
        finished = finished_key(out) is not None
        if finished and not overwrite:
            manifest = Manifest.read(out)
            changes = _changes(manifest.machine if manifest else {}, self._machine)
            raise OutputError(
                f"{out}: already holds a finished model of another run{changes}. Nothing was touched: choose a new directory or add --overwrite."
            )
        if not finished and not self.work.exists() and out.exists() and any(out.iterdir()):
            first = min(p.name for p in out.iterdir())
            raise OutputError(
                f"{out}: already holds {first} and maybe more. Nothing was touched: choose a new directory."
            )
        return finished

    def _take_lock(self) -> int:
        path = self.work / "lock"
        while True:
            try:
                with guard_disk(self.out):
                    self.work.mkdir(parents=True, exist_ok=True)
                    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
                raise OutputError(f"{self.work}: is in the way ({error.strerror}). Choose a new directory.") from error
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(lock)
                busy = isinstance(error, BlockingIOError)
                why = "another run is writing here" if busy else f"it cannot be locked ({error.strerror})"
                raise OutputError(f"{self.out}: {why}. Wait for it, or choose a new directory.") from error
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                return lock
            os.close(lock)  # the run that held it has ended and removed the file

    def _discard(self, files: Sequence[str]) -> None:
        """Remove what earlier runs wrote here, and nothing else. config.json goes first: what is left is never mistaken for a
        model; the manifest goes last: it knows what is still to be removed."""
        manifest, here = Manifest.read(self.out), self.out.resolve()
        listed = [n for n in dict.fromkeys([*files, *(manifest.files if manifest else ())]) if inside(n)]
        shards = [p.name for pattern in _WEIGHTS for p in self.out.glob(pattern)]
        names = [n for n in (CONFIG, *listed, "report.json", *shards) if n != MANIFEST]
        for path in [self.out / (n + suffix) for n in [*names, MANIFEST] for suffix in ("", ".partial")]:
            followed = path.parent.resolve()  # not through a link that somebody put here
            if (path.is_file() or path.is_symlink()) and (followed == here or here in followed.parents):
                path.unlink()
        folders = {p for n in listed for p in (self.out / n).parents if self.out in p.parents}
        for folder in sorted(folders, key=lambda p: len(p.parts), reverse=True):
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()
        for path in self.work.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    # ── lines ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _open(self) -> None:
        head, lines = read_lines(self.work / "journal.jsonl")
        if head != self._head:
            if head is not None:
                changes = _changes(head["machine"], self._machine)
                self.note = f"{self.out} held an unfinished run of another command or model{changes}; it was discarded."
            self._discard(head["files"] if head is not None else [])
            lines = []
        for line in lines:
            self.steps[line["step"]] = line["data"]
            self._claims[line["step"]] = line["wrote"], line["read"]
        self._rewrite()

    def _rewrite(self) -> None:
        """Write the journal anew, without what a kill cut off and without steps that do not hold."""
        self._sum = ""
        path = self.work / "journal.jsonl"
        fresh = path.with_suffix(".new")
        lines: list[dict[str, Any]] = [self._head]
        lines += [line_of(step, data, *self._claims[step]) for step, data in self.steps.items()]
        with guard_disk(self.out):
            with fresh.open("w", encoding="utf-8") as file:
                file.writelines(self._sealed(line) for line in lines)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
            sync_folder(self.work)

    def _sealed(self, line: dict[str, Any]) -> str:
        text, self._sum = seal(line, self._sum)
        return text

    def record(self, step: str, data: Any, *, wrote: Digests | None = None, read: Digests | None = None) -> None:
        """Note a step as finished. What it wrote must be on the disk already.

        Args:
            data: what JSON can hold; it comes back as it is.
            wrote: digests of the tensors that it wrote, as `ShardWriter.sync` gives them.
            read: digests of the tensors that were read for it, as `Ledger.taken` gives them.
        """
        self.steps[step] = json.loads(json.dumps(data))  # what a run that goes on finds
        self._claims[step] = dict(wrote or {}), dict(read or {})
        with guard_disk(self.out), (self.work / "journal.jsonl").open("a", encoding="utf-8") as file:
            file.write(self._sealed(line_of(step, data, *self._claims[step])))
            file.flush()
            os.fsync(file.fileno())

    @property
    def wrote(self) -> dict[str, str]:
        """The digest of every tensor that the finished steps wrote."""
        return {name: digest for wrote, _ in self._claims.values() for name, digest in wrote.items()}

    def verify(self, written: Callable[[str], str | None], source: Callable[[str], str | None]) -> None:
        """Compare what finished steps claim with what is there, and forget those that do not hold.

        A step whose bytes differ is forgotten with all that follow it. What a later step says it replaces is not held against
        the earlier one. If a tensor of the source differs, all steps are:
        they belong to another model. `note` says so. Reads all that the finished steps read and wrote.

        Args:
            written: output tensor → digest of the bytes that lie in its place, `ShardWriter.digest`.
            source: stored tensor of the model → digest of its bytes now, `Ledger.check`.
        """
        steps = list(self.steps)
        for step in steps:
            if any(source(name) != digest for name, digest in self._claims[step][1].items()):
                self.note = f"{self.out} held an unfinished run of other weights, which have changed since. The run starts again."
                return self._drop(steps)
        while (first := self._damaged(written)) is not None:
            steps = list(self.steps)
            self.note = f"{self.out}: what was written in step {first!r} is damaged. The run goes on from before it."
            self._drop(steps[steps.index(first) :])

    def _damaged(self, written: Callable[[str], str | None]) -> str | None:
        """The first step whose bytes are not there."""
        replaced: set[str] = set()
        bad = None
        for step in reversed(self.steps):
            claims = self._claims[step][0].items()
            if any(written(name) != digest for name, digest in claims if name not in replaced):
                bad = step
            replaced.update(self.steps[step].get("replaces", ()) if isinstance(self.steps[step], dict) else ())
        return bad

    def _drop(self, steps: Sequence[str]) -> None:
        for step in steps:
            del self.steps[step], self._claims[step]
        self._rewrite()

    def remove(self) -> None:
        """The run is complete: the working folder goes."""
        shutil.rmtree(self.work, ignore_errors=True)  # the same command, run again, does it as well
        self.close()

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """In brackets, what is another machine here than there."""
    found = [f"{name} {before[name]}, here {now.get(name)}" for name in before if before[name] != now.get(name)]
    return f" (made with {'; '.join(found)})" if found else ""
