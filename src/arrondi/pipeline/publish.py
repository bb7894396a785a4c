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
    sync_folder,
    write_config,
    write_json,
)
from arrondi.pipeline.journal import Journal
from arrondi.pipeline.manifest import CONFIG, MANIFEST


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
) -> None:
    """Make the finished run's directory a model, and remove its working folder.

    Args:
        travelling: name in the output → file that is copied there.
        config: config.json of the output.
        manifest: what the manifest says besides `files`.
        documents: name → what is written there as JSON.

    Raises:
        OutputError: the disk is full; the same command goes on.
    """
    out = journal.out
    writer.publish()
    with guard_disk(out):
        for name, path in travelling.items():
            _copy(path, out / name)
    for name, document in (documents or {}).items():
        write_json(out / name, document)
    last = journal.work / CONFIG
    write_config(last, config)
    files: dict[str, Any] = writer.described(journal.wrote)
    files |= {name: _described(out / name) for name in {*travelling, *writer.plan.names} - files.keys()}
    files |= {name: {} for name in documents or ()}  # they say how long it took
    files[CONFIG] = _described(last)
    write_json(out / MANIFEST, {**manifest, "files": dict(sorted(files.items()))})
    with guard_disk(out):
        os.replace(last, out / CONFIG)
        sync_folder(out)
    journal.remove()


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
