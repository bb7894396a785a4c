"""Models that train in few bits, and back.

Owns: `convert_to_lowbit_training`, `restore_training`, `training_report`, `learned_state`, `load_learned_state`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from arrondi.arguments import check_fields, said
from arrondi.errors import SchemeError, unknown
from arrondi.pipeline.recipe import matches
from arrondi.pipeline.resolve import SMALL_OUTPUT
from arrondi.training.latent import LATENT, MADE_OF_OTHERS, _Latent, refuse_latent
from arrondi.training.method import Arithmetic, TrainingMethod
from arrondi.training.methods import PRODUCTS, TRAINING_METHODS
from arrondi.training.models import make_latent, make_plain, selectors
from arrondi.training.modules import PREFIX, LowBitConv2d, LowBitLinear, become, unbecome

_SHORT_CUT: Final = "lowbit_activation"
"""Under what name an encoder layer of PyTorch keeps what it knew of its activation."""

_PLAIN: Final = (nn.Linear, nn.Conv2d)
_OTHERS: Final = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
"""Of PyTorch's modules, those whose matrices have other names than `weight`."""

LOWBIT: Final = (LowBitLinear, LowBitConv2d)


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name: in the model.
        method: of its training; None where it stays in float.
        arithmetic: in which numbers its products run: forward, gradient of the input, gradient of the weight.
        reason: why it stays in float.
        learning_rate: the factor that the method asks of the layer's steps; see `follow_deviation`.
    """

    name: str
    method: str | None
    arithmetic: Arithmetic | None = None
    reason: str | None = None
    learning_rate: float = 1.0


def convert_to_lowbit_training(
    model: nn.Module, method: str, *, ignore: Iterable[str] | None = None, **options: Any
) -> list[LayerReport]:
    """Let the linear layers and convolutions of a model train in few bits, in place.

    Their parameters stay, under their names: optimizers that hold them, hooks, tied layers and state dicts go on as before. Convert
    before a model is wrapped by DDP or `fully_shard`. `torch.compile` leaves the converted layers out of its graphs.

    Args:
        model: any module. Layers whose class computes in a way of its own or whose weight is made of others (weight_norm, pruning),
            heads that are tied to an embedding, and the output layer of a transformers model stay in float; of methods whose
            products run in few bits also grouped convolutions and those that pad by something else than zeros.
        method: a name of `TRAINING_METHODS`. Of those with weights of one or two bits, `arrondi.training.models.pack` makes an
            ordinary quantized model. What `int4`, `luq`, `lsq-only` and `lightseq` learn besides are new parameters: make the
            optimizer after the conversion.
        ignore: what stays in float: class names, paths of modules, or "re:" and a pattern.
        options: of the method; see its class of options.

    Returns:
        What became of every layer with a matrix, as `training_report` gives it.

    Raises:
        SchemeError: there is no such method or option, the model is converted already, a selector finds nothing, or nothing in the
            model can be converted.
    """
    if not isinstance(model, nn.Module):
        raise SchemeError(f"A model that trains is a torch.nn.Module, got {said(model)}.")
    if method not in TRAINING_METHODS:
        raise unknown("training method", method, TRAINING_METHODS)
    words = None if ignore is None else selectors(ignore, "ignore")
    if any(isinstance(module, (*LOWBIT, _Latent)) for module in model.modules()):
        raise SchemeError("The model trains in few bits already: call restore_training() first.")
    if method in LATENT:
        heads = [name for name, module in _layers(model) if _is_head(model, module)]
        make_latent(model, method, ignore=words if words is None and not heads else (*(words or ()), *heads), **options)
        _walk_through_layers(model)
        return training_report(model)
    chosen = PRODUCTS[method]
    given = _options(chosen, options)
    found = [(name, module, _why_not(model, name, module, words or ())) for name, module in _layers(model)]
    for word in words or ():
        if not any(matches(word, [name], _classes(module)) for name, module in model.named_modules()):
            raise SchemeError(f"The selector {word!r} finds no layer of {type(model).__name__}. Check its spelling.")
    if not any(reason is None for _, _, reason in found):
        reasons = "; ".join(f"{name or 'the model'}: {reason}" for name, _, reason in found[:3]) or "it has no layers"
        raise SchemeError(f"Nothing in the model can train by {method} ({reasons}).")
    for _, module, reason in found:
        if reason is None:
            assert isinstance(module, nn.Linear | nn.Conv2d)
            become(module, chosen, given)
    _walk_through_layers(model)
    return training_report(model)


def restore_training(model: nn.Module) -> None:
    """Undo `convert_to_lowbit_training`, in place. Trained weights stay; what a method learned besides is dropped."""
    for module in list(model.modules()):
        if isinstance(module, LOWBIT):
            unbecome(module)
        elif _SHORT_CUT in module.__dict__:
            module.activation_relu_or_gelu = module.__dict__.pop(_SHORT_CUT)
    make_plain(model)


def training_report(model: nn.Module) -> list[LayerReport]:
    """In which arithmetic every layer of a converted model runs, and why others stay in float."""
    rows = []
    latent = any(isinstance(module, _Latent) for module in model.modules())
    for name, module in _layers(model):
        if isinstance(module, LOWBIT):
            lowbit = module.lowbit
            arithmetic = lowbit.method.arithmetic(lowbit.layer, module.weight.device.type)
            rows.append(LayerReport(name, lowbit.method.name, arithmetic, None, lowbit.layer.learning_rate))
        elif isinstance(module, _Latent):
            way = f"float32, weights rounded to {module.kind.format}"
            rows.append(LayerReport(name, module.method, (way, way, "float32, straight through")))
        else:
            reason = (latent and refuse_latent(module)) or _why_not(model, name, module, ())
            if latent and not reason and module.get_parameter("weight").shape[0] < SMALL_OUTPUT:
                reason = f"It has fewer than {SMALL_OUTPUT} outputs, which are not packed."
            reason = reason or "It was told to."
            rows.append(LayerReport(name, None, reason=reason))
    return rows


def learned_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What methods learned and keep besides weights, which no state dict has: to save beside it."""
    state: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LOWBIT):
            layer = module.lowbit.layer
            state |= {f"{name}.{key}": getattr(module, PREFIX + key).detach().clone() for key in layer.learned}
            state |= {f"{name}.{key}": value.clone() for key, value in layer.kept.items()}
    return state


