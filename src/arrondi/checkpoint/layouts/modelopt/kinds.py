"""ModelOpt's algorithms and the schemes that they are.

Owns: `KINDS`, `kind_of` and `scheme_of`. A word says what weights and inputs become; the size of groups stands beside it, or follows from the
shapes that are stored. "mxfp4" is said of rounded inputs as of plain ones, so it is read as weights alone.

Source: modelopt 0.47, `torch/export/quant_utils.py` (`get_quantization_format`, `process_layer_quant_config`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from arrondi.formats import FORMATS, ActivationScheme, LayerScheme, PerBlock, PerChannel, PerGroup, PerTensor, Scheme
from arrondi.formats.presets import PRESETS

_INT8: Final = Scheme(FORMATS["int8"], PerChannel())


@dataclass(frozen=True)
class Kind:
    """One algorithm.

    Attributes:
        word: as the package writes it; read in any case.
        scheme: what it is; groups of integers are of any size.
        grouped: the config says the size of groups.
    """

    word: str
    scheme: LayerScheme
    grouped: bool = False

    def sized(self, size: int) -> LayerScheme:
        """The scheme with groups of another size, where they are of any."""
        weights = self.scheme.weights
        if self.word != "W4A16_AWQ":
            return self.scheme
        return replace(self.scheme, weights=replace(weights, granularity=PerGroup(size)))


_ALL: Final = (
    Kind("FP8", PRESETS["FP8"]),
    Kind("FP8_PER_CHANNEL_PER_TOKEN", PRESETS["FP8_DYNAMIC"]),
    Kind("fp8_pb_wo", LayerScheme(Scheme(FORMATS["fp8_e4m3"], PerBlock(128, 128)))),
    Kind("W4A16_AWQ", LayerScheme(Scheme(FORMATS["int4"], PerGroup(128))), True),
    Kind("W8A16", LayerScheme(_INT8)),
    Kind(
        "W8A8_SQ_PER_CHANNEL",
        LayerScheme(_INT8, ActivationScheme(Scheme(FORMATS["int8"], PerTensor()), False)),
    ),
    Kind("NVFP4", PRESETS["NVFP4"], True),
    Kind("W4A16_NVFP4", PRESETS["NVFP4A16"], True),
    Kind("mxfp4", PRESETS["MXFP4A16"]),
    Kind("MXFP8", PRESETS["MXFP8"], True),
)
KINDS: Final[Mapping[str, Kind]] = MappingProxyType({kind.word.lower(): kind for kind in _ALL})
"""Every algorithm that is read and written, by its word in small letters."""


def kind_of(scheme: LayerScheme) -> Kind | None:
    """The algorithm that a layer's scheme is, if there is one."""
    granularity = scheme.weights.granularity
    size = granularity.size if isinstance(granularity, PerGroup) else 0
    return next((kind for kind in _ALL if (size > 0 and kind.sized(size) == scheme) or kind.scheme == scheme), None)
