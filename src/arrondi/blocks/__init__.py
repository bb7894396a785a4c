"""A model as a chain of blocks, run from disk with one block in memory."""

from arrondi.blocks.chain import Chain, find_blocks
from arrondi.blocks.memory import release
from arrondi.blocks.precision import bfloat16_pays
from arrondi.blocks.skeleton import Skeleton, Slot, build_model
from arrondi.blocks.store import HiddenStore
from arrondi.blocks.trace import Product, Stage, find_stages, watch_products

__all__ = [
    "Chain",
    "HiddenStore",
    "Product",
    "Skeleton",
    "Slot",
    "Stage",
    "bfloat16_pays",
    "build_model",
    "find_blocks",
    "find_stages",
    "release",
    "watch_products",
]
