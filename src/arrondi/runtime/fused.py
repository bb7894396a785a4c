"""Transformer blocks in few compiled calls.

Owns: `fuse` and `is_fused`. A block of the usual shape (RMS norm, attention with rotary positions, RMS norm, gated MLP, both added to what
came in) takes some sixty small operators, which cost more than its products when one token is computed. Here it takes
six calls: q, k and v as one product with the norm before it; rotary positions; the cache; attention; the output product with the
addition; gate and up as one product with norm and gate; the last product with the addition.

Which blocks are of that shape is not read off the model's name. Their parts are found by what they hold, each part is
compared with the formula that replaces it on numbers of its own, and the whole block with transformers' own forward. Blocks
that differ keep theirs, as does every call that asks for more: gradients, hooks inside or everywhere, another type, a trace;
and every call after a part or its forward was replaced (by an adapter, say). Numbers that change in place count at the next call,
or, if they change through `.data`, which nobody counts, at the next call of several tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from arrondi.kernels.product import Product
from arrondi.kernels.tokens import rotate
from arrondi.model.memory import release
from arrondi.nn import QLinear, QStack, joined_product

try:
    from transformers.utils.output_capturing import _active_collector as _recorded
except ImportError:  # transformers before 5.2 takes away what it recorded with
    _recorded = None

_PARTS: Final = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
_MIXING: Final = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_HEAD_NORMS: Final = frozenset({"q_norm", "k_norm"})
_GATED: Final = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})
_GATES: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": nn.functional.silu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}
_WIDEST: Final = 256
"""Of a head, for which the rotary kernel has registers."""


class _Differs(Exception):
    """Why a block is not of the usual shape."""


@dataclass
class _Live:
    """The float32 copy that compiled calls read of a norm's weight or a bias.

    PyTorch counts changes in place, except those through `.data`. For their sake it is made anew in calls of several tokens,
    with which nearly every text begins; for each token after them that would cost a small block a tenth of its time.
    """

    stored: torch.Tensor
    copy: torch.Tensor
    plus: torch.Tensor | None = None
    seen: tuple[int, int] | None = None

    def read(self, *, anew: bool) -> None:
        now = (0 if self.stored.is_inference() else self.stored._version, self.stored.data_ptr())
        if now == self.seen and not anew:
            return
        if self.plus is None:
            self.copy.copy_(self.stored)
        else:  # in one step, so that another thread never finds half of it
            torch.add(self.plus, self.stored, out=self.copy)
        self.seen = now


@dataclass(frozen=True)
class _Norm:
    weight: _Live
    eps: float


def fuse(model: nn.Module) -> dict[str, str | None]:
    """Give every block that allows it a forward of few compiled calls.

    Packed weights that are read together are put side by side in memory; every layer keeps its part.

    Args:
        model: of transformers, its quantized linears `QLinear`.

    Returns:
        for every block by name: None if it was done, else one sentence why not.
    """
    found: dict[str, str | None] = {}
    for name, block in _blocks(model):
        try:
            _install(block)
            found[name] = None
        except _Differs as reason:
            found[name] = str(reason)
        release()  # what the parts held before they were put side by side
    return found


def is_fused(model: nn.Module) -> bool:
    """Whether every layer with quantized weights is part of a block that `fuse` changed."""
    inside = {m for _, block in _blocks(model) if type(vars(block).get("forward")) is _Forward for m in block.modules()}
    packed = [m for m in model.modules() if isinstance(m, (QLinear, QStack))]
    return bool(packed) and inside.issuperset(packed)


def _blocks(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if set(_PARTS) <= {child for child, _ in m.named_children()}]


def _install(block: Any) -> None:
    if block.forward != MethodType(type(block).forward, block):
        raise _Differs("Its forward was replaced already.")
    parts = _Parts(block)
    _compare(block, parts)
    block.forward = _Forward(block, parts)


class _Forward:
    """The forward of one block. Copies and pickles of it make their products anew when they are called first."""

    def __init__(self, block: Any, parts: _Parts | None = None) -> None:
        # The block holds its forward; held by it in turn, its weights would stay until the garbage collector looks.
        self.weak, self.parts = weakref.ref(block), parts

    @property
    def block(self) -> Any:
        block = self.weak()
        if block is None:
            raise ReferenceError(
                "The block that this forward was made for is gone. Keep the block, not its forward alone."
            )
        return block

    def __reduce__(self) -> tuple[Any, ...]:
        return _Forward, (self.block,)

    def _ready(self, block: Any) -> _Parts | None:
        """The products; None in a copy whose parts were replaced by others."""
        if self.parts is None:
            try:
                self.parts = _Parts(block)
            except _Differs:
                return None
        return self.parts

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' decoder layers: hidden states (batch, tokens, width) in and out."""
        block = self.block
        parts = self._ready(block)
        if parts is None or position_embeddings is None or not parts.take(hidden_states, position_embeddings):
            return type(block).forward(
                block,
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return parts.compute(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)


class _Parts:
    """What a block is made of, as compiled products.

    Raises:
        _Differs: the block has other parts.
    """

    @torch.inference_mode(False)  # tensors made in inference mode could not be written to outside
    @torch.no_grad()
    def __init__(self, block: Any) -> None:
        self.attention = attention = block.self_attn
        mlp = block.mlp
        _exactly(block, _PARTS, frozenset())
        _exactly(attention, _MIXING, _HEAD_NORMS)
        _exactly(mlp, _GATED, frozenset())
        lacking = [name for name in ("config", "head_dim", "layer_idx", "scaling") if not hasattr(attention, name)]
        if lacking:
            raise _Differs(f"{type(attention).__name__} lacks attributes: {', '.join(lacking)}.")
        inside = [m for m in block.modules() if m is not block]
        self.forwards = [(m, MethodType(type(m).forward, m)) for m in inside]
        for module, forward in self.forwards:
            if module.forward != forward:
                raise _Differs(f"The forward of its {type(module).__name__} was replaced.")
        mixing, out = [attention.q_proj, attention.k_proj, attention.v_proj], attention.o_proj
        gated, down = [mlp.gate_proj, mlp.up_proj], mlp.down_proj
        self.dtype = _common_dtype([*mixing, out, *gated, down])
        self.width = int(attention.head_dim)
        if self.width % 2 or self.width > _WIDEST:
            raise _Differs(f"Its heads are {self.width} wide; even widths up to {_WIDEST} are known.")
        if attention.k_proj.out_features != attention.v_proj.out_features:
            raise _Differs("Its keys and values have different shapes.")
        self.heads, self.key_heads = (linear.out_features // self.width for linear in mixing[:2])
        size = mixing[0].in_features
        before, between = _norm(block.input_layernorm, size), _norm(block.post_attention_layernorm, size)
        self.head_norms = [
            _norm(getattr(attention, name), self.width) if hasattr(attention, name) else None
            for name in ("q_norm", "k_norm")
        ]
        self.mix = _product(mixing, before)
        self.merge = _product([out])
        self.widen = _product(gated, between, _gate(mlp.act_fn))
        self.narrow = _product([down])
        self.exact = all(linear.inputs is None for linear in (*mixing, out, *gated, down))
        self.extra = {"sliding_window": attention.sliding_window} if hasattr(attention, "sliding_window") else {}
        norms = [norm for norm in (before, between, *self.head_norms) if norm is not None]
        self.live = [norm.weight for norm in norms]
        for product, linears in ((self.mix, mixing), (self.merge, [out]), (self.widen, gated), (self.narrow, [down])):
            self.live += _biases(product, linears)
        self.hooks = [hooks for m in inside for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.places = [(m._modules, name, child) for m in block.modules() for name, child in m._modules.items()]
        self.owned = [(m._parameters, name, p) for m in block.modules() for name, p in m._parameters.items()]

    def take(self, hidden: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor]) -> bool:
        """Whether this call is one for the compiled products."""
        return (
            type(hidden) is torch.Tensor
            and hidden.device.type == "cpu"
            and hidden.dtype == positions[0].dtype == self.dtype
            and positions[0].shape[-1] == self.width
            and not self.attention.training
            and not (
                torch.is_grad_enabled()
                and (hidden.requires_grad or any(p.requires_grad for _, _, p in self.owned if p is not None))
            )
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not torch.is_autocast_enabled("cpu")
            and self.attention.config._attn_implementation in ALL_ATTENTION_FUNCTIONS
            and not (_global_forward_hooks or _global_forward_pre_hooks)
            and all(modules.get(name) is child for modules, name, child in self.places)
            and all(parameters.get(name) is p for parameters, name, p in self.owned)
            and all(module.forward == forward for module, forward in self.forwards)
            and not any(hooks and _busy(hooks.values()) for hooks in self.hooks)
        )

    def compute(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        batch, length, size = hidden_states.shape
        x = hidden_states.reshape(-1, size)
        several = batch * length > 1
        for live in self.live:
            live.read(anew=several)
        mixed = self.mix(x)
        self.rotate(mixed, batch, *position_embeddings)
        states = mixed.view(batch, length, -1, self.width).transpose(1, 2)
        query, key, value = states.split((self.heads, self.key_heads, self.key_heads), dim=1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.attention.layer_idx)
        seen, _ = ALL_ATTENTION_FUNCTIONS[self.attention.config._attn_implementation](
            self.attention,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.attention.scaling,
            **self.extra,
            **kwargs,
        )
        x = self.merge(seen.reshape(batch * length, -1), x)
        return self.narrow(self.widen(x), x).view(batch, length, size)

    def rotate(self, mixed: torch.Tensor, batch: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
        if cos.shape[0] != batch:
            cos, sin = (t.expand(batch, -1, -1) for t in (cos, sin))
        cos, sin = (t.reshape(-1, self.width).contiguous() for t in (cos, sin))
        query, key = self.head_norms
        if query is None or key is None:
            return rotate(mixed, self.heads, self.key_heads, cos, sin)
        norms = {"norm": query.weight.copy, "key_norm": key.weight.copy}
        rotate(mixed, self.heads, self.key_heads, cos, sin, **norms, eps=query.eps)


def _busy(hooks: Collection[Callable[..., Any]]) -> bool:
    """Whether hooks have something to do in this call.

    Those with which transformers records attentions stay for good once it was asked to, and mostly record nothing.
    """
    recording = _recorded is None or _recorded.get()
    return bool(recording) or any(hook.__module__ != "transformers.utils.output_capturing" for hook in hooks)


def _product(linears: list[QLinear], norm: _Norm | None = None, gate: str | None = None) -> Product:
    weight, eps = (None, 0.0) if norm is None else (norm.weight.copy, norm.eps)
    made = joined_product(linears, norm=weight, eps=eps, gate=gate)
    if isinstance(made, str):
        raise _Differs(made)
    return made


def _biases(product: Product, linears: list[QLinear]) -> list[_Live]:
    """Where the product reads the biases of its layers."""
    _, joined, _ = product.kept
    if joined is None:
        return []
    copies = joined.split([linear.out_features for linear in linears])
    return [_Live(l.bias, copy) for l, copy in zip(linears, copies, strict=True) if l.bias is not None]


def _exactly(module: nn.Module, needed: frozenset[str], allowed: frozenset[str]) -> None:
    children = {name for name, _ in module.named_children()}
    for what, names in (("has other parts", children - needed - allowed), ("lacks parts", needed - children)):
        if names:
            raise _Differs(f"{type(module).__name__} {what}: {', '.join(sorted(names))}.")


def _common_dtype(linears: list[Any]) -> torch.dtype:
    for linear in linears:
        if not isinstance(linear, QLinear):
            raise _Differs(f"One of its linear layers is a {type(linear).__name__}, no QLinear.")
    dtypes = {linear.meta.dtype for linear in linears}
    if len(dtypes) > 1:
        raise _Differs("Its linear layers compute in different types.")
    if not dtypes <= {torch.float32, torch.bfloat16}:
        raise _Differs("Its linear layers compute in float16; float32 and bfloat16 are known.")
    return dtypes.pop()


def _norm(module: Any, size: int) -> _Norm:
    """What makes `x / √(mean(x²) + eps) · weight` of the module: its weight, or the weight and one as in Gemma."""
    stored = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if set(stored) != {"weight"} or stored["weight"].shape != (size,) or eps is None:
        raise _Differs(
            f"{type(module).__name__} has not exactly a weight of {size} numbers and an eps, as an RMS norm does."
        )
    x = torch.randn(4, size, generator=torch.Generator().manual_seed(0))
    x[1] *= float(eps) ** 0.5  # where eps counts
    wanted = module(x)
    normed = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    for plus in (None, torch.ones(1)):
        weight = _Live(stored["weight"], torch.empty(size), plus)
        weight.read(anew=True)
        if torch.allclose(normed * weight.copy, wanted, rtol=1e-4, atol=1e-6):
            return _Norm(weight, float(eps))
    raise _Differs(f"{type(module).__name__} computes something else than an RMS norm.")


@torch.no_grad()
def _gate(activation: Callable[[torch.Tensor], torch.Tensor]) -> str:
    x = torch.linspace(-12, 12, 193)
    for name, function in _GATES.items():
        if torch.allclose(activation(x), function(x), rtol=1e-5, atol=1e-6):
            return name
    raise _Differs(f"Its activation is none of {', '.join(_GATES)}.")


@torch.no_grad()
def _compare(block: Any, parts: _Parts) -> None:
    """Five random tokens by transformers' forward and by the compiled products.

    Both in float32: the roundings of bfloat16 would hide what differs by less.

    Raises:
        _Differs: the results differ, or transformers' forward takes or gives something else.
    """
    implementation = parts.attention.config._attn_implementation
    if implementation not in ALL_ATTENTION_FUNCTIONS:
        raise _Differs(f"Its attention is {implementation}, which is not among the functions that all models share.")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, parts.mix.columns, generator=generator)
    angle = torch.rand(1, 5, parts.width // 2, generator=generator).mul(6).repeat(1, 1, 2)
    positions = angle.cos(), angle.sin()
    try:
        with _in_float32(block):
            wanted = type(block).forward(block, x, position_ids=torch.arange(5)[None], position_embeddings=positions)
    except Exception as error:
        raise _Differs(f"Its forward, called as that of a usual block, raises {type(error).__name__}.") from error
    if not isinstance(wanted, torch.Tensor) or wanted.shape != x.shape:
        raise _Differs("Its forward gives something else than hidden states.")
    off, added = (parts.compute(x, positions) - wanted).norm(dim=-1), (wanted - x).norm(dim=-1)
    # The digits of x are finer than this. Where the scheme rounds activations, some fall on the other side of an edge; of few
    # tokens, as the sums before them differ by 2^-20.
    close = (off <= 1e-3 * added).all() if parts.exact else (off <= 1e-2 * added).double().mean() > 0.5
    if not close:
        raise _Differs("It computes something else than a block of the usual shape.")


@contextmanager
def _in_float32(block: nn.Module) -> Iterator[None]:
    """Its packed layers take and give float32 inside."""
    layers = [m for m in block.modules() if isinstance(m, QLinear)]
    before = [layer.meta for layer in layers]
    try:
        for layer, meta in zip(layers, before, strict=True):
            layer.meta, layer._bound = replace(meta, dtype=torch.float32), None
        yield
    finally:
        for layer, meta in zip(layers, before, strict=True):
            layer.meta, layer._bound = meta, None
