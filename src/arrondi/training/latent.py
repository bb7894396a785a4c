"""Layers that keep float weights and multiply by what few bits hold of them.

Owns: `LATENT`, the table of ways to round a weight while it is trained; `LatentLinear`, `LatentConv2d`, `LatentEmbedding`; `to_latent`,
which makes one of an ordinary layer, and `to_plain`, which gives that back with rounded weights.

A latent layer shares the parameters of the layer that it was made of, under the same names, so that optimizers and state dicts of the
one serve the other. What a method learns besides is beside them: `alpha` (terdit), `weight_2` (split), `norm.weight` (bitnet, if asked for).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from arrondi.arguments import check_fields
from arrondi.errors import SchemeError, unknown
from arrondi.formats import ActivationScheme, Granularity, LayerScheme, PerChannel, PerTensor, Scheme, get_format
from arrondi.formats.grammar import parse_activations
from arrondi.formats.scheme import Table
from arrondi.nn import DenseLinear, RoundedInputs, keep_hooks
from arrondi.nn.straight import sign, straight
from arrondi.tensor.nearest import fake_quantize
from arrondi.tensor.ranges.grid import Grid
from arrondi.training.binary import binary_weight, centred_weight, halves_weight
from arrondi.training.ternary import EPS, alpha_at_first, bitnet_weight, terdit_weight, twn_weight

SIGNS: Final = ActivationScheme(Scheme(get_format("binary"), PerTensor()), False)
"""Inputs of one bit: their signs, as ±1; zero is -1, as the format `binary` has it."""

MADE_OF_OTHERS: Final = "Its weight is made of others, by weight_norm, pruning or another parametrization."

_ONE: Final = 1.0


@dataclass(frozen=True)
class Options:
    """How a weight is rounded while it is trained.

    Attributes:
        threshold: of twn, see `arrondi.training.ternary.twn`; None is the best one, for which every step sorts the weight.
        rows: a scale for each output; else one for all of the weight.
        inputs: what becomes of the inputs: "" leaves them, "sign" takes their signs, or a word such as "int8/token".
        window: of binary and bibert: where the latent weight is larger, its gradient is 0; None: it passes everywhere.
        norm: a RMSNorm with a gain of its own stands in front of the layer. For models that have none there.
        eps: see `arrondi.training.ternary.absmean`.
    """

    threshold: float | None = None
    rows: bool = True
    inputs: str = ""
    window: float | None = None
    norm: bool = False
    eps: float = EPS

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def activations(self) -> ActivationScheme | None:
        """The scheme of the inputs."""
        if self.inputs == "sign":
            return SIGNS
        return parse_activations(self.inputs) if self.inputs else None


@dataclass(frozen=True)
class Latent:
    """One way to round a weight while it is trained.

    Attributes:
        source: where it comes from, for people.
        value: (weight (m, …), options, parameters beside it) → what the layer multiplies by, with gradients to all of them.
        format: of the packed weight.
        options: what is meant where nothing is said.
        takes: names of the options that a user may set.
        beside: weight → the parameters that it learns besides, as they start.
    """

    source: str
    value: Callable[[torch.Tensor, Options, Mapping[str, torch.Tensor]], torch.Tensor]
    format: str
    options: Options = Options()
    takes: frozenset[str] = frozenset({"inputs"})
    beside: Callable[[torch.Tensor], dict[str, torch.Tensor]] = lambda weight: {}

    def scheme(self, options: Options) -> LayerScheme:
        """What a packed layer of this kind is."""
        where: Granularity = PerChannel() if options.rows or self.format == "lut2" else PerTensor()
        # Two scales and two signs are four values, which is what a table is for.
        table = Table(1 if options.rows else 0, "float32") if self.format == "lut2" else None
        return LayerScheme(Scheme(get_format(self.format), where, table=table), options.activations)


LATENT: Final[Mapping[str, Latent]] = MappingProxyType({
    "twn": Latent(
        "Li, Zhang, Liu 2016, arXiv:1605.04711", lambda w, o, _: twn_weight(w, o.threshold, rows=o.rows), "ternary",
        Options(threshold=0.75), frozenset({"threshold", "rows", "inputs"}),
    ),
    "bitnet": Latent(
        "Ma et al. 2024, arXiv:2402.17764", lambda w, o, _: bitnet_weight(w, o.eps), "ternary", Options(rows=False, inputs="int8/token"),
        frozenset({"inputs", "norm", "eps"}),
    ),
    "terdit": Latent(
        "Lu et al. 2024, arXiv:2405.14854", lambda w, o, beside: terdit_weight(w, beside["alpha"], o.eps), "ternary",
        Options(rows=False), frozenset({"inputs", "eps"}), lambda w: {"alpha": alpha_at_first(w)},
    ),
    "binary": Latent(
        "Bai et al. 2020, arXiv:2012.15701", lambda w, o, _: binary_weight(w, rows=o.rows, window=o.window), "binary",
        takes=frozenset({"rows", "inputs", "window"}),
    ),
    "bibert": Latent(
        "Qin et al. 2022, arXiv:2203.06390", lambda w, o, _: centred_weight(w, o.window), "binary", Options(inputs="sign", window=1.0),
        frozenset({"inputs", "window"}),
    ),
    "split": Latent(
        "Bai et al. 2020, arXiv:2012.15701", lambda w, o, beside: halves_weight(w, beside["weight_2"], rows=o.rows), "lut2",
        takes=frozenset({"rows", "inputs"}), beside=lambda w: {"weight_2": torch.zeros_like(w)},
    ),
})  # fmt: skip
"""Every way to train a weight of one or two bits, by name."""


@torch.compiler.disable(reason="rounding runs compiled kernels that cannot be traced")
def _on_grid(x: torch.Tensor, inputs: ActivationScheme) -> torch.Tensor:
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise SchemeError(
            "Inputs that are rounded while a layer is trained cannot be traced or exported: pack() or restore the model first."
        )
    return fake_quantize(x, inputs.scheme, name="inputs")


class _Latent(nn.Module):
    """What latent layers have in common. A mixin: the layer's own class comes after it."""

    weight: torch.Tensor
    method: str
    options: Options
    activations: ActivationScheme | None
    norm: nn.RMSNorm | None

    def _become(self, layer: nn.Module, method: str, options: Options) -> None:
        """Takes everything from a layer, and gets what the method adds."""
        kind = LATENT[method]
        self.__dict__.update(
            {n: v for n, v in layer.__dict__.items() if n not in ("_parameters", "_buffers", "_modules")}
        )
        self.__dict__.update(
            _parameters=dict(layer._parameters), _buffers=dict(layer._buffers), _modules=dict(layer._modules)
        )
        keep_hooks(layer, self)
        self.method, self.options, self.activations = method, options, options.activations
        for name, start in kind.beside(self.weight).items():
            trained = self.weight.requires_grad
            self.register_parameter(name, nn.Parameter(start.detach().clone(), requires_grad=trained))
        norm = nn.RMSNorm(self.weight[0].numel(), eps=1e-6).to(self.weight) if options.norm else None
        self.register_module("norm", norm)

    @property
    def kind(self) -> Latent:
        """Its row of `LATENT`."""
        return LATENT[self.method]

    @property
    def scheme(self) -> LayerScheme:
        """What it is when it is packed."""
        found = self.kind.scheme(self.options)
        return replace(found, inputs=None) if isinstance(self, nn.Embedding) else found

    @property
    def input_grid(self) -> Grid | None:
        """The stored scale of its inputs, where they have one: that of signs is 1."""
        inputs = self.scheme.inputs
        return Grid(torch.full((1, 1), _ONE)) if inputs is not None and inputs.dynamic is False else None

    def value(self) -> torch.Tensor:
        """The weight that it multiplies by, in the shape of `weight`, with gradients."""
        return self._rounded(self.weight)

    def _rounded(self, weight: torch.Tensor) -> torch.Tensor:
        beside = {n: p for n, p in self._parameters.items() if p is not None and n not in ("weight", "bias")}
        return self.kind.value(weight, self.options, beside)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """In a state dict of the ordinary layer nothing stands beside the weight: it starts from that weight."""
        if (weight := state_dict.get(f"{prefix}weight")) is not None:
            for name, start in self.kind.beside(weight).items():
                state_dict.setdefault(prefix + name, start)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _inputs(self, x: torch.Tensor) -> torch.Tensor:
        """What enters the product."""
        if self.norm is not None:
            x = cast(torch.Tensor, self.norm(x))
        inputs = self.activations
        if inputs is None:
            return x
        if self.options.inputs == "sign":
            return sign(x, at_zero=-1)
        return straight(x, _on_grid(x.detach(), inputs))

    def extra_repr(self) -> str:
        inputs = f", inputs={self.options.inputs}" if self.options.inputs else ""
        return f"{super().extra_repr()}, method={self.method}{inputs}"


