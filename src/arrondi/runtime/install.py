"""Packed modules in the place of ordinary ones: `install`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from arrondi.checkpoint import LayerValues
from arrondi.formats import ActivationScheme
from arrondi.model import Names, Site
from arrondi.nn import QConv, QLinear, QStack, keep_hooks
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.rows import rows_of

Layers = Mapping[str, tuple[LayerValues, ActivationScheme | None]]
"""Stored tensor → its numbers, and how inputs are rounded."""


def install(model: Any, names: Names, sites: Sequence[Site], layers: Layers, dtype: torch.dtype) -> set[str]:
    """Let the modules that use one parameter hold packed codes instead.

    Args:
        model: whose modules are replaced, filled as far as biases are concerned.
        names: of its parameters.
        sites: all sites of one parameter.
        layers: the stored tensors that fill it.
        dtype: in which products are computed.

    Returns:
        the parameters that are gone, the biases of replaced modules among them; none where no module can hold these codes, as
        with recurrent cells or a parameter that is joined from tensors of other schemes.
    """
    ordered = sorted(sites, key=lambda s: (s.param_index or 0, s.rows.start or 0, s.columns.start or 0))
    first = ordered[0]
    weights = [_codes(s, layers) for s in ordered]
    if first.param_index is not None:
        return _stack(model, ordered, weights, dtype)
    values, inputs = layers[first.tensor if first.piece is None else first.piece.source]
    if len(weights) > 1 or weights[0].shape != first.matrix_shape or first.kind not in ("linear", "convolution"):
        return set()
    return _modules(model, names.names_of(first.param), weights[0], values, inputs, dtype)


def _modules(
    model: Any,
    names: Sequence[str],
    weight: QTensor,
    values: LayerValues,
    inputs: ActivationScheme | None,
    dtype: torch.dtype,
) -> set[str]:
    """One packed module for all places that share the parameter."""
    made: dict[nn.Module, nn.Module] = {}
    gone: set[str] = set()
    paths = [n.rpartition(".")[0] for n in names]
    for path, module in [(p, model.get_submodule(p)) for p in paths]:  # before any is replaced: they may be one
        if module not in made:
            if isinstance(module, nn.modules.conv._ConvNd):
                made[module] = QConv(weight, module, inputs=inputs, input_grid=values.inputs, dtype=dtype)
            else:
                bias = getattr(module, "bias", None)
                kept = None if bias is None else bias.detach()
                made[module] = QLinear(weight, kept, inputs=inputs, input_grid=values.inputs, dtype=dtype)
        keep_hooks(module, made[module])
        gone |= {f"{path}.{leaf}" for leaf in module._parameters}
        model.set_submodule(path, made[module])
    return gone


def _stack(model: Any, sites: Sequence[Site], weights: Sequence[QTensor], dtype: torch.dtype) -> set[str]:
    """The matrices of a fused parameter, in order."""
    module, _, leaf = sites[0].param.rpartition(".")
    owner = model.get_submodule(module)
    count = owner._parameters[leaf].shape[0]
    pieces: list[list[QTensor]] = [[] for _ in range(count)]
    for site, weight in zip(sites, weights, strict=True):
        pieces[site.param_index or 0].append(weight)
    if hasattr(owner, "config"):
        owner.config._experts_implementation = "eager"  # transformers' other ways multiply by the whole stack
    del owner._parameters[leaf]
    setattr(owner, leaf, QStack(pieces, transposed=sites[0].param_flipped, dtype=dtype))
    return {sites[0].param}


def _codes(site: Site, layers: Layers) -> QTensor:
    """The codes of a site, (out, in)."""
    rows, piece = site.shape[0], site.piece
    if piece is None:
        return layers[site.tensor][0].weight
    q = layers[piece.source][0].weight
    start = piece.source_rows.start if piece.source_index is None else piece.source_index * rows
    return q if q.shape[0] == rows else rows_of(q, start, rows)
