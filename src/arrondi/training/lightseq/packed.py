"""Layers that LightSeq trained as arrondi's ordinary packed layers, for `arrondi.save` and `arrondi.load`.

Owns: `to_packed`, `Carried`. A file of static int8 products has no clip of what leaves a product; what it cannot carry is said. This
module is not imported with the others, since it needs the rooms that write files: `from arrondi.training.lightseq.packed import to_packed`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from arrondi.checkpoint import LayerValues, ModelFacts, Placed
from arrondi.errors import SchemeError
from arrondi.formats import FORMATS, ActivationScheme, LayerScheme, PerTensor, Scheme
from arrondi.kernels.clipping import MOST, clip_codes
from arrondi.kernels.sides import extremes
from arrondi.model import InMemory
from arrondi.runtime.install import install
from arrondi.runtime.modules import remember
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import Grid
from arrondi.training.convert import restore_training
from arrondi.training.lightseq.method import LEAST, positive
from arrondi.training.modules import LowBitConv2d, LowBitLinear

_WEIGHT = Scheme(FORMATS["int8"], PerTensor())
_SIGNED = ActivationScheme(Scheme(FORMATS["int8"], PerTensor()), dynamic=False)
_UNSIGNED = ActivationScheme(Scheme(FORMATS["int8"], PerTensor(), "integer"), dynamic=False)


@dataclass(frozen=True)
class Carried:
    """What became of one layer.

    Attributes:
        name: of the layer.
        lost: what a packed layer does in another way, in sentences; empty where nothing is.
    """

    name: str
    lost: tuple[str, ...]


@torch.no_grad()
def to_packed(model: nn.Module) -> list[Carried]:
    """Let layers that `lightseq` trained hold packed int8 codes with a static scale of inputs, in place.

    Afterwards `arrondi.save(model, OUT)` writes them and `arrondi.load(OUT, model=fresh)` reads them. Outputs are those of the trained
    layers but for what is said to be lost: sums are not rounded to a byte, and numbers below the clip get one code more.

    Args:
        model: converted by `lightseq`, after a batch. The Transformer layers of this room hold parts that no file knows: use `export()`.

    Raises:
        SchemeError: the model has no such layers, is one itself, or has seen no batch.
    """
    trained = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LowBitLinear | LowBitConv2d) and module.lowbit.method.name == "lightseq"
    }
    if not trained or "" in trained:
        raise SchemeError(
            "Layers are packed inside of a model that trains by lightseq, and this one has none: convert it first."
        )
    values, inputs, rows = {}, {}, []
    for name, module in trained.items():
        layer = module.lowbit.layer
        if "begun" not in layer.kept:
            raise SchemeError(f"{name} has seen no batch, and the first one sets clips: run one.")
        unsigned = layer.options.inputs == "unsigned"
        values[name], inputs[name] = _values(module, unsigned), _UNSIGNED if unsigned else _SIGNED
        rows.append(Carried(name, tuple(_lost(layer.options.outputs, unsigned))))
    restore_training(model)
    source = InMemory(model.eval())
    sites = [s for s in source.sites if s.param.removesuffix(".weight") in trained]
    placed, found = {}, {}
    for site in sites:
        name = site.param.removesuffix(".weight")
        kind = "Conv2d" if isinstance(trained[name], nn.Conv2d) else "Linear"
        scheme = LayerScheme(_WEIGHT, inputs[name])
        placed[site.tensor] = Placed(site.tensor, site.shape, scheme, site.modules[0], kind)
        found[site.tensor] = values[name]
        install(model, source.names, [site], {site.tensor: (values[name], inputs[name])}, torch.float32)
    remember(model, placed, found, (), ModelFacts(), sites)
    return rows


def _values(module: LowBitLinear | LowBitConv2d, unsigned: bool) -> LayerValues:
    weight = module.weight.detach().flatten(1)
    clip, clip_weight = positive(module.get_parameter("lowbit_clip")), extremes(weight).amax().clamp_min(LEAST)
    stored = QTensor(clip_codes(weight, clip_weight).codes, (clip_weight / MOST).reshape(1, 1), None, None, _WEIGHT)
    if not unsigned:
        return LayerValues(stored, Grid((clip / MOST).reshape(1, 1)))
    zero = torch.full((1, 1), -MOST, dtype=torch.int32)
    return LayerValues(stored, Grid((clip / (2 * MOST)).reshape(1, 1), zero))


def _lost(outputs: str, unsigned: bool) -> list[str]:
    below = "zero" if unsigned else "the clip"
    said = [f"Inputs below {below} get the code -128, one step further."]
    return ["Outputs are not rounded to a byte.", *said] if outputs == "int8" else said
