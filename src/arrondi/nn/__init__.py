"""Modules that hold packed weights (`QLinear`, `QStack`, `QEmbedding`), and the ordinary ones beside them (`DenseLinear`)."""

from arrondi.nn.dense import DenseLinear
from arrondi.nn.embedding import QEmbedding
from arrondi.nn.linear import PackedWeight, QLinear, joined_product
from arrondi.nn.stack import QStack, replace_parameter

__all__ = ["DenseLinear", "PackedWeight", "QEmbedding", "QLinear", "QStack", "joined_product", "replace_parameter"]
