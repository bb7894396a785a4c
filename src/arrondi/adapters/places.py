"""Where adapters sit in a model directory: `Place`, `places`, and a copy of a directory with other numbers there (`rewritten`, `published`, `scratch`).

A place is a linear layer whose weight is one matrix of one stored tensor; peft calls it by its module, files by their tensors.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from arrondi.checkpoint import Checkpoint, ShardPlan, ShardWriter, write_config
from arrondi.model import OnDisk, Site
from arrondi.pipeline.journal import Journal
from arrondi.pipeline.ledger import recorded, travelling
from arrondi.pipeline.publish import planned_files, publish
from arrondi.pipeline.record import machine, manifest_of, run_key, versions
from arrondi.pipeline.restore import unquantized

_SHARD_BYTES = 5_000_000_000

Change = Callable[[torch.Tensor], torch.Tensor]
"""The weight of a place (out, in) in float32 → another."""


@dataclass(frozen=True)
class Place:
    """A linear layer.

    Attributes:
        module: its path in the model.
        site: its weight.
        stored: the tensor of the file that holds it.
    """

    module: str
    site: Site
    stored: str

    def weight(self, checkpoint: Checkpoint) -> torch.Tensor:
        """(out, in) float32, as it multiplies inputs that are not spread."""
        return self.view(checkpoint.plain(self.stored)).contiguous()

    def codes(self, checkpoint: Checkpoint) -> torch.Tensor:
        """(out, in) float32, as its codes mean it."""
        return self.view(checkpoint.dense(self.stored)).contiguous()

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The place inside its stored tensor."""
        return self.site.stored(tensor)


def places(source: OnDisk) -> dict[str, Place]:
    """Every place of a model by its module; a weight that several modules share counts for the first."""
    by_param: dict[str, list[Site]] = {}
    for site in source.sites:
        by_param.setdefault(site.param, []).append(site)
    found = {}
    for sites in by_param.values():
        site = sites[0]
        if len(sites) == 1 and site.kind == "linear" and site.param_index is None and site.piece and site.modules:
            found[site.modules[0]] = Place(site.modules[0], site, site.piece.source)
    return found


def rewritten(
    checkpoint: Checkpoint, out: Path, changes: Mapping[str, Change], at: Collection[Place], dtype: torch.dtype | None
) -> None:
    """Write a plain model with other weights at some places; one tensor is in memory at a time.

    Args:
        checkpoint: quantized or not.
        out: a new directory, nobody's yet.
        changes: module → what becomes of its weight.
        at: the places of these modules.
        dtype: of what is changed or was quantized; None: as stored.
    """
    there = _by_tensor(at)
    kinds = {name: dtype if dtype is not None and (name in there or name in checkpoint.placed) else kind for name, kind in _kinds(checkpoint)}  # fmt: skip
    writer = ShardWriter(out, _split(checkpoint, kinds))
    for name, kind in kinds.items():
        if name not in there and name not in checkpoint.placed:
            writer.copy(checkpoint.folder.entries[name])
        else:
            writer.put(name, _changed(checkpoint, name, changes, there).to(kind))
    writer.publish()
    checkpoint.folder.copy_other_files(out)
    write_config(out / "config.json", unquantized(checkpoint.folder.config))


def published(
    checkpoint: Checkpoint,
    out: Path,
    changes: Mapping[str, Change],
    at: Collection[Place],
    dtype: torch.dtype | None,
    *,
    overwrite: bool,
) -> None:
    """As `rewritten`, for people: a finished output like that of every run, with its manifest.

    Args:
        out: new, empty, or with `overwrite` a finished output of arrondi.
        dtype: of all floating-point numbers, which config.json says; None: as stored.

    Raises:
        OutputError: the directory holds something else, or the disk is full.
    """
    checkpoint, ledger = recorded(checkpoint)
    there, side_files = _by_tensor(at), travelling(checkpoint.folder)
    kinds = {n: dtype if dtype is not None and kind.is_floating_point else kind for n, kind in _kinds(checkpoint)}
    plan, config = _split(checkpoint, kinds), unquantized(checkpoint.folder.config)
    if dtype is not None:
        config |= dict.fromkeys({"dtype", "torch_dtype"} & config.keys() or {"dtype"}, str(dtype).removeprefix("torch."))  # fmt: skip
    # Nothing says which weights will be read, so that no run goes on where another ended: what is there is written again.
    key = run_key("adapt", ledger, checkpoint.folder.fingerprint(), str(dtype), sorted(changes))
    with Journal(out, key, planned_files(plan, side_files), machine(), overwrite=overwrite) as journal:
        writer = ShardWriter(journal.work, plan, out)
        for name, kind in kinds.items():
            writer.put(name, _changed(checkpoint, name, changes, there).to(kind))
        journal.record("tensors", None, wrote=writer.sync(), read=ledger.taken())
        publish(journal, writer, side_files, config, manifest_of(key, ledger, {"versions": versions()}))


def _by_tensor(at: Collection[Place]) -> dict[str, list[Place]]:
    there: dict[str, list[Place]] = {}
    for place in at:
        there.setdefault(place.stored, []).append(place)
    return there


def _kinds(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.dtype]]:
    """(tensor, its type); float32 where it was quantized."""
    for name in checkpoint.names:
        yield name, torch.float32 if name in checkpoint.placed else checkpoint.folder.entries[name].torch_dtype


def _split(checkpoint: Checkpoint, kinds: Mapping[str, torch.dtype]) -> ShardPlan:
    return ShardPlan.split([(n, kinds[n], shape) for n, shape in checkpoint.names.items()], _SHARD_BYTES)


def _changed(
    checkpoint: Checkpoint, name: str, changes: Mapping[str, Change], there: Mapping[str, list[Place]]
) -> torch.Tensor:
    """A tensor, in float32 where it holds floating-point numbers, with what its places become."""
    tensor = checkpoint.plain(name)
    for place in there.get(name, ()):
        view = place.view(tensor)
        view.copy_(changes[place.module](view.clone()))
    return tensor


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """A folder beside an output, on the same disk, that is gone afterwards."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
