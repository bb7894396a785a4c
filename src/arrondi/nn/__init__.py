"""Modules that hold packed weights (`QLinear`, `QConv`, `QStack`, `QEmbedding`), and the ordinary ones beside them
(`DenseLinear`, `RoundedInputs`)."""

from arrondi.nn.conv import QConv, conv_matrix, conv_weight
from arrondi.nn.dense import DenseLinear
from arrondi.nn.embedding import QEmbedding, factor_of, refuse_table
from arrondi.nn.inputs import RoundedInputs
from arrondi.nn.linear import QLinear, joined_product
from arrondi.nn.packed import PackedWeight, keep_hooks
from arrondi.nn.stack import QStack, replace_parameter

__all__ = [
    "DenseLinear",
    "PackedWeight",
    "QConv",
    "QEmbedding",
    "QLinear",
    "QStack",
    "RoundedInputs",
    "conv_matrix",
    "conv_weight",
    "factor_of",
    "joined_product",
    "keep_hooks",
    "refuse_table",
    "replace_parameter",
]
