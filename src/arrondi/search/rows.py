"""The rows that a comparison has found, on disk: a killed one goes on, a wider one takes over what is known.

Owns: `RowStore`, the directory of a comparison: `compare.jsonl`, in the form of a run's journal, one line for every row under the key
of its run, and the folders of the models. Same key, same model, so a row holds for any call that asks for it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

from arrondi.checkpoint import guard_disk, sync_folder
from arrondi.errors import OutputError
from arrondi.pipeline.lines import VERSION, line_of, read_lines, seal

FILE: Final = "compare.jsonl"
_HEAD: Final = {"journal": VERSION, "run": "compare", "machine": {}, "files": []}


class RowStore:
    """An open directory of rows. Use as a context manager; it is locked against other comparisons.

    Attributes:
        rows: key of the run → its row.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            OutputError: something else is there, or another comparison is going on.
        """
        self.folder, self.path = folder, folder / FILE
        self.rows: dict[str, dict[str, Any]] = {}
        self.refuse(folder)
        with guard_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._open()
        except BaseException:
            os.close(self._lock)
            raise

    @staticmethod
    def refuse(folder: Path) -> None:
        """Refuse a directory in which something else is.

        Raises:
            OutputError: names it.
        """
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder}: a file. Give a directory that does not exist yet.")
        if folder.exists() and not (folder / FILE).is_file() and any(folder.iterdir()):
            first = min(p.name for p in folder.iterdir())
            raise OutputError(
                f"{folder}: holds {first} and no comparison. Nothing was touched: choose a new directory with --output."
            )

    def _open(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                f"{self.folder}: another comparison is writing here. Wait for it, or choose a new directory with --output."
            ) from error
        head, lines = read_lines(self.path)
        if head not in (_HEAD, None) or (head is None and b"\n" in self.path.read_bytes()):
            raise OutputError(
                f"{self.path}: is not what a comparison writes, or its first line is damaged. Delete it, or choose a new directory with --output."
            )
        self.rows = {line["step"]: line["data"] for line in lines}
        text, self._sum = seal(dict(_HEAD), "")
        for key, row in self.rows.items():
            line, self._sum = seal(line_of(key, row, {}, {}), self._sum)
            text += line
        with guard_disk(self.folder):
            os.ftruncate(self._lock, len(text) if head else 0)  # what a kill cut off goes
            if not head:
                self._append(text)
                sync_folder(self.folder)

    def _append(self, text: str) -> None:
        with guard_disk(self.folder):
            os.lseek(self._lock, 0, os.SEEK_END)
            os.write(self._lock, text.encode())
            os.fsync(self._lock)

    def record(self, key: str, row: dict[str, Any]) -> dict[str, Any]:
        """Note a row; returns it as it will be read again."""
        self.rows[key] = json.loads(json.dumps(row))
        line, self._sum = seal(line_of(key, self.rows[key], {}, {}), self._sum)
        self._append(line)
        return self.rows[key]

    def place(self, key: str, name: str) -> Path:
        """Where the model of a run is written."""
        return self.folder / f"{name}-{key[:8]}"

    def remove(self, place: Path) -> None:
        """Delete a model that this directory's comparison wrote."""
        if place.parent == self.folder and place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)

    def __enter__(self) -> RowStore:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._lock)
