"""Schemes: what one tensor becomes, and what one layer becomes.

Owns: `Scheme` (format + granularity + zero point + how the scales are stored), `LayerScheme` (a scheme for the weights
and, optionally, one for the activations), the table `PRESETS` of the field's names, and `parse_scheme`, which also reads
the compact grammar `w=int4/g128/asym,a=int8/token`.

A scheme says nothing of *how* its codes and scales are chosen: that is the method's business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

from arrondi.errors import SchemeError, unknown
from arrondi.formats.format import FORMATS, Format, get_format
from arrondi.formats.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken

ScaleType = Literal["float32", "bfloat16", "float16", "e8m0"]


@dataclass(frozen=True)
class Scheme:
    """What one tensor becomes.

    Attributes:
        format: the number format of the codes.
        granularity: which elements share a scale.
        zero_point: "none" (symmetric), "integer" (asymmetric: zero is a code) or "float" (an offset: x ≈ scale·code + offset).
        scale: storage type of the scales, or a scheme by which the scales are quantized in turn (double quantization,
            NVFP4's fp8 block scales, super-blocks).
    """

    format: Format
    granularity: Granularity = PerChannel()
    zero_point: Literal["none", "integer", "float"] = "none"
    scale: ScaleType | Scheme = "float32"

    def __post_init__(self) -> None:
        if self.zero_point != "none" and self.format.kind != "integer":
            raise SchemeError(
                f"A zero point needs an integer format, got {self.format} with zero_point={self.zero_point!r}. "
                "Drop the zero point: float formats and codebooks have their own zero."
            )
        if self.scale == "e8m0" and self.zero_point != "none":
            raise SchemeError("Power-of-two scales (e8m0) go with symmetric formats only. Set zero_point='none'.")

    @property
    def symmetric(self) -> bool:
        """True when the real zero is not stored."""
        return self.zero_point == "none"

    def __str__(self) -> str:
        match self.granularity:
            case PerTensor():
                where = "tensor"
            case PerChannel(axis):
                where = "channel" if axis == 0 else f"channel{axis}"
            case PerToken():
                where = "token"
            case PerGroup(size):
                where = f"g{size}"
            case PerBlock(rows, columns):
                where = f"b{rows}x{columns}"
        zero = {"none": "", "integer": "/asym", "float": "/offset"}[self.zero_point]
        scale = (
            {"float32": ""}.get(self.scale, f"/{self.scale}") if isinstance(self.scale, str) else f"/s:({self.scale})"
        )
        return f"{self.format}/{where}{zero}{scale}"


@dataclass(frozen=True)
class ActivationScheme:
    """What the inputs or outputs of a layer, or its key/value cache, become.

    Attributes:
        scheme: what each tensor becomes.
        dynamic: True: the scales follow each tensor. False: they are stored (static) and serve every tensor. "local": the
            outer scale of quantized scales is stored, the inner scales follow each tensor (NVFP4).
    """

    scheme: Scheme
    dynamic: bool | Literal["local"] = True

    def __str__(self) -> str:
        return str(self.scheme) + {True: "", False: "/static", "local": "/local"}[self.dynamic]


@dataclass(frozen=True)
class LayerScheme:
    """What one layer becomes: its weights and, unless None, the activations that enter it."""

    weights: Scheme
    activations: Scheme | None = None
    dynamic: bool = True

    def with_scale(self, scale: ScaleType) -> LayerScheme:
        """The same scheme with its plain floating-point weight scales stored in another type."""
        if self.weights.scale in ("float32", "float16", "bfloat16"):
            return replace(self, weights=replace(self.weights, scale=scale))
        return self

    def with_group_size(self, size: int) -> LayerScheme:
        """The same scheme with another group size (-1: one group per output channel).

        Raises:
            SchemeError: the block size belongs to the format (MX, NVFP4).
        """
        if self.weights.scale == "e8m0" or isinstance(self.weights.scale, Scheme):
            raise SchemeError(f"The block size of {self.weights} is fixed by the format. Drop --group-size.")
        granularity = PerChannel() if size == -1 else PerGroup(size)
        return replace(self, weights=replace(self.weights, granularity=granularity))

    def __str__(self) -> str:
        return f"w={self.weights}" + (
            f",a={self.activations}{'' if self.dynamic else '/static'}" if self.activations else ""
        )


def _int(bits: int, granularity: Granularity, zero_point: Literal["none", "integer", "float"] = "none") -> Scheme:
    return Scheme(FORMATS[f"int{bits}"], granularity, zero_point)


_F8, _F4 = FORMATS["fp8_e4m3"], FORMATS["fp4_e2m1"]
_TOKEN8 = Scheme(FORMATS["int8"], PerToken())
_NV = Scheme(_F4, PerGroup(16), scale=Scheme(_F8, PerTensor()))
_MX4 = Scheme(_F4, PerGroup(32), scale="e8m0")
_MX8 = Scheme(_F8, PerGroup(32), scale="e8m0")
_G = PerGroup(128)

PRESETS: Final[Mapping[str, LayerScheme]] = MappingProxyType({
    **{f"W{b}A16": LayerScheme(_int(b, _G)) for b in range(2, 9)},
    **{f"W{b}A16_ASYM": LayerScheme(_int(b, _G, "integer")) for b in range(2, 8)},
    "W8A8": LayerScheme(_int(8, PerChannel()), _TOKEN8),
    "W4A8": LayerScheme(_int(4, _G), _TOKEN8),
    "W4AFP8": LayerScheme(_int(4, _G), Scheme(_F8, PerToken())),
    "FP8_DYNAMIC": LayerScheme(Scheme(_F8, PerChannel()), Scheme(_F8, PerToken())),
    "FP8A16": LayerScheme(Scheme(_F8, PerChannel())),
    "FP8_BLOCK": LayerScheme(Scheme(_F8, PerBlock(128, 128)), Scheme(_F8, PerGroup(128))),
    "MXFP4": LayerScheme(_MX4, _MX4),
    "MXFP4A16": LayerScheme(_MX4),
    "MXFP8": LayerScheme(_MX8, _MX8),
    "MXFP8A16": LayerScheme(_MX8),
    "MXFP6": LayerScheme(Scheme(FORMATS["fp6_e3m2"], PerGroup(32), scale="e8m0")),
    "NVFP4A16": LayerScheme(_NV),
    "NF4": LayerScheme(Scheme(FORMATS["nf4"], PerGroup(64))),
    "FP4": LayerScheme(Scheme(_F4, PerGroup(64))),
    "TERNARY": LayerScheme(Scheme(FORMATS["ternary"], PerChannel())),
    "T158": LayerScheme(Scheme(FORMATS["ternary"], PerTensor())),
    "BINARY": LayerScheme(Scheme(FORMATS["binary"], PerGroup(128))),
})  # fmt: skip
"""The field's names, with the meaning that compressed-tensors gives them where it has the name."""

_ALIASES: Final = {"INT8": "W8A8", "INT8_DYNAMIC": "W8A8"}

_PART = re.compile(r"g(\d+)|b(\d+)x(\d+)|channel(\d+)")


def parse_scheme(text: str) -> LayerScheme:
    """A preset's name, in any case, or the compact grammar.

    The grammar: `w=FORMAT/PART/…` and optionally `,a=FORMAT/PART/…`, where a part is `g128`, `b128x128`, `channel`
    (`channel1`: of axis 1), `tensor` or `token` (granularity), `sym`, `asym` or `offset` (zero point), `float32`, `bfloat16`, `float16` or `e8m0`
    (storage of the scales), `dynamic` or `static` (activations).

    >>> str(parse_scheme("w4a16")), str(parse_scheme("w=int3/g64/asym,a=int8/token/dynamic"))
    ('w=int4/g128', 'w=int3/g64/asym,a=int8/token')

    Raises:
        SchemeError: neither a preset nor the grammar; the message names the nearest preset.
    """
    name = text.strip().upper().replace("-", "_")
    name = _ALIASES.get(name, name)
    if name in PRESETS:
        return PRESETS[name]
    if "=" not in text:
        raise unknown("scheme", text, PRESETS)
    items = [_split(item, text) for item in text.split(",")]
    parts = dict(items)
    if "w" not in parts or parts.keys() - {"w", "a"} or len(parts) < len(items):
        raise SchemeError(
            f"A scheme has 'w=…' and optionally 'a=…', got {text!r}. Example: w=int4/g128/asym,a=int8/token."
        )
    weights, _ = _parse_tensor(parts["w"], PerChannel(), text)
    if "a" not in parts:
        return LayerScheme(weights)
    activations, dynamic = _parse_tensor(parts["a"], PerToken(), text)
    return LayerScheme(weights, activations, dynamic)


def parse_activations(text: str) -> Scheme:
    """The scheme of activations alone, without `a=`; scales follow each input.

    >>> parse_activations("int8/g128").granularity
    PerGroup(size=128)

    Raises:
        SchemeError: not in the grammar of `parse_scheme`, or it asks for static scales.
    """
    if not text.strip() or "," in text or "=" in text:
        raise SchemeError(f"Activations are written as FORMAT/PART/…, got {text!r}. Example: int8/g128.")
    scheme, dynamic = _parse_tensor(text.strip().lower(), PerToken(), text)
    if not dynamic:
        raise SchemeError(f"Scales of activations follow each input here, got {text!r}. Drop 'static'.")
    return scheme


def _split(item: str, text: str) -> tuple[str, str]:
    key, _, value = item.strip().partition("=")
    if not value:
        raise SchemeError(f"Cannot read {item!r} in scheme {text!r}. Example: w=int4/g128/asym,a=int8/token.")
    return key.strip().lower(), value.strip().lower()


def _parse_tensor(text: str, granularity: Granularity, whole: str) -> tuple[Scheme, bool]:
    head, *parts = text.split("/")
    scheme, dynamic = Scheme(get_format(head), granularity), True
    words: dict[str, dict[str, object]] = {
        "channel": {"granularity": PerChannel()}, "tensor": {"granularity": PerTensor()}, "token": {"granularity": PerToken()},
        "sym": {"zero_point": "none"}, "asym": {"zero_point": "integer"}, "offset": {"zero_point": "float"},
        "float32": {"scale": "float32"}, "bfloat16": {"scale": "bfloat16"}, "float16": {"scale": "float16"}, "e8m0": {"scale": "e8m0"},
    }  # fmt: skip
    for part in parts:
        match = _PART.fullmatch(part)
        if match and match[1]:
            scheme = replace(scheme, granularity=PerGroup(int(match[1])))
        elif match and match[2]:
            scheme = replace(scheme, granularity=PerBlock(int(match[2]), int(match[3])))
        elif match and match[4]:
            scheme = replace(scheme, granularity=PerChannel(int(match[4])))
        elif part in ("dynamic", "static"):
            dynamic = part == "dynamic"
        elif part in words:
            scheme = replace(scheme, **words[part])  # type: ignore[arg-type]
        else:
            raise unknown(f"word in scheme {whole!r}:", part, [*words, "g128", "b128x128", "dynamic", "static"])
    return scheme, dynamic