class LatentLinear(_Latent, nn.Linear):
    """`y = inputs(x) @ value(weight).T + bias`."""

    def __init__(self, layer: nn.Linear, method: str, options: Options) -> None:
        nn.Module.__init__(self)
        self._become(layer, method, options)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x (…, in) → (…, out)."""
        weight = self.value()
        if self.options.inputs != "sign":
            return F.linear(self._inputs(input), weight, self.bias)
        codes, scale = _apart(weight)
        sums = F.linear(self._inputs(input), codes)
        return _scaled(sums, scale, self.bias)


class LatentConv2d(_Latent, nn.Conv2d):
    """The same of a convolution; a row is the kernel of one output channel."""

    def __init__(self, layer: nn.Conv2d, method: str, options: Options) -> None:
        nn.Module.__init__(self)
        self._become(layer, method, options)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x (…, in, height, width) → (…, out, height, width)."""
        weight = self.value()
        if self.options.inputs != "sign":
            return self._conv_forward(self._inputs(input), weight, self.bias)
        codes, scale = _apart(weight)
        sums = self._conv_forward(self._inputs(input), codes, None)
        return _scaled(sums.movedim(-3, -1), scale, self.bias).movedim(-1, -3)


class LatentEmbedding(_Latent, nn.Embedding):
    """The same of a table; where rows have scales of their own, only those that are looked up are rounded."""

    def __init__(self, layer: nn.Embedding, method: str, options: Options) -> None:
        nn.Module.__init__(self)
        self._become(layer, method, options)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """ids (…) → (…, width)."""
        if not self.options.rows or "weight_2" in self._parameters:
            return F.embedding(input, self.value(), self.padding_idx)
        found = F.embedding(input, self.weight, self.padding_idx)
        return self._rounded(found.flatten(0, -2)).view_as(found)


