"""Importance matrices and the sites of a model: what a file says of them, and files of our own.

Owns: `Known`, `match_imatrix` (file → sites) and `make_imatrix` (model and text → file). A site that a file lacks is named; it is never
taken to be unimportant.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.arguments import check_arguments
from arrondi.calibration import Energy
from arrondi.checkpoint import Checkpoint, file_sha256
from arrondi.checkpoint.gguf_names import GGUFNames, blocks_of
from arrondi.checkpoint.imatrix import Importance, ImportanceMatrix, read_imatrix, write_imatrix
from arrondi.errors import DataError, FileFormatError
from arrondi.measure.calling import Calling
from arrondi.measure.data import Data, check_windows, chosen, read_windows
from arrondi.measure.text import fit_length, load_tokenizer, positions_of
from arrondi.model import Budget, OnDisk, Site, Source, Stream, device_named, settle, walk
from arrondi.pipeline.listing import listed
from arrondi.pipeline.statistics import Forward, Key, Seen, Side, collect

_HIDDEN_LIMIT: Final = 512 << 20


@dataclass(frozen=True)
class Known:
    """What an importance matrix says of a model.

    Attributes:
        columns: site → mean x² of every input column, float32 (n,).
        tokens: site → rows that were summed, at least 1.
        lacking: sites that the file has nothing of.
        empty: sites that no row reached; all of their columns count the same.
        unused: names in the file that are of no site.
        facts: for the report.
    """

    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    lacking: frozenset[str] = frozenset()
    empty: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def told(self, planned: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
        """Facts for the report, and sentences about the sites that will be rounded."""
        wanted = set(planned)
        found = []
        for names, what in (
            (sorted(self.lacking & wanted), "has nothing of {}; they are rounded as if there were none"),
            ([n for n in self.empty if n in wanted], "saw no token for {}; all of their columns count the same"),
            (list(self.unused), "also holds {}, which no weight of this model answers to"),
        ):
            if names:
                found.append(f"The importance matrix {what.format(listed(names))}.")
        return {**self.facts, "lacking": sorted(self.lacking & wanted)}, found


def match_imatrix(path: Path, source: Source) -> Known:
    """Read an importance matrix and find the sites that its names mean.

    Raises:
        FileFormatError: the file is none.
        DataError: it is of another model: a name that GGUF or this model does not have, or another number of inputs.
    """
    matrix = read_imatrix(path)
    names, blocks = _names(source)
    grouped = _grouped(_linear(source), names)
    columns: dict[str, torch.Tensor] = {}
    tokens: dict[str, int] = {}
    empty: list[str] = []
    used = {name for spelled in _grouped(source.sites, names) for name in spelled}
    for spelled, sites in grouped.items():
        name = next((n for n in spelled if n in matrix.entries), None)
        if name is None:
            continue
        entry, count = matrix.entries[name], max(_place(s) or 0 for s in sites) + 1
        for site in sites:
            width = site.matrix_shape[1]
            found = entry.mean(width, _place(site), count)
            if found is None:
                raise DataError(
                    f"{path}: {name} has {entry.sums.numel()} numbers, but {site.name} has {width} inputs{f' and {count} matrices' if count > 1 else ''}. "
                    "It is the importance matrix of another model."
                )
            columns[site.name], tokens[site.name] = found, max(entry.count(_place(site)), 1)
            if not entry.count(_place(site)):
                empty.append(site.name)
    unused = sorted(matrix.entries.keys() - used)
    for name in unused:
        _check_name(path, name, names, blocks)
    if not columns:
        raise DataError(
            f"{path}: none of its names is of this model, {unused[0]} for example. Make one with arrondi imatrix."
        )
    lacking = frozenset(s.name for s in _linear(source)) - columns.keys()
    facts = {"file": path.name, "sha256": file_sha256(path), "datasets": list(matrix.datasets), "chunks": matrix.chunks, "sites": len(columns)}  # fmt: skip
    return Known(columns, tokens, lacking, tuple(empty), tuple(unused), facts)


def _check_name(path: Path, name: str, names: GGUFNames, blocks: int) -> None:
    """Refuse a name that cannot be of this model. Weights that GGUF holds in other parts than the model have names of their own."""
    number = re.search(r"\d+", name)
    if not names.knows(name):
        raise DataError(f"{path}: {name} is no name of GGUF, so it is the importance matrix of another model or tool.")
    if number and blocks and int(number[0]) >= blocks:
        raise DataError(
            f"{path}: {name} is of block {number[0]}, and this model has {blocks}. It is the importance matrix of another model."
        )


# ── files of our own ──────────────────────────────────────────────────────────────────────────────────────────────────


def make_imatrix(
    model: str | Path,
    calibration: Data,
    out: str | Path,
    *,
    samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    column: str | None = None,
    head: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Write the importance matrix of a model on a text, in llama.cpp's format (GGUF; the legacy one under the ending `.dat`).

    The values are Σ x² of what every linear layer is given, from a float32 run of the original, block by block.

    Args:
        model: a model directory or Hub name.
        calibration: what to read; see `arrondi.measure.read_windows`.
        out: the file to write.
        samples, seq_len, seed, column: as in `TextOptions`; llama.cpp calls windows chunks.
        head: the output head, too.
        overwrite: a file that is there may be replaced.
        device: where units are run.
        progress: called with (blocks done, blocks, what).

    Returns:
        facts: file, weights, windows, tokens, and the weights that GGUF has no name for.

    Raises:
        ArrondiError: see its sentence.
    """
    check_arguments(make_imatrix, locals())
    path = Path(out)
    if path.exists() and not overwrite:
        raise FileFormatError(f"{path}: there already. Choose another name, or say --overwrite.")
    source, where = OnDisk(Checkpoint.open(model)), device_named(device)
    names, _ = _names(source)
    seq_len, note = fit_length(seq_len, positions_of(source.model))
    tokenizer = load_tokenizer(source.home)
    windows = chosen(read_windows(calibration, tokenizer, seq_len, "calibration text", column), samples, seed)
    check_windows(windows, source.model)
    calling = Calling.of(source.model)
    batches = [calling(ids) for ids in windows.batches(max(2048 // windows.seq_len, 1))]
    notes = [*([note] if note else []), *calling.notes, *settle(source, calling(windows.ids[:1]))]
    sums = sums_of_inputs(source, batches, where, head, progress or (lambda done, total, what: None))
    sites = [s for s in _linear(source) if head or s.block is not None]
    grouped = _grouped(sites, names)
    entries = {name: entry for spelled, some in grouped.items() if (entry := _entry(some, sums)) for name in spelled}
    if not entries:
        raise DataError(
            f"{model}: no linear layer of it has a name in GGUF, so llama.cpp has no importance matrix for it."
        )
    write_imatrix(path, ImportanceMatrix(entries, (windows.source,), len(windows), windows.seq_len))
    named = {s.name for some in grouped.values() for s in some}
    return {
        "file": str(path),
        "weights": len(entries),
        "windows": len(windows),
        "tokens": windows.ids.numel(),
        "unnamed": sorted(s.name for s in sites if s.name not in named),
        "unreached": sorted(s.name for s in sites if s.name not in sums),
        "notes": notes,
    }


@torch.no_grad()
def sums_of_inputs(
    source: OnDisk,
    batches: Sequence[Any],
    device: torch.device,
    head: bool,
    report: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[str, Energy]:
    """Site → Σ x² and max |x| of its input in the original, in one walk; of linear layers, with `head` of those outside the blocks, too."""
    instance = source.instance(device=device)
    units = source.units_of(instance)
    found: dict[str, Energy] = {}

    def note(sites: Sequence[Site], forwards: Sequence[Forward]) -> None:
        params = {s.param for s in sites if not instance.is_empty(s.param)}
        seen: Mapping[Key, Seen] = (
            collect(params, {}, Side(instance.parameter, forwards, instance.owner), {"energy"}) if params else {}
        )
        for site in sites:
            one = seen.get((site.param, site.param_index))
            if one is not None and one.energy is not None and one.tokens:
                found[site.name] = one.energy

    def visit(i: int, streams: Sequence[Stream]) -> None:
        report(i, len(units), f"block {i + 1} of {len(units)}")
        note([s for s in _linear(source) if s.block == i], streams[0].forwards(i))

    with Stream(units, batches, Budget(_HIDDEN_LIMIT), Path(tempfile.gettempdir())) as stream:
        stream.begin()
        stream.to_the_end = head
        for _ in walk([[stream]], visit):
            pass
        outer = [s for s in _linear(source) if s.block is None]
        if head and outer:
            with ExitStack() as loaded:
                loaded.enter_context(units.outer_loaded())
                loaded.callback(instance.drop, [s.param for s in outer])
                instance.fill([s.param for s in outer])
                note(outer, [partial(stream.output, *p) for p in stream.pieces()])
    return found


def _entry(sites: Sequence[Site], sums: Mapping[str, Energy]) -> Importance | None:
    """The matrices of one stack, or one matrix; those that no token reached count none."""
    if not any(s.name in sums for s in sites):
        return None
    count, width = max(_place(s) or 0 for s in sites) + 1, sites[0].matrix_shape[1]
    rows, counts = torch.zeros(count, width), torch.zeros(count)
    for site in sites:
        if site.name in sums:
            energy, place = sums[site.name], _place(site) or 0
            rows[place], counts[place] = energy.squares.sum(0).float(), float(sum(energy.tokens))
    return Importance(rows, counts)


def _names(source: Source) -> tuple[GGUFNames, int]:
    config = source.config
    blocks = blocks_of(config)
    kind = (config.get("text_config") or {}).get("model_type") or config.get("model_type", "")
    return GGUFNames(kind.removesuffix("_text")), blocks


def _linear(source: Source) -> list[Site]:
    return [s for s in source.sites if s.kind == "linear" and s.reached]


def _place(site: Site) -> int | None:
    """Which matrix of a stack of experts, in the model's own count."""
    return site.index if site.index is not None else site.param_index


def _grouped(sites: Iterable[Site], names: GGUFNames) -> dict[tuple[str, ...], list[Site]]:
    """Names in GGUF → the sites of that weight: one, or the matrices of a stack."""
    found: dict[tuple[str, ...], list[Site]] = {}
    for site in sites:
        spelled = names.of(site.tensor)
        if spelled:
            found.setdefault(spelled, []).append(site)
    return found
