"""peft's layers around packed ones: `LAYERS`, and "all-linear" with packed layers among them (`all_linear`).

Importing this file imports peft. The layers are peft's own with what a packed weight cannot do taken out: nothing is added to codes in
place, so merging is refused and is `arrondi adapt merge`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final, NoReturn

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from arrondi.adapters.files import STARTS
from arrondi.errors import SchemeError
from arrondi.nn import QConv, QEmbedding, QLinear, QStack


def _refuse_merge(*args: Any, **kwargs: Any) -> NoReturn:
    raise SchemeError(
        "An adapter cannot be added to packed codes in place: save it with save_pretrained, then arrondi adapt merge ADAPTER --base OUT -o MERGED."
    )


def _check_start(config: Any) -> None:
    start = config.init_lora_weights
    if start not in STARTS:
        from arrondi.adapters.initial import INITS  # with all of quantizing, which training does not need

        ours = str(start).split("_")[0]
        way = f"Start from arrondi adapt init MODEL -o OUT --init {ours}, or leave" if ours in INITS else "Leave"
        raise SchemeError(f"init_lora_weights={start!r} changes the base, and packed codes stay. {way} it out.")


def refuse_copies(wrapper: Any) -> None:
    """peft's `modules_to_save` are copies that are trained, which codes are not."""
    packed = [m for m in wrapper.original_module.modules() if isinstance(m, (*LAYERS, QStack))]
    if packed:
        raise SchemeError(
            f"modules_to_save are trained as they are, and packed codes are not ({type(packed[0]).__name__}). Name it in target_modules, or leave it out of the quantization (ignore)."
        )


class PackedLinear(lora.Linear):
    """LoRA (and DoRA) on a `QLinear`."""

    _seen_dense = False

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """As peft's."""
        _check_start(config)
        if r > min(self.in_features, self.out_features):
            raise SchemeError(
                f"A rank of {r} is more than a matrix of {self.out_features} × {self.in_features} has. Choose r ≤ {min(self.in_features, self.out_features)}."
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, QLinear)
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[Any, Any]:
        """As peft's; DoRA with the decoded weight."""
        return {**super().lora_variants, ("use_dora",): _Dora}

    def get_base_layer(self) -> nn.Module:
        """The packed layer, or for DoRA what it decodes to."""
        base: nn.Module = super().get_base_layer()
        return _decoded(base) if self._seen_dense and isinstance(base, QLinear) else base

    @contextmanager
    def decoded(self) -> Iterator[None]:
        """While this lasts `get_base_layer()` is an ordinary layer, made anew at every call."""
        self._seen_dense = True
        try:
            yield
        finally:
            self._seen_dense = False

    merge = _refuse_merge


class PackedEmbedding(lora.Embedding):
    """LoRA on a `QEmbedding`."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """As peft's, without DoRA."""
        _check_start(config)
        if config.use_dora:
            raise SchemeError("DoRA is for linear layers here. Take the packed embedding out of target_modules.")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, QEmbedding)
        return module.num_embeddings, module.embedding_dim

    def _get_embed_scale(self) -> float | None:
        base = self.get_base_layer()
        assert isinstance(base, QEmbedding)
        return None if base.factor == 1.0 else base.factor

    def _embed(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return nn.functional.embedding(input, weight)

    merge = _refuse_merge


def _no_convolution(target: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
    raise SchemeError(
        "Adapters go on packed linear layers and embeddings, not on packed convolutions. Take them out of target_modules, or keep them unquantized."
    )


LAYERS: Final[Mapping[type[nn.Module], Callable[..., nn.Module]]] = MappingProxyType(
    {QLinear: PackedLinear, QEmbedding: PackedEmbedding, QConv: _no_convolution}
)
"""Packed layer → what peft puts around it."""


class _Dora(DoraLinearVariant):
    """Weight-decomposed adaptation: the norm of the weight is asked for at every call, so it is decoded at every call."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """As peft's."""
        with module.decoded():
            DoraLinearVariant.init(module, adapter_name, **kwargs)

    @staticmethod
    def forward(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As peft's."""
        with module.decoded():
            y: torch.Tensor = DoraLinearVariant.forward(module, *args, **kwargs)
        return y


def _decoded(layer: QLinear) -> nn.Linear:
    """An ordinary layer of the same numbers, which gets no gradients."""
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(layer.dense(), requires_grad=False)
    plain.register_parameter("bias", layer.bias)
    return plain


def all_linear(original: Callable[..., Any]) -> Callable[..., Any]:
    """peft's resolution of "all-linear", with packed layers among the linear ones; the output head stays out, as there."""

    @functools.wraps(original)
    def resolve(config: Any, model: nn.Module) -> Any:
        asked = getattr(config, "target_modules", None)
        wanted = isinstance(asked, str) and asked.lower() == "all-linear"
        config = original(config, model)
        if wanted:
            ask: Any = getattr(model, "get_output_embeddings", None)
            head = None if ask is None else ask()
            packed = {n for n, m in model.named_modules() if isinstance(m, QLinear) and m is not head}
            config.target_modules |= {n for n in packed if n.rpartition(".")[2] != "base_layer"}
        return config

    return resolve
