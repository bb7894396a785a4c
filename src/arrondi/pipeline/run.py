"""A plan carried out: the streaming run from checkpoint to packed checkpoint.

Owns: `Run`. The model passes block by block; every block is rounded, written to its place, noted in the journal, and then run
with the values that the file holds. The original and the quantized model are followed side by side and compared at the end. A
run that was killed is continued by the same call: finished units are read back, not rounded again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from arrondi.checkpoint import ShardWriter
from arrondi.checkpoint.states_file import STATES, write_states
from arrondi.measure.calling import predicted
from arrondi.measure.compare import comparison_for
from arrondi.model import Budget, OnDisk, Overlay, Stream, bfloat16_pays, confirm, walk
from arrondi.model.states import StateWatch, watching_states
from arrondi.pipeline.finishing import Finishing
from arrondi.pipeline.fisher import LossKnown, looks_at_loss
from arrondi.pipeline.foreseen import inputs_of_heads
from arrondi.pipeline.journal import Journal
from arrondi.pipeline.ledger import Ledger
from arrondi.pipeline.plan import Plan
from arrondi.pipeline.resolve import PlannedTensor
from arrondi.pipeline.rounded import round_alone
from arrondi.pipeline.statistics import Forward, Seen
from arrondi.pipeline.texts import Texts
from arrondi.pipeline.unit import carry_out, rewrite, stackable
from arrondi.pipeline.work import Original, Work
from arrondi.pipeline.written import Written

HIDDEN_LIMIT = 512 << 20
"""Bytes of hidden states and arguments kept in memory; more goes to a file in the output directory."""
_GROUP_BYTES = 256 << 20
"""Tensors of a run without data are written in groups of this size between two journal lines."""

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what is going on)."""


