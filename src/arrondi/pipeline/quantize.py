"""Model in, quantized model out: `quantize_model`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

<<<<<<< HEAD
from arrondi.checkpoint import Checkpoint, read_report
=======
from arrondi.checkpoint import Checkpoint, ShardWriter, guard_disk, write_json
from arrondi.documents import finite
>>>>>>> cli
from arrondi.errors import OutputError, SchemeError
from arrondi.model import OnDisk, settle
from arrondi.pipeline.journal import Journal
from arrondi.pipeline.ledger import Ledger
from arrondi.pipeline.manifest import check_apart, finished
from arrondi.pipeline.plan import Plan, check, make_plan
from arrondi.pipeline.recipe import Recipe
from arrondi.pipeline.publish import planned_files, publish
from arrondi.pipeline.record import facts_of, kept_of, machine, manifest_of, quantize_key
from arrondi.pipeline.run import Progress, Run
from arrondi.pipeline.texts import TextOptions, Texts, read_texts


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
    device: str = "cpu",
    planned: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize a model directory into another.

    Args:
        model: directory with config.json and safetensors files.
        out: directory to write; new, empty, or the unfinished (or finished) output of the same call.
        recipe: what becomes what.
        text: calibration and evaluation text.
        layout: storage layout; None takes the most widely read one that holds everything.
        keep_misfits: keep weights whose shape does not fit instead of taking other groups.
        shard_bytes: files are split when they would exceed this.
        overwrite: a finished output may be replaced.
        device: where units are run, as torch names devices.
        planned: called once with the plan (`Plan.to_dict`), before anything is written.
        progress: called as the run goes on.

    Returns:
        the report, as written to `report.json`.

    Raises:
        FileFormatError, SchemeError, DataError, OutputError: see their sentences; nothing of the user's is lost.
    """
    text, out = text or TextOptions(), Path(out)
    checkpoint = Checkpoint.open(model)
    if checkpoint.quantized:
        raise SchemeError(
            f"{checkpoint.folder.path} is already quantized. Restore it first: arrondi dequantize {checkpoint.folder.path} -o PLAIN."
        )
<<<<<<< HEAD
    check_apart(checkpoint.folder.path, out)
    ledger = Ledger(checkpoint.folder)
    checkpoint = ledger.recorded(checkpoint)
    source = OnDisk(checkpoint)
    texts = read_texts(source, text, recipe)
    texts.notes += _settled(source, texts)
    plan = make_plan(source, recipe, layout=layout, keep_misfits=keep_misfits)
=======
    if out.resolve() == checkpoint.folder.path.resolve():
        raise OutputError(f"{out}: output and model are the same directory. Choose another output.")
    if checkpoint.folder.path.resolve() in out.resolve().parents:
        raise OutputError(f"{out}: lies inside the model's directory. Choose an output outside of it.")
    skeleton = Skeleton(checkpoint)
    plan = make_plan(skeleton, recipe, layout=layout, keep_misfits=keep_misfits)
>>>>>>> cli
    check(plan)
    if planned is not None:
        planned(plan.to_dict())
    if plan.calibrated and texts.calibration is None:
        raise SchemeError("Static scales of inputs need calibration text. Add --calibration FILE, or drop 'static'.")
    key = quantize_key(checkpoint, plan, recipe, text, texts, shard_bytes)
    if not overwrite and finished(out, key, ledger):
        return dict(read_report(out / "report.json"))
    files = planned_files(plan.shards(shard_bytes), checkpoint.folder, ["report.json"])
    with Journal(out, key, files, machine(), overwrite=overwrite) as journal:
        _check_space(out, plan, bool(journal.steps))
        say = progress or (lambda done, total, what: None)
        run = Run(plan, texts, journal, ledger, shard_bytes, say, torch.device(device))
        run.execute()
        return _publish(run, facts_of(checkpoint, plan, recipe, text, texts), key)


<<<<<<< HEAD
def _settled(source: OnDisk, texts: Texts) -> list[str]:
    """Make sure that the model is run as it runs itself, on the last window of what it will see."""
    windows = texts.evaluation or texts.calibration
    return [] if windows is None else settle(source, windows.ids[-1:])
