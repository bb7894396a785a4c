"""The six calls that a fused block makes: `Compiled`.

q, k and v as one product with the norm before it (as two or three where their schemes differ, as in mixes of GGUF files); rotary positions; attention; the output product with the addition; gate and up as one
product with norm and gate; the last product with the addition. A block of transformers takes some sixty small operators instead, which
cost more than its products when one token is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from arrondi.kernels.product import Product
from arrondi.kernels.tokens import rotate
from arrondi.nn import QLinear, joined_product
from arrondi.rewrite.spread import spread
from arrondi.runtime.pattern import Differs, Norm, Pattern


class Compiled:
    """Products with everything bound that stays the same.

    Args:
        block: whose parts are read.
        pattern: what they are.
        layer: under which number keys and values are cached.

    Raises:
        Differs: its layers cannot be called together.
    """

    @torch.inference_mode(False)  # tensors made in inference mode could not be read outside
    @torch.no_grad()
    def __init__(self, block: nn.Module, pattern: Pattern, layer: int) -> None:
        self.pattern, self.layer = pattern, layer
        self.attention: Any = block.get_submodule(pattern.attention)
        self.config: Any = self.attention.config
        self.options = dict(pattern.options)
        parts = {name: _linear(block, name) for name in pattern.linears}
        self.dtype = parts[pattern.out].meta.dtype
        before, between = _weight(block, pattern.before), _weight(block, pattern.between)
        mixing = [parts[name] for name in (pattern.query, pattern.key, pattern.value)]
        self.mix = _side_by_side(mixing, norm=before, eps=pattern.before.eps)
        self.merge = _product([parts[pattern.out]])
        gated = [parts[name] for name in (pattern.gate, pattern.up)]
        self.widen = _product(gated, norm=between, eps=pattern.between.eps, gate=pattern.activation)
        self.narrow = _product([parts[pattern.down]])
        self.spread = tuple(parts[name].spread for name in (pattern.out, pattern.down))
        self.head_norms: dict[str, Any] = {}
        if pattern.query_norm is not None and pattern.key_norm is not None:
            norm, key_norm = (_weight(block, n) for n in (pattern.query_norm, pattern.key_norm))
            self.head_norms = {"norm": norm, "key_norm": key_norm, "eps": pattern.query_norm.eps}
        self.layers = [_place(block, name) for name in pattern.linears]
        modules = list(block.modules())
        self.inside = [vars(m) for m in modules if m is not block]
        self.hooks = [hooks for m in self.inside for hooks in (m["_forward_hooks"], m["_forward_pre_hooks"])]
        self.places = [(held, n, v) for m in modules for held in (m._modules, m._parameters) for n, v in held.items()]
        self.parameters = list(block.parameters())

    def fits(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
        """Whether these are positions for these tokens."""
        batch, length, _ = hidden.shape
        return (
            cos.dtype is sin.dtype is self.dtype
            and cos.shape == sin.shape
            and cos.shape[1:] == (length, self.pattern.width)
            and cos.shape[0] in (1, batch)
        )

    def needs_gradients(self) -> bool:
        return any(p.requires_grad for p in self.parameters)

    def holds_its_layers(self) -> bool:
        """Whether no linear layer was replaced, as an adapter does; quick enough for every token."""
        return all(held.get(name) is value for held, name, value in self.layers)

    def holds_its_parts(self) -> bool:
        """Whether no part, parameter or forward was replaced."""
        same = all(held.get(name) is value for held, name, value in self.places)
        return same and not any("forward" in attributes for attributes in self.inside)

    def __call__(self, hidden: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        batch, length, size = hidden.shape
        pattern, cache = self.pattern, given.get("past_key_values")
        x = hidden.reshape(-1, size)
        mixed = self.mix(x)
        self.rotate(mixed, batch, *given["position_embeddings"])
        states = mixed.view(batch, length, -1, pattern.width).transpose(1, 2)
        query, key, value = states.split((pattern.heads, pattern.key_heads, pattern.key_heads), dim=1)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        passed = {name: given[name] for name in pattern.passed if name in given}
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        seen, _ = attend(self.attention, query, key, value, given.get("attention_mask"), **self.options, **passed)
        x = self.merge(_spread(seen.reshape(batch * length, -1), self.spread[0]), x)
        return self.narrow(_spread(self.widen(x), self.spread[1]), x).view(batch, length, size)

    def rotate(self, mixed: torch.Tensor, batch: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
        if cos.shape[0] != batch:
            cos, sin = (t.expand(batch, -1, -1) for t in (cos, sin))
        cos, sin = (t.reshape(-1, self.pattern.width).contiguous() for t in (cos, sin))
        rotate(mixed, self.pattern.heads, self.pattern.key_heads, cos, sin, **self.head_norms)


def _spread(x: torch.Tensor, block: int) -> torch.Tensor:
    return spread(x, block) if block else x


def _linear(block: nn.Module, name: str) -> QLinear:
    layer = block.get_submodule(name)
    if not isinstance(layer, QLinear):
        raise Differs(f"Its {name} is a {type(layer).__name__}, no QLinear.")
    return layer


def _place(block: nn.Module, name: str) -> tuple[dict[str, Any], str, nn.Module]:
    """Where a layer is held, under which name, and itself."""
    owner, _, leaf = name.rpartition(".")
    return vars(block.get_submodule(owner))["_modules"], leaf, block.get_submodule(name)


def _weight(block: nn.Module, norm: Norm) -> torch.Tensor:
    weight = block.get_parameter(norm.weight).float()
    return (weight + 1 if norm.plus_one else weight.clone()).contiguous()


def _side_by_side(linears: list[QLinear], **options: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The outputs of layers that read the same, by as few products as their schemes allow."""
    whole = joined_product(linears, **options)
    if not isinstance(whole, str):
        return whole
    products: list[Product] = []
    runs: list[list[QLinear]] = []
    for layer in linears:
        longer = joined_product([*runs[-1], layer], **options) if runs else whole
        if isinstance(longer, str):
            runs.append([layer])
            products.append(_product([layer], **options))
        else:
            runs[-1].append(layer)
            products[-1] = longer
    return lambda x: torch.cat([product(x) for product in products], dim=1)


def _product(linears: list[QLinear], **options: Any) -> Product:
    made = joined_product(linears, **options)
    if isinstance(made, str):
        raise Differs(made)
    return made
