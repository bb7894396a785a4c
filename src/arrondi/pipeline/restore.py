"""Back to ordinary weights: `dequantize_model`, equal bit for bit to `QTensor.dequantize` on every tensor."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arrondi.checkpoint import Checkpoint, ShardPlan, ShardWriter, guard_disk, write_json
from arrondi.errors import OutputError, SchemeError
from arrondi.model import DTYPES
from arrondi.tensor.qtensor import QTensor


def dequantize_model(
    model: str | Path,
    out: str | Path,
    dtype: str = "bfloat16",
    *,
    shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Write a quantized model as a plain one that any tool loads.

    Args:
        model: quantized model directory.
        out: directory to write, new or empty, or with what a killed run of the same call left.
        dtype: element type of all floating-point tensors: float32, bfloat16 or float16.
        shard_bytes: files are split when they would exceed this.

    Returns:
        tensors restored, tensors copied, bytes written.

    Raises:
        FileFormatError: not a model directory, or a layout that is not known.
        SchemeError: the model is not quantized, or the dtype is not one of the three.
        OutputError: the output holds something else, or the disk is full.
    """
    if dtype not in DTYPES:
        raise SchemeError(f"Cannot write {dtype!r}. Use one of {', '.join(DTYPES)}.")
    checkpoint, out, kind = Checkpoint.open(model), Path(out), DTYPES[dtype]
    if not checkpoint.quantized:
        raise SchemeError(f"{checkpoint.folder.path} is not quantized: its config.json has no quantization_config.")
    if checkpoint.folder.path.resolve() in out.resolve().parents:
        raise OutputError(f"{out}: lies inside the model's directory. Choose an output outside of it.")
    if out.exists() and (not out.is_dir() or any(not p.name.endswith(".partial") for p in out.iterdir())):
        raise OutputError(f"{out}: already holds something. Nothing was touched: choose a new directory.")
    stored = {n: e.torch_dtype for n, e in checkpoint.folder.entries.items()}
    types = {
        n: kind if stored.get(n, kind).is_floating_point or n in checkpoint.placed else stored[n]
        for n in checkpoint.names
    }
    plan = ShardPlan.split([(n, types[n], shape) for n, shape in checkpoint.names.items()], shard_bytes)
    with guard_disk(out):
        out.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(out, plan)
    for i, name in enumerate(checkpoint.names):
        if progress:
            progress(i, len(checkpoint.names), name)
        value = checkpoint.read(name)
        plain = (
            value.dequantize(kind).reshape(checkpoint.names[name])
            if isinstance(value, QTensor)
            else value.to(types[name])
        )
        writer.put(name, plain)
    writer.sync()
    writer.close()
    ShardWriter.publish(out, plan, out)
    for path in checkpoint.folder.other_files():
        with guard_disk(out):
            shutil.copyfile(path, out / path.name)
    config = {k: v for k, v in checkpoint.folder.config.items() if k != "quantization_config"}
    for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
        config[key] = dtype
    write_json(out / "config.json", config)
    return {
        "restored": len(checkpoint.placed),
        "copied": len(checkpoint.names) - len(checkpoint.placed),
        "bytes": plan.nbytes,
        "dtype": dtype,
    }