def _apart(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (m, …) over the largest number of each row, and those (m,).

    Sums of signs are whole numbers then, exact as those of the packed layer: zero stays zero, whose sign the next layer may ask for.
    """
    scale = weight.detach().flatten(1).abs().amax(1)
    scale = torch.where(scale > 0, scale, 1.0)
    return weight / scale.view(-1, *[1] * (weight.ndim - 1)), scale


def _scaled(sums: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(…, m) in the type of the sums, which autocast may have chosen."""
    y = sums * scale
    return (y if bias is None else y + bias).to(sums.dtype)


_CLASSES: Final[tuple[tuple[type[nn.Module], type[_Latent]], ...]] = (
    (nn.Linear, LatentLinear),
    (nn.Conv2d, LatentConv2d),
    (nn.Embedding, LatentEmbedding),
)


def options_of(method: str, **options: Any) -> Options:
    """The options of a method with some of them set.

    Raises:
        SchemeError: no such method, option or value.
    """
    if method not in LATENT:
        raise unknown("method", str(method), LATENT)
    kind = LATENT[method]
    for name in options:
        if name not in kind.takes:
            raise unknown(f"option of {method}", name, kind.takes)
    found = replace(kind.options, **options)
    inputs = found.activations
    if inputs is not None and inputs.outliers is not None:
        raise SchemeError(
            f"Inputs are rounded as a whole while a layer is trained, got {found.inputs!r}. Drop 'outliers'."
        )
    return found


def refuse_latent(layer: nn.Module) -> str | None:
    """Why a layer cannot become latent, as a sentence; None if it can."""
    plain = next((c for c, _ in _CLASSES if isinstance(layer, c)), None)
    if isinstance(layer, _Latent):
        return f"It is trained by {layer.method} already."
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "Attention reads its weight and passes the layer by."
    own = type(layer).forward
    if plain is None or own not in (plain.forward, DenseLinear.forward):
        return f"{type(layer).__name__} computes something else than a linear layer, a convolution or a table."
    weight = layer._parameters.get("weight")
    if weight is None:
        return MADE_OF_OTHERS
    if is_lazy(weight):
        return "It has no weight yet: run one batch before the conversion."
    if not weight.is_floating_point():
        return f"Its weight is of {weight.dtype}."
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.sparse or layer.scale_grad_by_freq):
        return "A table that renormalises its rows, or has sparse or scaled gradients, is not trained in few bits."
    return None


