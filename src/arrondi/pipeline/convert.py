"""From one layout into another: `convert_model`. Every tensor says whether its values stayed what they were.

Codes and scales are put into the words of the target where its grid holds the values, and only else rounded anew. What the target's own
rules give back of the tensors that will be written is compared with the source: that, and no expectation, is what is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.arguments import check_arguments
from arrondi.checkpoint import LAYOUTS, LayerValues, Layout, ShardWriter
from arrondi.errors import SchemeError, unknown
from arrondi.formats import LayerScheme, parse_scheme
from arrondi.model import OnDisk
from arrondi.pipeline.convert_choice import Choice, chosen, converted, stays
from arrondi.pipeline.gguf_out import Named, write_gguf
from arrondi.pipeline.journal import Journal
from arrondi.pipeline.ledger import recorded, travelling
from arrondi.pipeline.listing import listed
from arrondi.pipeline.manifest import check_apart, finished
from arrondi.pipeline.onnx_out import write_onnx
from arrondi.pipeline.plan import Plan
from arrondi.pipeline.plan_facts import facts_of
from arrondi.pipeline.publish import planned_files, publish
from arrondi.pipeline.recipe import Rule
from arrondi.pipeline.record import machine, manifest_of, run_key, versions
from arrondi.pipeline.resolve import PlannedTensor
from arrondi.pipeline.restore import unquantized
from arrondi.pipeline.step import Declared

GGUF: Final = "gguf"
ONNX: Final = ("onnx", "onnx-qdq")
_COUNTED: Final = ("exact", "rescaled", "requantized", "copied", "left out")

Progress = Callable[[int, int, str], None]


def convert_model(
    model: str | Path,
    out: str | Path,
    to: str,
    *,
    scheme: str | LayerScheme | None = None,
    exact_only: bool = False,
    template: str | Path | None = None,
    called: Named = Named(),
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a model, quantized or plain, in another layout.

    Args:
        model: a model directory, a GGUF file or an ONNX file.
        out: a directory, or for "gguf" a file; for "onnx" and "onnx-qdq" either, the file of a directory being model.onnx.
        to: a name of `LAYOUTS`, such as "gptq", "awq" or "compressed-tensors"; or "gguf".
        scheme: what tensors become that the target cannot hold as they are; None: its smallest scheme with as many bits.
        exact_only: refuse where a value would change.
        template: for "gguf", a GGUF file of the same architecture, whose header is taken; for "onnx", a graph of the model, whose weights are
            replaced, instead of the one that PyTorch exports.
        called: for "gguf", its names where the model given is not the one that its user has.
        shard_bytes, overwrite, progress: as for `quantize_model`.

    Returns:
        `to`; `tensors`, each with its name, what it was (`from`), what it is (`to`), `verdict`, and, where values changed, `max_error` and `sqnr_db`;
        `exact`, `rescaled`, `requantized`, `copied` and `left_out`, how many there are; `notes`, sentences about a GGUF file; and `bytes`.

    Raises:
        FileFormatError: not a model, or a layout that is not known.
        SchemeError: no such target, a tensor that it holds in no way, or a value that would change though it must not.
        OutputError: the output holds something else, or the disk is full.
    """
    check_arguments(convert_model, locals())
    if to not in LAYOUTS:
        raise unknown("layout", to, LAYOUTS)
    wanted = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    out = Path(out)
    if to in ONNX:
        found = write_onnx(
            model, out, to, template=template, wanted=wanted, exact_only=exact_only, overwrite=overwrite, progress=progress
        )  # fmt: skip
        return found
    source = OnDisk.open(model)
    source.by_shapes()
    if template is not None and to != GGUF:
        raise SchemeError(f"A template is a file of the same model and goes with --to gguf or onnx, got --to {to}. Leave it out.")  # fmt: skip
    work = _Work.of(source, LAYOUTS[to], wanted)
    if exact_only:
        work.refuse_changes()
    check_apart(source.checkpoint.folder.path, out)
    if to == GGUF:
        nbytes, notes, left = write_gguf(
            source, work.planned, work.values, out, template=template, called=called, overwrite=overwrite, progress=progress
        )  # fmt: skip
    else:
        notes, left = [], frozenset[str]()
        nbytes = _write_directory(source, work, out, shard_bytes, overwrite, progress)
    return {"to": to, **work.summary(left), "notes": [*notes, *_on_no_grid(source)], "bytes": nbytes}


def _on_no_grid(source: OnDisk) -> list[str]:
    """What is said of tensors that were stored in few bits and are written as numbers."""
    lattices = source.checkpoint.lattices
    kinds = ", ".join(sorted(set(lattices.values())))
    if not lattices:
        return []
    return [
        f"Written as numbers, which takes more bytes: {listed(list(lattices))}. No layout has a grid for {kinds}; dequantize the model and quantize it to have few bits again."
    ]


