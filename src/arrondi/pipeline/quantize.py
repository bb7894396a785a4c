"""Checkpoint in, packed checkpoint out: the streaming run.

Owns: `quantize_model`. Reads the model block by block, rounds it, writes the packed tensors to their places, notes the block in
the journal, and lets its memory go. With calibration text, the inputs of a block come from the already rounded blocks before
it; with evaluation text, the original and the rounded model are followed side by side and compared at the end.

A run that was killed is continued by the same call: finished blocks are read back from the output and only run, not rounded.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from arrondi.checkpoint import Checkpoint, ShardWriter, read_report
from arrondi.documents import finite
from arrondi.errors import OutputError, SchemeError
from arrondi.evaluate.compare import comparison_for
from arrondi.evaluate.text import Windows
from arrondi.model import Budget, Chain, Skeleton, TreeStore, bfloat16_pays
from arrondi.pipeline.journal import Journal
from arrondi.pipeline.ledger import Ledger, recorded, travelling
from arrondi.pipeline.manifest import check_apart, finished
from arrondi.pipeline.plan import Plan, PlannedTensor, check, make_plan
from arrondi.pipeline.publish import planned_files, publish
from arrondi.pipeline.recipe import Recipe
from arrondi.pipeline.record import facts_of, kept_of, machine, manifest_of, quantize_key
from arrondi.pipeline.rounding_step import BlockRounder, Rounded, round_tensor
from arrondi.pipeline.texts import TextOptions, Texts, read_texts

_BATCH_TOKENS = 2048
"""Tokens sent through a block at once."""
_HIDDEN_LIMIT = 256 << 20
"""Bytes of hidden states kept in memory; more goes to a file in the output directory."""
_GROUP_BYTES = 256 << 20
"""Tensors outside the blocks, or of a run without text, are written in groups of this size between two journal lines."""

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what is going on)."""


