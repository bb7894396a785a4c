"""The end of a run: finished files get their names, in an order in which a kill at any moment leaves no half model.

Owns: `planned_files`, the names of everything that a run will write, and `publish`. Weights come first, then what travels with them,
then the documents, the manifest with the digest of each of these, and last of all config.json.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from arrondi.checkpoint import (
    ShardPlan,
    ShardWriter,
    file_sha256,
    guard_disk,
    read_report,
    sync_folder,
    write_config,
    write_json,
)
from arrondi.errors import FileFormatError, OutputError
from arrondi.pipeline.journal import Journal
from arrondi.pipeline.manifest import CONFIG, MANIFEST, content, sealed


def planned_files(shards: ShardPlan, travelling: Iterable[str] = (), documents: Iterable[str] = ()) -> list[str]:
    """Every file that a run will write into its output, by its name there."""
    return [*shards.names, *travelling, *documents, MANIFEST, CONFIG]


def publish(
    journal: Journal,
    writer: ShardWriter,
    travelling: Mapping[str, Path],
    config: Mapping[str, Any],
    manifest: Mapping[str, Any],
    documents: Mapping[str, Any] | None = None,
    made: Mapping[str, Path] | None = None,
) -> None:
    """Make the finished run's directory a model, and remove its working folder.

    Args:
        travelling: name in the output → file that is copied there.
        config: config.json of the output.
        manifest: what the manifest says besides `files`.
        documents: name → what is written there as JSON.
        made: name in the output → file of the run that is copied there.

    Raises:
        OutputError: the disk is full; the same command goes on.
        FileFormatError: what travels with the model was changed while the run was going on.
    """
    out = journal.out
    writer.publish()
    with guard_disk(out):
        for name, path in travelling.items():
            _copy(path, out, name, manifest["model"]["files"].get(name))
        for name, path in (made or {}).items():
            _copy(path, out, name, file_sha256(path))
    for name, document in (documents or {}).items():
        write_json(out / name, document)
    last = journal.work / CONFIG
    write_config(last, config)
    files: dict[str, Any] = writer.described(journal.wrote)
    files |= {name: _described(out / name) for name in {*travelling, *(made or {}), *writer.plan.names} - files.keys()}
    files |= {name: {"content": content(read_report(out / name))} for name in documents or ()}
    files[CONFIG] = _described(last)
    write_json(out / MANIFEST, sealed({**manifest, "files": dict(sorted(files.items()))}))
    with guard_disk(out):
        os.replace(last, out / CONFIG)
        sync_folder(out)
    journal.remove()


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _copy(path: Path, out: Path, name: str, sha256: str | None) -> None:
    """Copy a file that had this hash when the run began, into `out` and not to where a link leads."""
    target = out / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.parent.resolve().is_relative_to(out.resolve()):
        raise OutputError(f"{target.parent}: is in the way (a link). Remove it, and run the same command again.")
    if target.is_symlink():
        target.unlink()
    if path.is_file():
        shutil.copyfile(path, target)
    if not path.is_file() or file_sha256(target) != sha256:
        raise FileFormatError(f"{path}: changed while the run was going on. Run the same command again.")
    with target.open("rb") as file:
        os.fsync(file.fileno())