class Run:
    """One execution of a plan: the state that its parts share."""

    def __init__(
        self,
        plan: Plan,
        texts: Texts,
        journal: Journal,
        ledger: Ledger,
        shard_bytes: int,
        progress: Progress,
        device: torch.device,
        reference: Stream | None = None,
    ) -> None:
        """
        Args:
            reference: the original after its last unit on the evaluation data, where several runs share it.
        """
        self.ledger, self.device, self.reference = ledger, device, reference
        self.loss: LossKnown | None = None
        assert isinstance(plan.source, OnDisk)
        self.plan, self.source, self.texts, self.journal, self.progress = plan, plan.source, texts, journal, progress
        self.shards = plan.shards(shard_bytes)
        self.watch: StateWatch | None = None
        self.overlay = Overlay(config=dict(plan.declared.config))
        self.heads: dict[str, Seen] = {}
        self.touched = plan.touched
        self.bfloat16 = bfloat16_pays(self.source.checkpoint)

    def execute(self) -> None:
        """Everything up to complete files without their final names."""
        started = time.monotonic()
        writer = ShardWriter(self.journal.work, self.shards, self.journal.out)
        self.written = Written(self.plan, self.source, self.journal, self.ledger, writer, self.overlay)
        self.finishing = Finishing(self.plan, self.journal, writer)
        self.journal.verify(self.finishing.digest, self.ledger.check)
        if self.journal.note:
            self.progress(0, 1, self.journal.note)
        if "measured" in self.journal.steps:
            return
        measured = None
        with torch.no_grad():
            if self.texts.calibrates or self.texts.measures:
                measured = self._with_data()
            elif self.touched or self.plan.spreads or self.texts.importance:
                self._unit_by_unit()
            else:
                self._tensor_by_tensor()
        seconds = round(time.monotonic() - started, 2)
        rows = [self.finishing.after(row) for row in self.written.rows]
        done = {"measured": measured, "rows": rows, "seconds": seconds, "whole": self.finishing.facts()}
        self.written.record("measured", done)

    # ── without data: tensors go from file to file ────────────────────────────────────────────────────────────────────

    def _tensor_by_tensor(self) -> None:
        groups = _grouped(self.plan.tensors)
        for i, group in enumerate(groups):
            self.progress(i, len(groups), f"tensors {i + 1} of {len(groups)}")
            self.written.step(f"tensors {i}", group, partial(self._all_alone, group))

    def _all_alone(self, group: list[PlannedTensor]) -> list[dict[str, Any]]:
        return [row for planned in group for row in self._alone(planned)]

    def _alone(self, planned: PlannedTensor) -> list[dict[str, Any]]:
        """Round one tensor by itself, or copy it."""
        if planned.status != "quantized":
            self.written.keep(planned, {})
            return []
        assert planned.rule is not None and planned.scheme is not None
        scheme, rule = planned.scheme.weights, planned.rule
        weights = self._stored_weights(planned)
        if not stackable(scheme, len(weights)):
            weights = [torch.cat(weights)]
        parts = [round_alone(w, scheme, rule.method, rule.options, planned.name) for w in weights]
        return [self.written.put(planned, parts, None)]

    def _stored_weights(self, planned: PlannedTensor) -> list[torch.Tensor]:
        """The weights of a tensor's sites, (out, in), in their stored type where nothing is converted."""
        if not planned.tensor.converted:
            stored = self.source.checkpoint.folder.read(planned.name)
            return [s.stored(stored) for s in planned.sites]
        instance = self.source.instance()
        instance.fill(planned.tensor.params)
        return [s.region(instance.parameter(s.param)) for s in planned.sites]

    # ── unit by unit ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _open(self) -> None:
        """Two models: the original, and the quantized one as far as earlier runs have got."""
        self.instance = self.written.instance = self.source.instance(self.overlay, self.device)
        self.units = self.source.units_of(self.instance)
        shared = self.reference
        self.original = (
            self.source.units_of(self.source.instance(device=self.device)) if shared is None else shared.units
        )
        self.floating = self.original
        if self._rewrites_floats():
            # What is measured against stays as it was.
            self.floating = self.source.units_of(self.source.instance(Overlay(), self.device))
        rounded = [(t.scheme.inputs, s) for t in self.plan.quantized if t.scheme and t.scheme.inputs for s in t.sites]
        self.instance.round_inputs({m: (inputs, None) for inputs, s in rounded for m in s.rounds_inputs})
        for done in self.journal.steps.values() if not self._rewrites_floats() else ():
            self.written.adopt([t for t in self.plan.tensors if t.name in set(done["tensors"])])

    def _rewrites_floats(self) -> bool:
        """Whether the original is followed on the calibration data, rewritten."""
        followed = any(s.follows_original for s in self.plan.steps())
        rewrites = any(one.step.kind == "rewrite" and one.groups for one in self.plan.selected)
        return followed and (rewrites or self.plan.spreads)

    def _unit_by_unit(self) -> None:
        """Without data, where weights cannot be taken one by one."""
        if not self.source.units:
            self.source.run_as_whole(self.source.facts)
        self._open()
        blocks = {t.block for t in self.plan.tensors}
        for i in range(len(self.units)):
            self.progress(i, len(self.units) + 1, f"block {i + 1} of {len(self.units)}")
            if i in blocks:
                self.units.fill(i)
                members = [t for t in self.plan.tensors if t.block == i]
                self.written.step(f"unit {i}", members, partial(self._work, members, ()))
                self.units.drop(i)
        self._outside("outside", [t for t in self.plan.tensors if t.block is None], (), ())

    def _with_data(self) -> dict[str, Any] | None:
        self._open()
        budget, folder = Budget(HIDDEN_LIMIT), self.journal.work
        calibration, evaluation = self.texts.calibration_batches, self.texts.evaluation_batches
        followed = calibration if any(s.follows_original for s in self.plan.steps()) else []
        # A difference between two models drowns in the noise of bfloat16 products, and is then corrected for.
        bfloat16 = self.bfloat16 and not followed
        total = len(self.units) + 2
        self.progress(0, total, "reading data")
        with (
            LossKnown(budget, folder) as self.loss,
            Stream(self.original, evaluation if self.reference is None else (), budget, folder) as going,
            Stream(self.floating, followed, budget, folder) as floats,
            Stream(self.units, calibration, budget, folder, bfloat16=bfloat16) as learning,
            Stream(self.units, () if self.finishing.steps else evaluation, budget, folder) as measured,
        ):
            self.floats, self.learning = floats, learning
            if looks_at_loss(self.plan) and not all(f"unit {i}" in self.journal.steps for i in range(len(self.units))):
                self.progress(0, total, "the original's gradients")
                self.loss.learn(self.plan, self.original, calibration, budget, folder)
            for stream in (going, floats, learning, measured):
                stream.begin()
            self._watch()
            if front := self.plan.front(self.units.early):
                begun = [[lambda b=b, s=s: s.units.begin(b) for b in s.batches] for s in (learning, floats)]
                if "front" not in self.journal.steps:
                    told = {s.name: p for t in front for s in t.sites if (p := self.plan.told_by_heads.get(s.name))}
                    self.heads = inputs_of_heads(self.original, told, calibration, budget, folder)
                self._outside("front", front, *begun)
                learning.begin()
                measured.begin()
                if self.floating is not self.original:
                    floats.begin()
            rest = [t for t in self.plan.tensors if t.block is None and t not in front]
            learning.to_the_end = floats.to_the_end = bool(self._wanted(rest))
            originals = [[going, floats]] if self.floating is self.original else [[going], [floats]]
            groups = [[s for s in group if len(s)] for group in ([learning, measured], *originals)]
            for i in walk(groups, self._visit):
                self.progress(i, total, f"block {i + 1} of {len(self.units)}")
            if self.watch is not None:
                write_states(self.journal.work / STATES, self.watch.known())
            self.progress(len(self.units), total, "outside the blocks")
            ends = [[lambda p=p, s=s: s.output(*p) for p in s.pieces()] for s in (learning, floats)]
            self._outside("outside", rest, *ends)
            reference = going if self.reference is None else self.reference
            if self.finishing.steps:
                return self._finish(calibration, evaluation, reference)
            if not evaluation:
                return None
            self.progress(len(self.units) + 1, total, "measuring")
            return self._measure(reference, measured)

    def _finish(self, calibration: list[Any], evaluation: list[Any], reference: Stream) -> dict[str, Any] | None:
        """What is done to the whole model, which is then followed once more to be measured."""
        steps = ", ".join(one.step.name for one in self.finishing.steps)
        self.progress(len(self.units) + 1, len(self.units) + 2, f"the whole model: {steps}")
        self.finishing.carry_out(self.instance, self.original.instance, calibration)
        if not evaluation:
            return None
        with Stream(self.units, evaluation, Budget(HIDDEN_LIMIT), self.journal.work) as measured:
            measured.begin()
            for _ in walk([[measured]]):
                pass
            return self._measure(reference, measured)

    def _visit(self, i: int, streams: Sequence[Stream]) -> None:
        """Do all steps on unit i of the quantized model, and let it go on with what the file holds."""
        if streams[0].units is not self.units:
            return
        members = [t for t in self.plan.tensors if t.block == i]

        def work() -> list[dict[str, Any]]:
            if len(self.floats):
                self.floating.fill(i)  # its own streams pass through it next
            return self._work(members, self.learning.forwards(i), self.floats.forwards(i))

        if self._rewrites_floats() and f"unit {i}" in self.journal.steps:
            self.floating.fill(i)
            rewrite(self._begun(members, self.learning.forwards(i), self.floats.forwards(i)))
        self.written.step(f"unit {i}", members, work)
        self.units.drop(i)
        self.units.fill(i)
        if self.watch is not None:
            with watching_states(self.instance.model, self.watch.see):
                for forward in self.learning.forwards(i):
                    forward()

    def _watch(self) -> None:
        """Get ready to look at keys and values, where a cache has to know of them."""
        self.watch = None
        if self.plan.kv is not None:
            with self.units.outer_loaded():
                watch = StateWatch(self.plan.kv, self.instance.model)
            self.watch = watch if watch.needed else None

    def _work(
        self, members: list[PlannedTensor], forwards: Sequence[Forward], originals: Sequence[Forward] = ()
    ) -> list[dict[str, Any]]:
        """All steps on some tensors whose parameters are filled; everything is written."""
        work = self._begun(members, forwards, originals)
        carry_out(work)
        rows = []
        for planned in members:
            if planned.status == "quantized":
                parts = [work.results[s.name] for s in planned.sites if s.name in work.results]
                done = list(dict.fromkeys(name for s in planned.sites for name in work.done.get(s.name, ())))
                row = self.written.put(planned, parts, work.grids.get(planned.name))
                rows.append({**row, **({"steps": done} if done else {}), **work.facts.get(planned.name, {})})
            else:
                self.written.keep(planned, work.changed)
        self.written.put_added(members, work.added)
        return rows

    def _begun(self, members: list[PlannedTensor], forwards: Sequence[Forward], originals: Sequence[Forward]) -> Work:
        own = self.floating is not self.original
        original = Original(self.floating.instance, originals, own) if originals else None
        return Work(self.plan, self.instance, members, forwards, original, self.texts.importance, self.heads, self.loss)

    def _outside(
        self, name: str, members: list[PlannedTensor], forwards: Sequence[Forward], originals: Sequence[Forward]
    ) -> None:
        """What lies outside the units; a head or a pooler is calibrated on what the quantized units give."""
        wanted = self._wanted(members)
        if not wanted:
            forwards = originals = ()

        @contextmanager
        def loaded() -> Iterator[None]:
            with ExitStack() as stack:
                for units in (self.units, *([self.floating] if originals else ())):
                    stack.enter_context(units.outer_loaded())
                    stack.callback(units.instance.drop, wanted)
                    units.instance.fill(wanted)
                yield
                self._keep_rewritten(members)

        def work() -> list[dict[str, Any]]:
            with loaded():
                return self._work(members, forwards, originals)

        if originals and self._rewrites_floats() and name in self.journal.steps:
            with loaded():
                rewrite(self._begun(members, forwards, originals))
        self.written.step(name, members, work)

    def _keep_rewritten(self, members: Sequence[PlannedTensor]) -> None:
        """The rewritten original keeps what lies outside the units; inside it is rewritten where it passes."""
        if self.floating is self.original:
            return
        for planned in members:
            if planned.name in self.touched and planned.tensor.params and not planned.tensor.converted:
                value = self.floating.instance.parameter(planned.tensor.params[0]).clone()
                self.floating.instance.overlay.changed[planned.name] = value.clone

    def _wanted(self, members: list[PlannedTensor]) -> list[str]:
        """The parameters that steps look at or change."""
        return [p for t in members if t.status == "quantized" or t.name in self.touched for p in t.tensor.params]

    def _measure(self, reference: Stream, measured: Stream) -> dict[str, Any]:
        """Original against quantized, batch by batch."""
        comparison = comparison_for(self.source.model)
        self.instance.lender = self.original.instance  # a head that stays as it is is there once
        with reference.units.outer_loaded(), measured.units.outer_loaded():
            for j, rows in reference.pieces():
                ids, start = predicted(reference.batches[j])[rows], self.texts.measured_from(j)
                expected = reference.output(j, rows)[:, start:]
                comparison.add(expected, measured.output(j, rows)[:, start:], ids[:, start:])
            confirm(self.source, reference)
        return {
            **comparison.summary().to_dict(),
            "text": self.texts.evaluation_source,
            "windows": sum(len(predicted(b)) for b in reference.batches),
            "protocol": self.texts.protocol,
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
