"""Schemes that have a name: the field's presets and other spellings of them.

Owns: `PRESETS` and `ALIASES`. Where compressed-tensors has the name, the meaning is its own; `ggml` has those of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from arrondi.formats.format import FORMATS, TRELLISES, of_trellis
from arrondi.formats.ggml import GGML
from arrondi.formats.granularity import Granularity, PerBlock, PerChannel, PerFlat, PerGroup, PerTensor, PerToken
from arrondi.formats.scheme import ActivationScheme, LayerScheme, Scheme, Turned, ZeroPoint
from arrondi.formats.trellis import Trellis


def _int(bits: int, granularity: Granularity, zero_point: ZeroPoint = "none") -> Scheme:
    return Scheme(FORMATS[f"int{bits}"], granularity, zero_point)


_F8, _F4 = FORMATS["fp8_e4m3"], FORMATS["fp4_e2m1"]
_TOKEN8 = ActivationScheme(Scheme(FORMATS["int8"], PerToken()))
_NV = Scheme(_F4, PerGroup(16), scale=Scheme(_F8, PerTensor()))
_MX4 = Scheme(_F4, PerGroup(32), scale="e8m0")
_MX8 = Scheme(_F8, PerGroup(32), scale="e8m0")
_DQ = Scheme(FORMATS["dynamic8"], PerFlat(256), "float", offset=Scheme(FORMATS["binary"], PerTensor()))
"""Block scales of bitsandbytes' double quantization: less their mean, in 8 bits, a float32 for every 256."""
_G = PerGroup(128)

PRESETS: Final[Mapping[str, LayerScheme]] = MappingProxyType({
    **{f"W{b}A16": LayerScheme(_int(b, _G)) for b in range(2, 9)},
    **{f"W{b}A16_ASYM": LayerScheme(_int(b, _G, "integer")) for b in range(2, 8)},
    "W8A8": LayerScheme(_int(8, PerChannel()), _TOKEN8),
    "W8A8_STATIC": LayerScheme(_int(8, PerChannel()), ActivationScheme(_int(8, PerTensor()), False)),
    "W4A8": LayerScheme(_int(4, _G), _TOKEN8),
    **{f"W{b}A{b}": LayerScheme(_int(b, _G), ActivationScheme(_int(b, PerToken()))) for b in (3, 4, 6)},
    "W4AFP8": LayerScheme(_int(4, _G), ActivationScheme(Scheme(_F8, PerToken()))),
    "FP8": LayerScheme(Scheme(_F8, PerTensor()), ActivationScheme(Scheme(_F8, PerTensor()), False)),
    "FP8_DYNAMIC": LayerScheme(Scheme(_F8, PerChannel()), ActivationScheme(Scheme(_F8, PerToken()))),
    "FP8A16": LayerScheme(Scheme(_F8, PerChannel())),
    "FP8_BLOCK": LayerScheme(Scheme(_F8, PerBlock(128, 128)), ActivationScheme(Scheme(_F8, PerGroup(128)))),
    "MXFP4": LayerScheme(_MX4, ActivationScheme(_MX4)),
    "MXFP4A16": LayerScheme(_MX4),
    "MXFP8": LayerScheme(_MX8, ActivationScheme(_MX8)),
    "MXFP8A16": LayerScheme(_MX8),
    "MXFP6": LayerScheme(Scheme(FORMATS["fp6_e3m2"], PerGroup(32), scale="e8m0")),
    "NVFP4": LayerScheme(_NV, ActivationScheme(_NV, "local")),
    "NVFP4A16": LayerScheme(_NV),
    "NF4": LayerScheme(Scheme(FORMATS["nf4"], PerGroup(64))),
    "NF4_DQ": LayerScheme(Scheme(FORMATS["nf4"], PerGroup(64), scale=_DQ)),
    "FP4_BNB": LayerScheme(Scheme(FORMATS["fp4_bnb"], PerGroup(64))),
    "FP4_BNB_DQ": LayerScheme(Scheme(FORMATS["fp4_bnb"], PerGroup(64), scale=_DQ)),
    "FP4": LayerScheme(Scheme(_F4, PerGroup(64))),
    "TERNARY": LayerScheme(Scheme(FORMATS["ternary"], PerChannel())),
    "T158": LayerScheme(Scheme(FORMATS["ternary"], PerTensor())),
    "BINARY": LayerScheme(Scheme(FORMATS["binary"], PerGroup(128))),
    **{name.upper(): LayerScheme(Scheme(f, PerChannel(), scale="float16", turned=Turned())) for name, f in TRELLISES.items()},
    **{
        f"{name.upper()}S": LayerScheme(Scheme(of_trellis(replace(f.trellis, ring="square")), PerChannel(), scale="float16", turned=Turned()))
        for name, f in TRELLISES.items() if f.trellis is not None
    },
    **{
        f"EXL3_{bits}": LayerScheme(Scheme(of_trellis(Trellis(float(bits), 16, "mul1", "tile")), PerTensor(), turned=Turned(128, None)))
        for bits in range(1, 9)
    },
    **{name: LayerScheme(scheme) for name, scheme in GGML.items()},
})  # fmt: skip
"""Every scheme that has a name."""

ALIASES: Final[Mapping[str, str]] = MappingProxyType(
    {"INT8": "W8A8", "INT8_DYNAMIC": "W8A8", "INT8_STATIC": "W8A8_STATIC"}
)
"""Other names of presets."""
