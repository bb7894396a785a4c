"""LightSeq's int8 training of linear layers and of whole Transformer layers, and their integer inference."""

from arrondi.training.lightseq.integer import IntegerLinear, to_integers
from arrondi.training.lightseq.layers import LightSeqDecoderLayer, LightSeqEncoderLayer, use_lightseq_layers
from arrondi.training.lightseq.method import LIGHTSEQ, LightseqOptions

__all__ = [
    "LIGHTSEQ",
    "IntegerLinear",
    "LightSeqDecoderLayer",
    "LightSeqEncoderLayer",
    "LightseqOptions",
    "to_integers",
    "use_lightseq_layers",
]