@dataclass(frozen=True)
class _Work:
    """What becomes of every tensor.

    Attributes:
        source: the model.
        planned: every tensor of the output.
        choices: tensor → what was chosen, of the quantized ones.
        layout: of the target.
    """

    source: OnDisk
    planned: list[PlannedTensor]
    choices: Mapping[str, Choice]
    layout: Layout

    @classmethod
    def of(cls, source: OnDisk, layout: Layout, wanted: LayerScheme | None) -> _Work:
        checkpoint = source.checkpoint
        choices: dict[str, Choice] = {}
        planned = []
        for tensor in source.tensors:
            placed = checkpoint.placed.get(tensor.name)
            dtype = torch.float32 if placed else source.dtype_of(tensor)
            if placed is None:
                planned.append(PlannedTensor(tensor, dtype, "kept by rule", "it is not quantized"))
                continue
            values = checkpoint.layer(tensor.name)
            as_it_is = checkpoint.layout is layout and wanted is None and stays(values, placed, layout)
            found = Choice(placed.scheme, "exact") if as_it_is else chosen(values, placed, layout, wanted)
            if isinstance(found, str) and placed.kind == "Linear":
                raise SchemeError(f"{tensor.name} ({placed.scheme}) cannot be stored as {layout.name}: {found}.")
            if isinstance(found, str):  # a table, which any target holds as the numbers that it means
                planned.append(PlannedTensor(tensor, dtype, "kept by rule", found))
                continue
            choices[tensor.name] = found
            scattered = placed.indexed and found.verdict != "requantized"
            rule = Rule(found.scheme, "gptq", options={"order": "dynamic"}) if scattered else None
            storage = placed.storage if as_it_is else ""
            planned.append(PlannedTensor(tensor, dtype, "quantized", "", rule, found.scheme, storage=storage))
        why = layout.together([t.placed for t in planned if t.status == "quantized"])
        if why:
            raise SchemeError(f"{source.where}: {why}")
        return cls(source, planned, choices, layout)

    def values(self, name: str) -> LayerValues:
        """A layer as the target has it."""
        held = self.source.checkpoint.layer(name)
        return LayerValues(converted(held.weight, self.choices[name]), held.inputs, held.outputs)

    def refuse_changes(self) -> None:
        """
        Raises:
            SchemeError: a value would change.
        """
        changed = [f"{n} ({c.verdict})" for n, c in self.choices.items() if c.verdict != "exact"]
        if changed:
            raise SchemeError(
                f"{self.layout.name} cannot hold every value as it is: {listed(changed)}. {self._advice()}"
            )

    def _advice(self) -> str:
        """What to do where a value would change."""
        moved = [c for c in self.choices.values() if c.verdict != "exact"]
        if all(c.verdict == "rescaled" for c in moved):
            scheme = moved[0].scheme.weights
            by = max(c.error for c in moved)
            return f"Only scales and offsets are stored otherwise, which moves values by at most {by:.2g}: leave --exact-only out, or quantize with --scheme w={scheme}."
        return "Leave --exact-only out, or choose another target."

    def summary(self, left: Collection[str] = ()) -> dict[str, Any]:
        """What was done to every tensor, and how many of each verdict there are.

        Args:
            left: tensors that the target has no place for.
        """
        rows = []
        for t in self.planned:
            choice = self.choices.get(t.name)
            held = self.source.checkpoint.placed.get(t.name)
            was = str(held.scheme) if held else ""
            if t.name in left:
                rows.append({"name": t.name, "verdict": "left out"})
                continue
            if choice is None:
                rows.append(
                    {"name": t.name, "verdict": "copied"}
                    if held is None
                    else {"name": t.name, "from": was, "to": "float32", "verdict": "exact"}
                )
                continue
            row: dict[str, Any] = {"name": t.name, "from": was, "to": str(choice.scheme), "verdict": choice.verdict}
            if choice.verdict != "exact":
                row |= {"max_error": choice.error, "sqnr_db": choice.sqnr_db}
            rows.append(row)
        return {"tensors": rows, **{v.replace(" ", "_"): sum(r["verdict"] == v for r in rows) for v in _COUNTED}}


def _write_directory(
    source: OnDisk, work: _Work, out: Path, shard_bytes: int, overwrite: bool, progress: Progress | None
) -> int:
    checkpoint, ledger = recorded(source.checkpoint)
    plan = Plan(
        source, work.planned, work.layout, [], Declared(), [], facts=facts_of(source, work.planned, work.layout)
    )
    side_files = travelling(checkpoint.folder)
    shards = plan.shards(shard_bytes)
    key = run_key("convert", ledger, checkpoint.folder.fingerprint(), plan.config(), shard_bytes)
    if not overwrite and finished(out, key, ledger):
        return shards.nbytes
    with Journal(out, key, planned_files(shards, side_files), machine(), overwrite=overwrite) as journal:
        writer = ShardWriter(journal.work, shards, out)
        journal.verify(writer.digest, ledger.check)
        for i, tensor in enumerate(work.planned):
            if progress:
                progress(i, len(work.planned), tensor.name)
            if f"tensor {i}" in journal.steps:
                continue
            for name, value in _stored(work, tensor, checkpoint).items():
                writer.put(name, value)
            journal.record(f"tensor {i}", None, wrote=writer.sync(), read=ledger.taken())
        config = unquantized(checkpoint.folder.config)
        if work.choices:
            config |= work.layout.described(plan.config())
        facts = {"layout": work.layout.name, "versions": versions()}
        publish(journal, writer, side_files, config, manifest_of(key, ledger, facts))
    return shards.nbytes


def _stored(work: _Work, tensor: PlannedTensor, checkpoint: Any) -> dict[str, torch.Tensor]:
    """The tensors that one tensor becomes in the target."""
    if tensor.name not in work.choices:
        return {tensor.name: checkpoint.dense(tensor.name, tensor.dtype)}
    return work.layout.write(tensor.placed, work.values(tensor.name))
