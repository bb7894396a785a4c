"""Packed modules in the place of ordinary ones: `install`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from arrondi.checkpoint import LayerValues
from arrondi.formats import ActivationScheme
from arrondi.model import Names, Site
from arrondi.nn import QConv, QEmbedding, QLinear, QStack, factor_of, keep_hooks, refuse_table
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import Grid
from arrondi.tensor.rows import rows_of, rowwise, stack_rows

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
        with recurrent cells or a parameter that is joined from tensors of several schemes.
    """
    ordered = sorted(sites, key=lambda s: (s.param_index or 0, s.rows.start or 0, s.columns.start or 0))
    first = ordered[0]
    weights = [_codes(s, layers) for s in ordered]
    if first.param_index is not None:
        return _stack(model, ordered, weights, dtype)
    held = [layers[s.tensor if s.piece is None else s.piece.source] for s in ordered]
    weight = _below_each_other(ordered, weights, held)
    if weight is None or first.kind not in ("linear", "convolution", "embedding"):
        return set()
    parameter = names.params[first.param]
    if weight.shape != (first.matrix_shape if len(weights) == 1 else tuple(parameter.shape)):
        return set()
    return _modules(model, names.names_of(first.param), weight, *held[0], dtype)


def _below_each_other(
    sites: Sequence[Site], weights: Sequence[QTensor], held: Sequence[tuple[LayerValues, ActivationScheme | None]]
) -> QTensor | None:
    """The matrices of one parameter as one, None where they do not lie so or are not rounded alike."""
    if len(weights) == 1:
        return weights[0]
    (values, inputs), scheme = held[0], weights[0].scheme
    alike = all(w.scheme == scheme and i == inputs and _same_grid(v.inputs, values.inputs) for w, (v, i) in zip(weights, held, strict=True))  # fmt: skip
    rows = all(s.shape == w.shape and not s.param_flipped for s, w in zip(sites, weights, strict=True))
    ordered = all(w.group_index is None for w in weights) and rowwise(scheme)
    return stack_rows(weights) if alike and rows and ordered else None


def _same_grid(one: Grid | None, two: Grid | None) -> bool:
    if one is None or two is None:
        return one is two
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(one, two, strict=True))


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
    factors = {p: factor_of(m, dtype) for p in paths if isinstance(m := model.get_submodule(p), nn.Embedding)}
    if factors and (None in factors.values() or refuse_table(weight.scheme) or weight.group_index is not None):
        return set()
    for path, module in [(p, model.get_submodule(p)) for p in paths]:  # before any is replaced: they may be one
        if module not in made:
            if isinstance(module, nn.modules.conv._ConvNd):
                made[module] = QConv(weight, module, inputs=inputs, input_grid=values.inputs, dtype=dtype)
            elif (factor := factors.get(path)) is not None:
                made[module] = QEmbedding(weight, dtype=dtype, factor=factor)
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
