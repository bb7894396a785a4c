"""A quantized checkpoint as a transformers model whose linears hold packed codes: `load`.

The model is transformers' own; only modules that multiply by a quantized weight are replaced, one at a time, so the float
copy of the model never exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from arrondi.checkpoint import Checkpoint, LayerValues
from arrondi.errors import unknown
from arrondi.formats import ActivationScheme, tile_shape
from arrondi.model import DTYPES, Instance, OnDisk, Site
from arrondi.nn import DenseLinear, QLinear, QStack
from arrondi.runtime.fuse import fuse as fuse_blocks
from arrondi.tensor.qtensor import Grid, QTensor


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    activations: str | ActivationScheme | None = None,
    fuse: bool = True,
) -> Any:
    """Load a model directory, quantized or plain, in eval mode.

    Args:
        path: model directory.
        dtype: type that activations and unquantized weights have.
        activations: round the inputs of weight-only linears too, for speed (those of fused experts stay); `"int8/g128"`
            costs little. See `parse_activations`; `arrondi eval --activations` measures the cost.
        fuse: compute blocks of the usual shape in few compiled calls; see `arrondi.runtime.fuse`.

    Returns:
        the transformers model; its quantized linears are `arrondi.nn.QLinear`, fused experts `arrondi.nn.QStack`.

    Raises:
        FileFormatError: not a model directory, tensors are missing, or a layout that is not known.
        SchemeError: there is no such dtype, or no activations that can be rounded so.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    kind = DTYPES[dtype] if isinstance(dtype, str) else dtype
    source = OnDisk(Checkpoint.open(path).rounding(activations))
    instance = source.instance()
    model = instance.model
    packed = _Packed(source, instance, kind)
    for param, sites in _by_param(source).items():
        packed.put(param, sites)
    instance.fill([n for n in instance.empty if n not in packed.gone], kind)
    DenseLinear.adopt(model)
    if fuse:
        fuse_blocks(model)
    if hasattr(model, "can_generate") and model.can_generate():
        model.config.use_cache = True
        generation = source.where / "generation_config.json"
        if generation.exists():
            from transformers import GenerationConfig

            model.generation_config = GenerationConfig.from_pretrained(source.where)
    model.config.dtype = kind
    return model


def _by_param(source: OnDisk) -> dict[str, list[Site]]:
    """Parameter → the sites that fill it, where all of them are stored quantized and a module can hold them packed."""
    found: dict[str, list[Site]] = {}
    for site in source.sites:
        found.setdefault(site.param, []).append(site)
    placed = source.checkpoint.placed
    return {
        param: sites
        for param, sites in found.items()
        if all(s.piece is not None and s.piece.source in placed and s.kind == "linear" and not s.unfit for s in sites)
    }


class _Packed:
    """Puts packed modules where parameters were.

    Attributes:
        gone: parameters that modules with packed codes replaced.
    """

    def __init__(self, source: OnDisk, instance: Instance, kind: torch.dtype) -> None:
        self.source, self.instance, self.kind = source, instance, kind
        self.gone: set[str] = set()

    def put(self, param: str, sites: list[Site]) -> None:
        """Replace a parameter by packed codes; one whose codes do not fit a module stays to be filled with numbers."""
        ordered = sorted(sites, key=lambda s: (s.param_index or 0, s.rows.start or 0, s.columns.start or 0))
        stored = {s.piece.source: self.source.checkpoint.layer(s.piece.source) for s in ordered if s.piece}
        weights = [_codes(s, stored) for s in ordered]
        if ordered[0].param_index is None:
            if len(weights) == 1 and tuple(weights[0].shape) == ordered[0].shape:
                self._linear(param, ordered[0], weights[0], next(iter(stored.values())).inputs)
            return
        count = self.instance.empty[param].shape[0]
        pieces: list[list[QTensor]] = [[] for _ in range(count)]
        for site, weight in zip(ordered, weights, strict=True):
            pieces[site.param_index or 0].append(weight)
        module, _, leaf = param.rpartition(".")
        owner = self.instance.model.get_submodule(module)
        del owner._parameters[leaf]
        setattr(owner, leaf, QStack(pieces, transposed=ordered[0].param_flipped, dtype=self.kind))
        self.gone.add(param)

    def _linear(self, param: str, site: Site, weight: QTensor, grid: Grid | None) -> None:
        """One module for all places that share the parameter; each keeps its own bias."""
        model, names = self.instance.model, self.instance.names.names_of(param)
        made: dict[Any, QLinear] = {}
        assert site.piece is not None
        scheme = self.source.checkpoint.inputs_of(site.piece.source)
        for name in (n.rpartition(".")[0] for n in names):
            module = model.get_submodule(name)
            if module not in made:
                bias = None
                if module._parameters.get("bias") is not None:
                    self.instance.fill([f"{name}.bias"], self.kind)
                    bias = module.bias.detach()
                made[module] = QLinear(weight, bias, inputs=scheme, input_grid=grid, dtype=self.kind)
            model.set_submodule(name, made[module])
        self.gone.update(names)
        self.gone.update(n for n in self.instance.empty if n.rpartition(".")[0] in {m.rpartition(".")[0] for m in names})


def _codes(site: Site, stored: Mapping[str, LayerValues]) -> QTensor:
    """The codes of a site, (out, in)."""
    piece = site.piece
    assert piece is not None
    q, rows = stored[piece.source].weight, site.shape[0]
    start = piece.source_rows.start if piece.source_index is None else piece.source_index * rows
    return q if q.shape[0] == rows else _rows(q, start, rows)


def _rows(q: QTensor, start: int, count: int) -> QTensor:
    """Some rows of a matrix, cut where a tile ends; a scale for all rows goes with every part."""
    height = tile_shape(q.scheme.granularity, q.shape)[0]
    first, last = (0, None) if height == q.shape[0] else (start // height, -(-(start + count) // height))
    zero, offset = (None if p is None else p[first:last] for p in (q.zero_point, q.offset))
    if isinstance(q.scale, QTensor):
        rows = q.scale.shape[0] if last is None else last - first
        scale: torch.Tensor | QTensor = _rows(q.scale, first, rows)
    else:
        scale = q.scale[first:last]
    return QTensor(q.codes[start : start + count], scale, zero, offset, q.scheme, q.group_index)
