"""A model as a chain of blocks: run from disk with one block in memory, one unit at a time."""

from arrondi.model.chain import Chain, find_blocks
from arrondi.model.memory import release
from arrondi.model.precision import DTYPES, bfloat16_pays, stored_in_16_bits
from arrondi.model.skeleton import Skeleton, Slot, build_model
from arrondi.model.spill import Budget
from arrondi.model.store import TreeStore
from arrondi.model.trace import Product, Stage, find_stages, watch_products

__all__ = [
    "DTYPES",
    "Budget",
    "Chain",
    "Product",
    "Skeleton",
    "Slot",
    "Stage",
    "TreeStore",
    "bfloat16_pays",
    "build_model",
    "find_blocks",
    "find_stages",
    "release",
    "stored_in_16_bits",
    "watch_products",
]
