"""Modules that hold packed weights: `QLinear` and `QStack`."""

from arrondi.nn.linear import PackedWeight, QLinear
from arrondi.nn.stack import QStack, replace_parameter

__all__ = ["PackedWeight", "QLinear", "QStack", "replace_parameter"]