=======
class _Run:
    """One execution: the state that the steps share."""

    def __init__(
        self, skeleton: Skeleton, plan: Plan, texts: Texts, journal: Journal, shard_bytes: int, progress: Progress
    ) -> None:
        self.skeleton, self.plan, self.texts, self.journal, self.progress = skeleton, plan, texts, journal, progress
        self.shards = plan.shards(shard_bytes)
        self.rows: list[dict[str, Any]] = []
        self.started = time.monotonic()
        self.hasher = FileHasher(skeleton.checkpoint.folder)
        self.bfloat16 = bfloat16_pays(skeleton.checkpoint)
        self.chain: Chain | None = None
        if texts.calibration is not None or texts.evaluation is not None:
            self.chain = Chain(skeleton, _activations(plan))

    def execute(self, facts: dict[str, Any], key: str) -> dict[str, Any]:
        """All steps, then the files get their names; config.json comes last."""
        if "measured" not in self.journal.steps:
            self.writer = ShardWriter(self.journal.work, self.shards)
            with torch.no_grad():
                if self.chain is None:
                    self._without_chain()
                measured = None if self.chain is None else self._with_chain(self.chain)
            self.writer.sync()
            self.writer.close()
            self.journal.record(
                "measured",
                {"measured": measured, "rows": self.rows, "seconds": round(time.monotonic() - self.started, 2)},
            )
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

    def _with_chain(self, chain: Chain) -> dict[str, Any] | None:
        folder = self.journal.work
        calibration, evaluation = self.texts.calibration, self.texts.evaluation
        ids = [] if calibration is None else calibration.batches(_batch_size(calibration))
        eval_ids = [] if evaluation is None else evaluation.batches(_batch_size(evaluation))
        total = len(chain) + 2
        self.progress(0, total, "reading text")
        hidden = HiddenStore(chain.begin(ids), _HIDDEN_LIMIT, folder)
        with chain.unrounded():
            reference = HiddenStore(chain.begin(eval_ids), _HIDDEN_LIMIT // 2, folder)
        front = self._front(chain)
        if front:
            self._step("front", lambda: self._outer(front, chain, [lambda b=b: chain.enter(b) for b in ids]))  # type: ignore[misc]
            self._restore(front)
            hidden = HiddenStore(chain.begin(ids), _HIDDEN_LIMIT, folder)
            rounded = HiddenStore(chain.begin(eval_ids), _HIDDEN_LIMIT // 2, folder)
            self.skeleton.overrides.clear()
        else:
            rounded = HiddenStore((h.clone() for h in reference), _HIDDEN_LIMIT // 2, folder)
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
        self, tensors: list[PlannedTensor], chain: Chain, i: int, hidden: HiddenStore
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
        self, chain: Chain, windows: Windows, ids: list[torch.Tensor], reference: HiddenStore, rounded: HiddenStore
    ) -> dict[str, Any]:
        """Original against rounded, window by window."""
        comparison = comparison_for(chain.model)
        outer = [t for t in self.plan.quantized if t.block is None]

        def finish(store: HiddenStore, j: int, k: int) -> torch.Tensor:
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
            rows = [r for r in work() if r is not None]
            self.writer.sync()
            self.journal.record(name, rows)
        self.rows += self.journal.steps[name]

    def _put(self, rounded: Rounded) -> dict[str, Any]:
        for name, value in self.plan.layout.write(rounded.tensor.placed, rounded.q).items():
            self.writer.put(name, value)
        return rounded.row()

    def _copy(self, tensor: PlannedTensor) -> None:
        entry = self.skeleton.checkpoint.folder.entries[tensor.name]
        self.writer.copy(entry, _COPY_CHUNK)

    def _publish(self, facts: dict[str, Any], key: str, done: dict[str, Any]) -> dict[str, Any]:
        out, source = self.journal.out, self.skeleton.checkpoint.folder
        ShardWriter.publish(self.journal.work, self.shards, out)
        with guard_disk(out):
            for path in source.other_files():
                shutil.copyfile(path, out / path.name)
        report: dict[str, Any] = finite(
            {
                **facts,
                "seconds": done["seconds"],
                "evaluation": done["measured"],
                "layers": done["rows"],
                "kept": kept_of(self.plan),
            }
        )
        write_json(out / "report.json", report)
        write_json(out / MANIFEST, manifest_of(facts, key, self.hasher.result()))
        write_json(out / "config.json", {**source.config, "quantization_config": self.plan.config()})
        self.journal.remove()
        return report
>>>>>>> cli


def _publish(run: Run, facts: dict[str, Any], key: str) -> dict[str, Any]:
    """The files get their names; config.json comes last."""
    source, done = run.source.checkpoint.folder, run.journal.steps["measured"]
    report = {
        **facts,
        "seconds": done["seconds"],
        "evaluation": done["measured"],
        "layers": done["rows"],
        "kept": kept_of(run.plan),
    }
    config = {**source.config, **run.overlay.config, "quantization_config": run.plan.config()}
    publish(run.journal, run.writer, source, config, manifest_of(key, run.ledger, facts), {"report.json": report})
    return report


def _check_space(out: Path, plan: Plan, resumed: bool) -> None:
    free, need = shutil.disk_usage(out).free, plan.output_bytes
    if not resumed and free < need:
        raise OutputError(
            f"{out}: the output needs {need / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB free. Free some space or choose another disk."
        )
