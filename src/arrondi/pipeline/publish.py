"""The end of a run: finished files get their names, in an order in which a kill at any moment leaves no half model.

Owns: `planned_files`, the names of everything that a run will write, and `publish`. Weights come first, then what travels with them,
then the documents, the manifest with the hash of each of these, and last of all config.json.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from arrondi.checkpoint import ModelDir, ShardPlan, ShardWriter, guard_disk, sync_folder, write_config, write_json
from arrondi.pipeline.journal import Journal
from arrondi.pipeline.manifest import CONFIG, MANIFEST, described


def planned_files(shards: ShardPlan, source: ModelDir, documents: Iterable[str] = ()) -> list[str]:
    """Every file that a run will write into its output, by its name there."""
    return [*shards.names, *travelling(source), *documents, MANIFEST, CONFIG]


def travelling(source: ModelDir) -> dict[str, Path]:
    """Tokenizer, chat template, licence: name in the output → file of the model."""
    return {path.as_posix(): source.path / path for path in source.other_files()}


def publish(
    journal: Journal,
    writer: ShardWriter,
    source: ModelDir,
    config: Mapping[str, Any],
    manifest: Mapping[str, Any],
    documents: Mapping[str, Any] | None = None,
) -> None:
    """Make the finished run's directory a model, and remove its working folder.

    Args:
        config: config.json of the output.
        manifest: what the manifest says besides `files`.
        documents: name → what is written there as JSON.

    Raises:
        OutputError: the disk is full; the same command goes on.
    """
    out = journal.out
    writer.publish()
    names = list(writer.plan.names)
    with guard_disk(out):
        for name, path in travelling(source).items():
            _copy(path, out / name)
            names.append(name)
    for name, document in (documents or {}).items():
        write_json(out / name, document)
    last = journal.work / CONFIG
    write_config(last, config)
    files: dict[str, Any] = described(out, names) | described(journal.work, [CONFIG])
    files |= {name: {} for name in documents or ()}  # they say how long it took
    write_json(out / MANIFEST, {**manifest, "files": dict(sorted(files.items()))})
    with guard_disk(out):
        os.replace(last, out / CONFIG)
        sync_folder(out)
    journal.remove()


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
