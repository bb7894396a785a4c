"""`manifest.json`: what a finished run was, and every file that it wrote, with its size and digest.

Owns: `Manifest`, `sealed` and `content`, and the questions that it answers: whether a directory holds the finished output of a run (`finished`), whether
its bytes are still those that were written, and which files an `--overwrite` removes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Final

from arrondi.checkpoint import WORK, file_sha256, read_report, shard_digest, written
from arrondi.errors import OutputError
from arrondi.pipeline.ledger import Ledger

MANIFEST: Final = "manifest.json"
CONFIG: Final = "config.json"
"""Written last: without it a directory is no model."""
_FACTS: Final[tuple[set[str], ...]] = ({"content"}, {"bytes", "sha256"}, {"bytes", "digest"})
"""What may be said of a file."""


@dataclass(frozen=True)
class Manifest:
    """What is read back of a manifest.

    Attributes:
        run: the key of the run.
        files: name in the output → `bytes` and, of a file of tensors, `digest` (see `shard_digest`), of another `sha256`. Of the
            report there is the `content`, without how long the run took and where the model lay: the same run gives the same
            manifest.
        tensors: stored tensor of the source → digest of the bytes that were read.
        machine: what the run's bytes depended on besides its inputs.
    """

    run: str
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, out: Path) -> Manifest | None:
        """The manifest of a directory; None if there is none, or none that a run of ours wrote."""
        try:
            text = (out / MANIFEST).read_bytes()
            document = json.loads(text.decode("utf-8"))
            if text != written(sealed(document)):
                return None
            run, files = document["run"], document.get("files", {})
            model, machine = document.get("model", {}), document.get("machine", {})
            tensors = model.get("tensors", {})
            whole = isinstance(run, str) and words(tensors) and words(machine) and isinstance(files, dict)
            if not whole or not all(inside(n) and f.keys() in _FACTS for n, f in files.items()):
                return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None
        return cls(run, files, tensors, machine)


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the checksum by which `Manifest.read` knows that nothing in it was changed."""
    plain = {k: v for k, v in document.items() if k != "sum"}
    return {**plain, "sum": hashlib.sha256(written(plain)).hexdigest()}


def content(report: Mapping[str, Any]) -> str:
    """The digest of what a report says, whatever time the run took, and wherever the model lay."""
    said = {k: v for k, v in report.items() if k not in ("seconds", "model")}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def words(table: object) -> bool:
    """Whether this maps words to words."""
    return isinstance(table, dict) and all(isinstance(w, str) for pair in table.items() for w in pair)


def inside(name: object) -> bool:
    """Whether a name from a file is one of a file inside the directory that it stands in."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.parts[0] != WORK


def finished_key(out: Path) -> str | None:
    """The key of the run that finished this directory, or None: there is none, or it has not come to its end."""
    manifest = Manifest.read(out)
    # Between the manifest and config.json a run that goes on is not finished; without its folder, somebody took the config.
    done = manifest is not None and ((out / CONFIG).exists() or not (out / WORK).exists())
    return manifest.run if done and manifest is not None else None


def finished(out: Path, key: str, ledger: Ledger) -> bool:
    """Whether `out` holds the complete output of the run `key`, byte for byte, of the weights that the source holds now.

    Reads all of both, which takes seconds where the run took minutes.

    Raises:
        OutputError: it was finished, and since then a file of it was lost, cut or changed, or the source's weights were.
    """
    manifest = Manifest.read(out)
    if manifest is None or finished_key(out) != key:
        return False
    for name, fault in faults(out, manifest.files):
        raise OutputError(
            f"{out / name}: {fault}. The run that wrote it had finished. Nothing was touched: delete {out} or add --overwrite, and run again."
        )
    for name, digest in manifest.tensors.items():
        if ledger.check(name) != digest:
            raise OutputError(
                f"{out}: was made of other weights: {name} has changed since, though the file kept its size and date. Nothing was touched: choose a new directory or add --overwrite."
            )
    shutil.rmtree(out / WORK, ignore_errors=True)  # a kill may have come when only this was left to do
    return True


def faults(out: Path, files: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """(name, what is wrong) of every file that is not as it was written; sizes first, because they cost nothing."""
    same_size = []
    for name, wanted in files.items():
        path = out / name
        if not path.is_file():
            yield name, "is missing"
        elif "bytes" in wanted and path.stat().st_size != wanted["bytes"]:
            yield name, f"has {path.stat().st_size} bytes, {wanted['bytes']} were written"
        else:
            same_size.append(name)
    for name in same_size:
        (kind,) = files[name].keys() - {"bytes"}
        if _FOUND[kind](out / name) != files[name][kind]:
            yield name, "holds other bytes than were written"


_FOUND: Final[Mapping[str, Callable[[Path], str | None]]] = MappingProxyType({
    "digest": shard_digest, "sha256": file_sha256, "content": lambda path: content(read_report(path)),
})  # fmt: skip
"""What is said of a file → what it is now."""


def check_apart(model: Path, out: Path) -> None:
    """Refuse an output that is the model's directory, lies in it, or holds it.

    Raises:
        OutputError: says which of the three.
    """
    source, target = model.resolve(), out.resolve()
    if source == target:
        raise OutputError(f"{out}: output and model are the same directory. Choose another output.")
    if source in target.parents:
        raise OutputError(f"{out}: lies inside the model's directory {model}. Choose an output outside of it.")
    if target in source.parents:
        raise OutputError(f"{out}: holds the model's directory {model}. Choose an output of its own.")
