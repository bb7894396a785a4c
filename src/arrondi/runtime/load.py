"""A quantized checkpoint as a transformers model whose linears hold packed codes: `load_model`.

The model is transformers' own; only modules that multiply by a quantized weight are replaced, one at a time, so the float
copy of the model never exists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from arrondi.checkpoint import Checkpoint
from arrondi.errors import FileFormatError, unknown
from arrondi.formats import Scheme, tile_shape
from arrondi.model import DTYPES, Skeleton, Slot
from arrondi.nn import DenseLinear, QLinear, QStack
from arrondi.runtime.fused import fuse
from arrondi.tensor.qtensor import QTensor


def load_model(
    path: str | Path, *, dtype: str | torch.dtype = "float32", activations: str | Scheme | None = None
) -> Any:
    """Load a model directory, quantized or plain, in eval mode.

    Args:
        path: model directory.
        dtype: type that activations and unquantized weights have.
        activations: round the inputs of weight-only linears too, for speed (those of fused experts stay); `"int8/g128"`
            costs little. See `parse_activations`; `arrondi eval --activations` measures the cost.

    Returns:
        the transformers model; its quantized linears are `arrondi.nn.QLinear`, fused experts `arrondi.nn.QStack`.

    Raises:
        FileFormatError: not a model directory, or a layout that is not known.
        SchemeError: there is no such dtype, or no activations that can be rounded so.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    kind = DTYPES[dtype] if isinstance(dtype, str) else dtype
    checkpoint = Checkpoint.open(path).rounding(activations)
    skeleton = Skeleton(checkpoint)
    model = skeleton.model
    packed = _packed_slots(skeleton)
    for param, found in packed.items():
        module_name, _, leaf = param.rpartition(".")
        module = model.get_submodule(module_name)
        tensors = {source: checkpoint.read(source) for _, source in found}
        if len(skeleton.empty[param].shape) == 3:
            stack = _stack(found, tensors, skeleton, param, kind)
            del module._parameters[leaf]
            setattr(module, leaf, stack)
        else:
            made: dict[Any, QLinear] = {}
            for name in (alias.rpartition(".")[0] for alias in skeleton.names_of(param)):
                module = model.get_submodule(name)
                if module not in made:
                    made[module] = _linear(skeleton, name, module, found[0][1], tensors, kind)
                model.set_submodule(name, made[module])
    for name in [n for n in skeleton.empty if not _gone(model, n)]:
        skeleton.fill([name], kind)
    skeleton.load_buffers()
    DenseLinear.adopt(model)
    fuse(model)
    if model.can_generate():
        model.config.use_cache = True
    model.config.dtype = kind
    generation = checkpoint.folder.path / "generation_config.json"
    if generation.exists() and model.can_generate():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder.path)
    return model


def _packed_slots(skeleton: Skeleton) -> dict[str, list[tuple[Slot, str]]]:
    """Parameter → the quantized tensors that fill it, with their places."""
    packed: dict[str, list[tuple[Slot, str]]] = {}
    for source in skeleton.checkpoint.placed:
        slots = skeleton.slots(source)
        if not slots:
            raise FileFormatError(
                f"{skeleton.checkpoint.folder.path}: {source} is quantized, but transformers computes its parameter from it in a way that packed codes cannot follow."
            )
        for slot in slots:
            packed.setdefault(slot.param, []).append((slot, source))
    return packed


def _linear(
    skeleton: Skeleton, name: str, module: Any, source: str, tensors: dict[str, Any], kind: torch.dtype
) -> QLinear:
    bias = None
    if module._parameters.get("bias") is not None:
        skeleton.fill([f"{name}.bias"], kind)
        bias = module.bias.detach()
    return QLinear(
        tensors[source],
        bias,
        activations=skeleton.checkpoint.activations_of(source),
        dtype=kind,
        transposed=type(module).__name__ == "Conv1D",
    )


def _stack(
    found: list[tuple[Slot, str]], tensors: dict[str, Any], skeleton: Skeleton, param: str, kind: torch.dtype
) -> QStack:
    """The quantized matrices of a fused parameter, in order."""
    count = skeleton.empty[param].shape[0]
    pieces: list[list[QTensor]] = [[] for _ in range(count)]
    flipped = found[0][0].flipped
    for slot, source in sorted(found, key=lambda f: (f[0].index or 0, f[0].rows.start or 0, f[0].columns.start or 0)):
        q = tensors[source]
        if slot.source_index is not None:
            rows = q.shape[0] // count
            q = _rows(q, slot.source_index * rows, rows)
        pieces[slot.index or 0].append(q)
    return QStack(pieces, transposed=flipped, dtype=kind)


def _rows(q: QTensor, start: int, count: int) -> QTensor:
    """Some rows of a matrix, cut where a tile ends; a scale for all rows goes with every part."""
    height = tile_shape(q.scheme.granularity, q.shape)[0]
    first, last = (0, None) if height == q.shape[0] else (start // height, -(-(start + count) // height))
    zero, offset = (None if p is None else p[first:last] for p in (q.zero_point, q.real_offset))
    if isinstance(q.scale, QTensor):
        rows = q.scale.shape[0] if last is None else last - first
        scale: torch.Tensor | QTensor = _rows(q.scale, first, rows)
    else:
        scale = q.scale[first:last]
    return QTensor(q.codes[start : start + count], scale, zero, offset, q.scheme)


def _gone(model: Any, param: str) -> bool:
    """Whether the module that held this parameter was replaced, or the parameter itself."""
    try:
        module = model.get_submodule(param.rpartition(".")[0])
    except AttributeError:
        return True
    return isinstance(module, QLinear) or param.rpartition(".")[2] not in module._parameters