def load_learned_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give a converted model what `learned_state` saved.

    Raises:
        SchemeError: it is of another model or method.
    """
    rest = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, LOWBIT):
            layer = module.lowbit.layer
            for key in layer.learned:
                if f"{name}.{key}" in rest:
                    with torch.no_grad():
                        getattr(module, PREFIX + key).copy_(rest.pop(f"{name}.{key}"))
            own = [key for key in rest if key.startswith(f"{name}.") and "." not in key[len(name) + 1 :]]
            layer.kept |= {key[len(name) + 1 :]: rest.pop(key).clone() for key in own}
    if rest:
        raise SchemeError(
            f"The model has no layer that trains in few bits for {sorted(rest)[0]!r} and {len(rest) - 1} others: convert it by the method that the state was saved with."
        )


def _options(method: TrainingMethod, given: Mapping[str, Any]) -> Any:
    names = [f.name for f in fields(method.options)]
    for name in given:
        if name not in names:
            raise unknown(f"option of {method.name}:", name, names)
    options = method.options(**given)
    check_fields(options)
    return options


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that holds a matrix which multiplies, as far as its class shows it."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        holds = isinstance(module, _PLAIN) if weight is None else is_lazy(weight) or weight.dim() > 1
        if (holds and not isinstance(module, nn.Embedding)) or isinstance(module, _OTHERS):
            yield name, module


def _why_not(model: nn.Module, name: str, module: nn.Module, ignore: tuple[str, ...]) -> str | None:
    """Why a layer stays in float; None if it need not."""
    if any(matches(word, [name], _classes(module)) for word in ignore):
        return "It was told to."
    weight: Any = module._parameters.get("weight")
    if is_lazy(weight):
        return "It has no weight yet: run one batch before the conversion."
    if isinstance(module, _PLAIN) and weight is None:
        return MADE_OF_OTHERS
    if type(module) not in _PLAIN:
        return f"Its class {type(module).__name__} computes in a way of its own."
    assert isinstance(module, nn.Linear | nn.Conv2d)
    if not module.weight.is_floating_point():
        return f"Its weight is of {module.weight.dtype}."
    return _why_not_conv(module) if isinstance(module, nn.Conv2d) else _is_head(model, module)


def _is_head(model: nn.Module, module: nn.Module) -> str | None:
    """Why a linear layer is one that gives a model's scores, which stays in float whatever is ignored; None if it is none."""
    get = getattr(model, "get_output_embeddings", None)
    if callable(get) and get() is module:
        return "It is the output layer."
    weight = module._parameters.get("weight")
    if weight is not None and any(
        isinstance(m, nn.Embedding) and m.weight is weight for m in model.modules() if m is not module
    ):
        return "Its weight is an embedding's, too."
    return None


def _walk_through_layers(model: nn.Module) -> None:
    """In evaluation, PyTorch's encoder layer reads the weights of its linear layers and passes these by, if its activation is one
    that it knows: it is told that it is not."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.__dict__[_SHORT_CUT] = module.activation_relu_or_gelu
            module.activation_relu_or_gelu = 0


def _classes(module: nn.Module) -> tuple[str, ...]:
    return tuple(c.__name__ for c in type(module).__mro__)


def _why_not_conv(conv: nn.Conv2d) -> str | None:
    if conv.groups != 1:
        return "It is a grouped convolution, whose products are too small to gain."
    if conv.padding_mode != "zeros":
        return f"It pads by {conv.padding_mode}, not with zeros."
    uneven = any(d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return "It pads unevenly." if conv.padding == "same" and uneven else None
