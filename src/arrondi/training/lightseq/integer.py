"""Integer inference of what LightSeq trained.

Owns: `IntegerLinear`, `to_integers`, `clips_of`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from arrondi.errors import SchemeError
from arrondi.kernels.clipping import clip_codes, narrow
from arrondi.kernels.sides import extremes, integer_product
from arrondi.training.lightseq.method import LEAST, Clips, offset_of, positive, widened
from arrondi.training.modules import LowBitLinear


class IntegerLinear(nn.Module):
    """A linear layer of codes: int8 × int8 → int32, and → int8 where its outputs have a clip.

    It gives, to the bit, what the layer that `lightseq` trained gives.

    Buffers: `codes` (out, in) int8; `bias` (out,) float32 with the offset of unsigned inputs in it, or None; `clip_in`,
    `clip_weight` and, or None, `clip_out`, () float32.
    """

    codes: torch.Tensor
    bias: torch.Tensor | None
    clip_in: torch.Tensor
    clip_weight: torch.Tensor
    clip_out: torch.Tensor | None

    def __init__(self, trained: LowBitLinear) -> None:
        super().__init__()
        layer = trained.lowbit.layer
        options, weight = layer.options, trained.weight.detach()
        if "begun" not in layer.kept:
            raise SchemeError(
                "The first batch sets clips, and the layer has seen none: run a batch before it is exported."
            )
        self.out_features, self.in_features = weight.shape
        self.unsigned = options.inputs == "unsigned"
        clip, clip_weight = positive(trained.get_parameter("lowbit_clip")), extremes(weight).amax().clamp_min(LEAST)
        codes = clip_codes(weight, clip_weight).codes
        bias = None if trained.bias is None else trained.bias.detach().float().clone()
        if self.unsigned:
            offset = offset_of(codes, clip, clip_weight)
            bias = offset if bias is None else bias + offset
        clip_out = positive(layer.kept["clip_out"]).to(weight.device) if options.outputs == "int8" else None
        named = {"codes": codes, "bias": bias, "clip_in": clip, "clip_weight": clip_weight, "clip_out": clip_out}
        for name, value in named.items():
            self.register_buffer(name, None if value is None else value.clone())

    @property
    def clips(self) -> Clips:
        """Of the product."""
        return Clips(self.clip_in, self.clip_weight, self.clip_out, self.unsigned)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in), floating → (..., out), same dtype."""
        codes, unsound = self.product(x)
        return self.numbers(codes, unsound, x.dtype)

    def product(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., in) → what leaves the product, (..., out) int8, or int32 where it has no clip; and (rows,) NaN where x is not finite."""
        rows = x.detach().reshape(-1, self.in_features)
        sums = integer_product(clip_codes(rows, self.clip_in, unsigned=self.unsigned).codes, self.codes)
        left = sums if self.clip_out is None else narrow(sums, self.clips.factor).codes
        return left.reshape(*x.shape[:-1], -1), 0 * extremes(rows) + 0 * self.clip_weight

    def numbers(self, codes: torch.Tensor, unsound: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What `product` gave as numbers, with the bias."""
        rows = codes.reshape(-1, self.out_features)
        return widened(rows, self.clips, self.bias, unsound, dtype).reshape(codes.shape)

    def extra_repr(self) -> str:
        kind = "unsigned" if self.unsigned else "int8"
        out = "int32" if self.clip_out is None else "int8"
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind} × int8 → {out}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Casts of a model leave clips and bias in float32, in which they are exact; devices they follow."""
        before = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)
        for name, value in before.items():
            now = self._buffers[name]
            if now is not None and now.dtype != value.dtype:
                self._buffers[name] = value.to(now.device)
        return self


def to_integers(model: nn.Module) -> list[str]:
    """Replace every linear layer that `lightseq` trained by one of codes, in place; returns their names.

    Raises:
        SchemeError: there are none, the model is one itself, or a layer saw no batch yet.
    """
    found = [
        (n, m) for n, m in model.named_modules() if isinstance(m, LowBitLinear) and m.lowbit.method.name == "lightseq"
    ]
    if not found or found[0][1] is model:
        raise SchemeError(
            "Layers are replaced inside of a model that trains by lightseq, and this one has none: convert it first."
        )
    made = {module: IntegerLinear(module) for _, module in found}
    for name, module in found:
        model.set_submodule(name, made[module])
    return [name for name, _ in found]


def clips_of(linears: list[Any]) -> torch.Tensor:
    """Clips of layers: all of weights, all of inputs, all of outputs; 0 where there is none. (3 · layers,) float32."""
    rows = []
    for module in linears:
        if isinstance(module, IntegerLinear):
            clips = module.clips
        else:
            layer = module.lowbit.layer
            out = layer.kept.get("clip_out")
            weight = extremes(module.weight.detach()).amax().clamp_min(LEAST)
            clips = Clips(
                positive(module.get_parameter("lowbit_clip")), weight, None if out is None else positive(out), False
            )
        rows.append(
            torch.stack([clips.weight, clips.inputs, clips.weight * 0 if clips.outputs is None else clips.outputs])
        )
    return torch.stack(rows, 1).flatten().cpu()
