"""A model as a chain of blocks: run from disk with one block in memory, or loaded, in few compiled calls a block."""

from arrondi.blocks.chain import Chain, find_blocks
from arrondi.blocks.fused import fuse, is_fused
from arrondi.blocks.memory import release
from arrondi.blocks.precision import bfloat16_pays, stored_in_16_bits
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
    "fuse",
    "is_fused",
    "release",
    "stored_in_16_bits",
    "watch_products",
]