def quantize_model(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    text: TextOptions | None = None,
    *,
    layout: str | None = None,
    keep_misfits: bool = False,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize a model directory into another.

    Args:
        model: directory with config.json and safetensors files.
        out: directory to write; new, empty, or the unfinished (or finished) output of the same call.
        recipe: what becomes what.
        text: calibration and evaluation text.
        layout: storage layout; None takes the most widely read one that holds everything.
        keep_misfits: keep weights whose shape does not fit instead of refusing.
        shard_bytes: files are split when they would exceed this.
        overwrite: a finished output may be replaced.
        progress: called as the run goes on.

    Returns:
        the report, as written to `report.json`.

    Raises:
        FileFormatError, SchemeError, DataError, OutputError: see their sentences; nothing of the user's is lost.
    """
    text = text or TextOptions()
    out = Path(out)
    checkpoint = Checkpoint.open(model)
    if checkpoint.quantized:
        raise SchemeError(
            f"{checkpoint.folder.path} is already quantized. Restore it first: arrondi dequantize {checkpoint.folder.path} -o PLAIN."
        )
    check_apart(checkpoint.folder.path, out)
    checkpoint, ledger = recorded(checkpoint)
    skeleton = Skeleton(checkpoint)
    plan = make_plan(skeleton, recipe, layout=layout, keep_misfits=keep_misfits)
    check(plan)
    texts = read_texts(skeleton, text, recipe)
    key = quantize_key(checkpoint, ledger, plan, recipe, text, texts, shard_bytes)
    if not overwrite and finished(out, key, ledger):
        return read_report(out / "report.json")
    files = planned_files(plan.shards(shard_bytes), travelling(checkpoint.folder), ["report.json"])
    with Journal(out, key, files, machine(), overwrite=overwrite) as journal:
        _check_space(out, plan, bool(journal.steps))
        run = _Run(skeleton, plan, texts, journal, ledger, shard_bytes, progress or (lambda done, total, what: None))
        return run.execute(facts_of(checkpoint, plan, recipe, text, texts), key)


class _Run:
    """One execution: the state that the steps share."""

    def __init__(
        self,
        skeleton: Skeleton,
        plan: Plan,
        texts: Texts,
        journal: Journal,
        ledger: Ledger,
        shard_bytes: int,
        progress: Progress,
    ) -> None:
        self.ledger = ledger
        self.skeleton, self.plan, self.texts, self.journal, self.progress = skeleton, plan, texts, journal, progress
        self.shards = plan.shards(shard_bytes)
        self.rows: list[dict[str, Any]] = []
        self.started = time.monotonic()
        self.bfloat16 = bfloat16_pays(skeleton.checkpoint)
        self.chain: Chain | None = None
        if texts.calibration is not None or texts.evaluation is not None:
            self.chain = Chain(skeleton, _activations(plan))

    def execute(self, facts: dict[str, Any], key: str) -> dict[str, Any]:
        """All steps, then the files get their names; config.json comes last."""
        self.writer = ShardWriter(self.journal.work, self.shards, self.journal.out)
        self.journal.verify(self.writer.digest, self.ledger.check)
        if self.journal.note:
            self.progress(0, 1, self.journal.note)
        if "measured" not in self.journal.steps:
            with torch.no_grad(), contextlib.ExitStack() as stores:
                if self.chain is None:
                    self._without_chain()
                measured = None if self.chain is None else self._with_chain(self.chain, stores)
            seconds = round(time.monotonic() - self.started, 2)
            self._record("measured", {"measured": measured, "rows": self.rows, "seconds": seconds})
        done = self.journal.steps["measured"]
        return self._publish(facts, key, done)

    # ── without any text: tensors go from file to file ────────────────────────────────────────────────────────────────

    def _without_chain(self) -> None:
        groups = _grouped(self.plan.tensors)
        for i, group in enumerate(groups):
            self.progress(i, len(groups), f"tensors {i + 1} of {len(groups)}")
            self._step(f"tensors {i}", lambda group=group: [self._stored(t) for t in group])  # type: ignore[misc]

    def _stored(self, tensor: PlannedTensor) -> dict[str, Any] | None:
        """Round one tensor by itself, or copy it."""
        if tensor.status != "quantized":
            self._copy(tensor)
            return None
        return self._put(round_tensor(tensor, self.skeleton.checkpoint.folder.read(tensor.name)))

    # ── with text: block by block ─────────────────────────────────────────────────────────────────────────────────────

    def _with_chain(self, chain: Chain, stores: contextlib.ExitStack) -> dict[str, Any] | None:
        def store(trees: Iterable[torch.Tensor], limit: int) -> TreeStore:
            return stores.enter_context(TreeStore(Budget(limit), self.journal.work, trees))

        calibration, evaluation = self.texts.calibration, self.texts.evaluation
        ids = [] if calibration is None else calibration.batches(_batch_size(calibration))
        eval_ids = [] if evaluation is None else evaluation.batches(_batch_size(evaluation))
        total = len(chain) + 2
        self.progress(0, total, "reading text")
        hidden = store(chain.begin(ids), _HIDDEN_LIMIT)
        with chain.unrounded():
            reference = store(chain.begin(eval_ids), _HIDDEN_LIMIT // 2)
        front = self._front(chain)
        if front:
            self._step("front", lambda: self._outer(front, chain, [lambda b=b: chain.enter(b) for b in ids]))  # type: ignore[misc]
            self._restore(front)
            hidden.close()
            hidden = store(chain.begin(ids), _HIDDEN_LIMIT)
            rounded = store(chain.begin(eval_ids), _HIDDEN_LIMIT // 2)
            self.skeleton.overrides.clear()
        else:
            rounded = store(reference, _HIDDEN_LIMIT // 2)
        for i in range(len(chain)):
            self.progress(i, total, f"block {i + 1} of {len(chain)}")
            last = i + 1 == len(chain)
            chain.fill(i)
            with chain.unrounded():
                _advance(chain, i, reference)
            tensors = [t for t in self.plan.tensors if t.block == i]
            name = f"block {i}"
            known = self._rounded_before(chain, i) + (tensors if name in self.journal.steps else [])
            if known:
                self._restore(known)
                chain.drop(i)
                chain.fill(i)
            if name in self.journal.steps:
                self.rows += self.journal.steps[name]
            else:
                self._step(name, lambda tensors=tensors, i=i: self._block(tensors, chain, i, hidden))  # type: ignore[misc]
            if not last or self._outer_quantized():
                _advance(chain, i, hidden, bfloat16=self.bfloat16)
            _advance(chain, i, rounded)
            chain.drop(i)
            self.skeleton.overrides.clear()
        self.progress(len(chain), total, "outside the blocks")
        outer = [t for t in self.plan.tensors if t.block is None and t not in front]
        ends = [lambda j=j: chain.finish(ids[j], hidden[j]) for j in range(len(ids))]
        self._step("outer", lambda: self._outer(outer, chain, ends))
        self.skeleton.overrides.clear()
        hidden.close()
        if evaluation is None:
            return None
        self.progress(len(chain) + 1, total, "measuring")
        return self._measure(chain, evaluation, eval_ids, reference, rounded)

    def _block(
        self, tensors: list[PlannedTensor], chain: Chain, i: int, hidden: TreeStore
    ) -> list[dict[str, Any] | None]:
        """Round the weights of a filled block and write everything in it."""
        forwards = [lambda j=j: chain.run(i, hidden[j], bfloat16=self.bfloat16) for j in range(len(hidden))]
        return self._round_and_write(tensors, forwards)

    def _round_and_write(
        self, tensors: list[PlannedTensor], forwards: Sequence[Callable[[], object]]
    ) -> list[dict[str, Any] | None]:
        wanted = [t for t in tensors if t.status == "quantized"]
        rows: list[dict[str, Any] | None] = [
            self._put(r) for r in BlockRounder(self.skeleton, wanted, forwards).round()
        ]
        for tensor in tensors:
            if tensor.status != "quantized":
                self._copy(tensor)
        return rows

    def _rounded_before(self, chain: Chain, i: int) -> list[PlannedTensor]:
        """Tensors that block i shares with an earlier block, which rounded them."""
        names = set(chain.params(i))
        return [
            t
            for t in self.plan.quantized
            if t.block is not None and t.block < i
            and any(n in names for p in self.skeleton.params_of[t.name] for n in self.skeleton.names_of(p))
        ]  # fmt: skip

    def _restore(self, tensors: list[PlannedTensor]) -> None:
        """Make the rounded values of a finished block what the skeleton reads."""
        for tensor in tensors:
            if tensor.status == "quantized":
                self.skeleton.overrides[tensor.name] = self._written(tensor)

    def _written(self, tensor: PlannedTensor) -> torch.Tensor:
        return self.plan.layout.read(tensor.placed, self.writer.get).dequantize().reshape(tensor.shape)

    def _outer_quantized(self) -> bool:
        return any(t.block is None for t in self.plan.quantized)

    def _front(self, chain: Chain) -> list[PlannedTensor]:
        """Quantized tensors that work before the first block: projections of narrow embeddings."""
        return [
            t
            for t in self.plan.quantized
            if t.block is None
            and any(n in chain.early for p in self.skeleton.params_of[t.name] for n in self.skeleton.names_of(p))
        ]

    def _outer(
        self, tensors: list[PlannedTensor], chain: Chain, forwards: Sequence[Callable[[], object]]
    ) -> list[dict[str, Any] | None]:
        """What lies outside the blocks; a head or a pooler is calibrated on what the rounded blocks give."""
        wanted = [p for t in tensors if t.status == "quantized" for p in self.skeleton.params_of[t.name]]
        if not wanted:
            return self._round_and_write(tensors, [])
        with chain.outer_loaded():
            self.skeleton.fill(wanted)
            rows = self._round_and_write(tensors, forwards)
        self.skeleton.drop(wanted)
        return rows

    def _measure(
        self, chain: Chain, windows: Windows, ids: list[torch.Tensor], reference: TreeStore, rounded: TreeStore
    ) -> dict[str, Any]:
        """Original against rounded, window by window."""
        comparison = comparison_for(chain.model)
        outer = [t for t in self.plan.quantized if t.block is None]

        def finish(store: TreeStore, j: int, k: int) -> torch.Tensor:
            return chain.finish(ids[j][k : k + 1], store[j][k : k + 1])

        outputs: dict[tuple[int, int], torch.Tensor] = {}
        with chain.outer_loaded():
            for j, batch in enumerate(ids):
                for k in range(len(batch)):
                    with chain.unrounded():
                        outputs[j, k] = finish(reference, j, k)
                    if not outer:
                        comparison.add(outputs.pop((j, k)), finish(rounded, j, k), batch[k : k + 1])
        if outer:
            self._restore(outer)
            with chain.outer_loaded():
                for (j, k), original in outputs.items():
                    comparison.add(original, finish(rounded, j, k), ids[j][k : k + 1])
            self.skeleton.overrides.clear()
        return {
            **comparison.summary().to_dict(),
            "text": self.texts.evaluation_source,
            "windows": len(windows),
            "protocol": self.texts.protocol,
        }

    # ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _step(self, name: str, work: Callable[[], list[dict[str, Any] | None]]) -> None:
        """Do a step once: its bytes are on the disk before the journal says so."""
        if name not in self.journal.steps:
            self._record(name, [r for r in work() if r is not None])
        self.rows += self.journal.steps[name]

    def _record(self, name: str, data: object) -> None:
        self.journal.record(name, data, wrote=self.writer.sync(), read=self.ledger.taken())

    def _put(self, rounded: Rounded) -> dict[str, Any]:
        for name, value in self.plan.layout.write(rounded.tensor.placed, rounded.q).items():
            self.writer.put(name, value)
        return rounded.row()

    def _copy(self, tensor: PlannedTensor) -> None:
        entry = self.skeleton.checkpoint.folder.entries[tensor.name]
        self.ledger.note(tensor.name, self.writer.copy(entry))

    def _publish(self, facts: dict[str, Any], key: str, done: dict[str, Any]) -> dict[str, Any]:
        source = self.skeleton.checkpoint.folder
        report: dict[str, Any] = finite(
            {
                **facts,
                "seconds": done["seconds"],
                "evaluation": done["measured"],
                "layers": done["rows"],
                "kept": kept_of(self.plan),
            }
        )
        config = {**source.config, "quantization_config": self.plan.config()}
        manifest = manifest_of(key, self.ledger, facts)
        publish(self.journal, self.writer, travelling(source), config, manifest, {"report.json": report})
        return report


def _advance(chain: Chain, i: int, store: TreeStore, *, bfloat16: bool = False) -> None:
    for j in range(len(store)):
        store[j] = chain.run(i, store[j], bfloat16=bfloat16)


def _batch_size(windows: Windows) -> int:
    return max(_BATCH_TOKENS // windows.ids.shape[1], 1)


def _activations(plan: Plan) -> dict[str, Any]:
    """Module → scheme of its input, where activations are quantized at run time."""
    return {
        t.module: t.scheme.inputs.scheme
        for t in plan.quantized
        if t.scheme and t.scheme.inputs and t.module in plan.classes
    }


def _grouped(tensors: list[PlannedTensor]) -> list[list[PlannedTensor]]:
    groups: list[list[PlannedTensor]] = [[]]
    used = 0
    for tensor in tensors:
        size = tensor.weights * tensor.dtype.itemsize
        if groups[-1] and used + size > _GROUP_BYTES:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += size
    return groups


def _check_space(out: Path, plan: Plan, resumed: bool) -> None:
    free, need = shutil.disk_usage(out).free, plan.output_bytes
    if not resumed and free < need:
        raise OutputError(
            f"{out}: the output needs {need / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB free. Free some space or choose another disk."
        )
