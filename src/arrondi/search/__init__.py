"""Looking for the best way to quantize a model: `compare_methods`, which tries several and says which to take."""

from arrondi.search.compare import compare_methods

__all__ = ["compare_methods"]
