"""A quantized checkpoint as a transformers model whose linears hold packed codes: `load`.

The model is transformers' own; only modules that multiply by a quantized weight are replaced, one at a time, so the float
copy of the model never exists.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from arrondi.arguments import check_arguments
from arrondi.checkpoint import Checkpoint
from arrondi.checkpoint.states_file import stored_states
from arrondi.errors import unknown
from arrondi.formats import ActivationScheme
from arrondi.model import DTYPES, OnDisk, Site, configs_in, device_named
from arrondi.model.states import rounded_layers
from arrondi.nn import DenseLinear, QConv, QLinear, RoundedInputs
from arrondi.runtime.fuse import fuse as fuse_blocks
from arrondi.runtime.generation_config import read_generation_config
from arrondi.runtime.install import install
from arrondi.runtime.kv.cache import KNOWN
from arrondi.runtime.save import Held, SavePretrained


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    activations: str | ActivationScheme | None = None,
    fuse: bool = True,
    device: str | torch.device = "cpu",
) -> Any:
    """Load a model directory, quantized or plain, in eval mode.

    Args:
        path: model directory.
        dtype: type that activations and unquantized weights have.
        activations: round the inputs of weight-only linears too, for speed (those of fused experts stay); `"int8/g128"`
            costs little. See `parse_activations`; `arrondi eval --activations` measures the cost.
        fuse: compute blocks of the usual shape in few compiled calls; see `arrondi.runtime.fuse`. On a CPU only: elsewhere blocks
            stay as transformers has them.
        device: where the model will lie. Each weight goes there packed, and is multiplied by Triton where that is there and takes
            its scheme (`arrondi.kernels`), else decoded at every call.

    Returns:
        the transformers model; its quantized linears are `arrondi.nn.QLinear`, fused experts `arrondi.nn.QStack`.

    Raises:
        FileFormatError: not a model directory, tensors are missing, or a layout that is not known.
        SchemeError: there is no such dtype or device, no activations that can be rounded so, or the file asks for what is not
            computed here.
    """
    check_arguments(load, locals())
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    kind, where = DTYPES[dtype] if isinstance(dtype, str) else dtype, device_named(str(device))
    source = OnDisk(Checkpoint.open(path).rounding(activations), kind)
    source.check_computed()
    instance = source.instance(device=where)
    model = instance.model
    gone: set[str] = set()
    for sites in _packed(source):
        owners = {n.rpartition(".")[0] for n in source.names.names_of(sites[0].param)}
        instance.fill([n for n in instance.empty if n.rpartition(".")[0] in owners and n.endswith(".bias")], kind)
        names = {s.piece.source for s in sites if s.piece}
        layers = {n: (source.checkpoint.layer(n).to(where), source.checkpoint.inputs_of(n)) for n in names}
        gone |= install(model, source.names, sites, layers, kind)
    instance.fill([n for n in instance.empty if n not in gone], kind)
    packed = {name for name, module in model.named_modules() if isinstance(module, (QLinear, QConv))}
    for name, how in source.rounded_inputs(packed).items():  # of a router, or where the model reads the weight itself
        model.get_submodule(name).register_forward_pre_hook(RoundedInputs(*how), with_kwargs=True)
    DenseLinear.adopt(model)
    if fuse and where.type == "cpu":
        fuse_blocks(model)
    if hasattr(model, "can_generate") and model.can_generate():
        for part in configs_in(model.config):
            part.use_cache = True
        model.generation_config = read_generation_config(source.home) or model.generation_config
    model.config.dtype = kind
    if (stored := stored_states(source.home, source.config)) is not None:
        rounded_layers(model.config, stored[0])  # or the sentence that says why not
        setattr(model, KNOWN, stored[1])
    if source.checkpoint.layout is not None:
        again = partial(load, source.where, dtype=dtype, activations=activations, fuse=False, device=where)
        model.save_pretrained = SavePretrained(Held(model), source.where, source.checkpoint.folder.fingerprint(), again)
    return model


def _packed(source: OnDisk) -> list[list[Site]]:
    """The sites of every parameter that is stored quantized and that a module can hold packed."""
    found: dict[str, list[Site]] = {}
    for site in source.sites:
        found.setdefault(site.param, []).append(site)
    placed = source.checkpoint.placed
    return [
        sites
        for sites in found.values()
        if all(s.piece is not None and s.piece.source in placed and not s.unfit for s in sites)
    ]
