"""Number formats, granularities and schemes: floor 0, plain data that imports neither torch nor NumPy."""

from arrondi.formats.format import FORMATS, Format, codebook, dynamic_levels, get_format, integer, look_up
from arrondi.formats.grammar import parse_activations, parse_scheme
from arrondi.formats.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerFlat,
    PerGroup,
    PerRun,
    PerTensor,
    PerToken,
    scale_shape,
    tile_shape,
)
from arrondi.formats.presets import PRESETS
from arrondi.formats.scheme import ActivationScheme, Apart, Dynamic, LayerScheme, Scheme, Table, Turned
from arrondi.formats.trellis import Trellis

__all__ = [
    "FORMATS",
    "PRESETS",
    "ActivationScheme",
    "Apart",
    "Dynamic",
    "Format",
    "Granularity",
    "LayerScheme",
    "PerBlock",
    "PerChannel",
    "PerFlat",
    "PerGroup",
    "PerRun",
    "PerTensor",
    "PerToken",
    "Scheme",
    "Table",
    "Trellis",
    "Turned",
    "codebook",
    "dynamic_levels",
    "get_format",
    "integer",
    "look_up",
    "parse_activations",
    "parse_scheme",
    "scale_shape",
    "tile_shape",
]
