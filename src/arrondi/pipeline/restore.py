"""Back to ordinary weights: `dequantize_model`, equal bit for bit to `QTensor.dequantize` on every tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from arrondi.arguments import check_arguments
from arrondi.checkpoint import Checkpoint, ShardPlan, ShardWriter, TensorSpec
from arrondi.checkpoint.containers.config import QUANTIZATION
from arrondi.checkpoint.containers.onnx.view import SUFFIX
from arrondi.errors import SchemeError
from arrondi.model import DTYPES
from arrondi.pipeline.journal import Journal
from arrondi.pipeline.ledger import recorded, travelling
from arrondi.pipeline.manifest import check_apart, finished
from arrondi.pipeline.publish import planned_files, publish
from arrondi.pipeline.record import machine, manifest_of, run_key, versions

_GROUP_BYTES = 256 << 20
"""Tensors are written in groups of this size between two journal lines."""


def dequantize_model(
    model: str | Path,
    out: str | Path,
    dtype: str = "bfloat16",
    *,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Write a quantized model as a plain one that any tool loads.

    Args:
        model: quantized model directory.
        out: directory to write; new, empty, or the unfinished (or finished) output of the same call.
        dtype: element type of all floating-point tensors: float32, bfloat16 or float16.
        shard_bytes: files are split when they would exceed this.
        overwrite: a finished output may be replaced.

    Returns:
        tensors restored, tensors copied, bytes written.

    Raises:
        FileFormatError: not a model directory, or a layout that is not known.
        SchemeError: the model is not quantized, or the dtype is not one of the three.
        OutputError: the output holds something else, or the disk is full.
    """
    check_arguments(dequantize_model, locals())
    if dtype not in DTYPES:
        raise SchemeError(f"Cannot write {dtype!r}. Use one of {', '.join(DTYPES)}.")
    checkpoint, out = Checkpoint.open(model), Path(out)
    if out.suffix.lower() == SUFFIX:
        raise SchemeError(
            f"{out}: names an ONNX file, and {model} is none. Give a directory: -o {out.with_suffix('')}."
        )
    values = len(checkpoint.lattices)
    if not checkpoint.quantized:
        raise SchemeError(
            f"{checkpoint.folder.path} is not quantized: nothing in it says that a tensor is. Use it as it is."
        )
    check_apart(checkpoint.folder.path, out)
    checkpoint, ledger = recorded(checkpoint)
    side_files = travelling(checkpoint.folder)
    specs = _specs(checkpoint, DTYPES[dtype])
    plan = ShardPlan.split(specs, shard_bytes)
    key = run_key("dequantize", ledger, checkpoint.folder.fingerprint(), dtype, shard_bytes)
    result = {
        "restored": len(checkpoint.placed) + values,
        "copied": len(checkpoint.names) - len(checkpoint.placed) - values,
        "bytes": plan.nbytes,
        "dtype": dtype,
    }
    if not overwrite and finished(out, key, ledger):
        return result
    with Journal(out, key, planned_files(plan, side_files), machine(), overwrite=overwrite) as journal:
        writer = ShardWriter(journal.work, plan, out)
        journal.verify(writer.digest, ledger.check)
        done = 0
        for i, group in enumerate(_grouped(specs)):
            if f"tensors {i}" not in journal.steps:
                for j, (name, kind, _) in enumerate(group):
                    if progress:
                        progress(done + j, len(specs), name)
                    writer.put(name, _plain(checkpoint, name, kind))
                journal.record(f"tensors {i}", None, wrote=writer.sync(), read=ledger.taken())
            done += len(group)
        config = unquantized(checkpoint.folder.config)
        for name in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
            config[name] = dtype
        facts = {"dtype": dtype, "versions": versions()}
        publish(journal, writer, side_files, config, manifest_of(key, ledger, facts))
    return result


def _specs(checkpoint: Checkpoint, dtype: torch.dtype) -> list[TensorSpec]:
    """What is written: every floating-point tensor in `dtype`, others in their own type."""
    stored = {n: e.torch_dtype for n, e in checkpoint.folder.entries.items() if n not in checkpoint.placed}
    types = {n: dtype if stored.get(n, dtype).is_floating_point else stored[n] for n in checkpoint.names}
    return [(n, types[n], shape) for n, shape in checkpoint.names.items()]


def _plain(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> torch.Tensor:
    return checkpoint.plain(name, dtype if dtype.is_floating_point else torch.float32)


def _grouped(specs: list[TensorSpec]) -> list[list[TensorSpec]]:
    groups: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in specs:
        size = torch.Size(spec[2]).numel() * spec[1].itemsize
        if groups[-1] and used + size > _GROUP_BYTES:
            groups.append([])
            used = 0
        groups[-1].append(spec)
        used += size
    return groups


def unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what it, or a part of it, says of a quantization."""
    return {k: unquantized(v) if isinstance(v, dict) else v for k, v in config.items() if k not in QUANTIZATION}