def to_latent(layer: nn.Module, method: str, **options: Any) -> _Latent:
    """A layer that is trained in few bits, in the place of an ordinary one.

    Args:
        layer: nn.Linear, nn.Conv2d or nn.Embedding; its parameters are shared, not copied.
        method: a name of `LATENT`.
        options: see `Options`; those that the method takes.

    Raises:
        SchemeError: another kind of layer, or no such method or option.
    """
    chosen = options_of(method, **options)
    if isinstance(layer, nn.Conv2d) and chosen.inputs == "int8/token" and "inputs" not in options:
        chosen = replace(chosen, inputs="int8/tensor")  # pixels of a window are of several tokens
    if (reason := refuse_latent(layer)) is not None:
        raise SchemeError(f"{reason} Leave this layer in float.")
    if chosen.norm and not isinstance(layer, nn.Linear):
        raise SchemeError(f"A norm stands in front of linear layers, got {type(layer).__name__}. Drop 'norm'.")
    made = cast(Any, next(latent for plain, latent in _CLASSES if isinstance(layer, plain)))
    return cast(_Latent, made(layer, method, chosen))


@torch.no_grad()
def to_plain(layer: _Latent, *, rounded: bool = True, inputs: bool = True) -> nn.Module:
    """An ordinary layer in the place of a latent one.

    Args:
        rounded: with the weight that the latent layer multiplies by, as a parameter of its own; else with the latent weight itself,
            shared, and nothing that was learned beside it.
        inputs: a hook rounds the inputs of a rounded layer as the latent layer does.

    Returns:
        a layer of the class that it was made of; one with a norm of its own is an nn.Sequential of `norm` and `linear`.
    """
    plain, _ = next((p, c) for p, c in _CLASSES if isinstance(layer, c))
    found = plain.__new__(plain)
    nn.Module.__init__(found)
    own = {"_parameters", "_buffers", "_modules", "method", "options", "activations"}
    found.__dict__.update({n: v for n, v in layer.__dict__.items() if n not in own})
    found.__dict__.update(_parameters={}, _buffers=dict(layer._buffers), _modules={})
    keep_hooks(layer, found)
    found._forward_pre_hooks = found._forward_pre_hooks.copy()
    found._forward_pre_hooks_with_kwargs = found._forward_pre_hooks_with_kwargs.copy()
    value = nn.Parameter(layer.value().detach().clone(), requires_grad=layer.weight.requires_grad)
    found._parameters["weight"] = value if rounded else layer._parameters["weight"]
    if "bias" in layer._parameters:
        found._parameters["bias"] = layer._parameters["bias"]
    if not rounded:
        return found
    if inputs and (scheme := layer.scheme.inputs) is not None:
        found.register_forward_pre_hook(RoundedInputs(scheme, layer.input_grid), with_kwargs=True)
    if layer.norm is None:
        return found
    both = nn.Sequential()
    both.add_module("norm", layer.norm)
    both.add_module("linear", found)
    return both.train(layer.training)
