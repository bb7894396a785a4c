"""LightSeq's int8 training of linear layers and of whole Transformer layers, and their integer inference."""

from arrondi.training.lightseq.method import LIGHTSEQ, LightseqOptions

__all__ = ["LIGHTSEQ", "LightseqOptions"]
