"""ggml's blocks, the layout of GGUF files: `blocks` has the types, `planes` and `ternary` where their bits lie, `coding` what they mean.

Owns: `LAYOUT`.
"""

from __future__ import annotations

from typing import Final

from arrondi.checkpoint.layouts.ggml.blocks import BLOCKS, BlockType, type_of
from arrondi.checkpoint.layouts.ggml.coding import block_type, decode_blocks, encode_blocks
from arrondi.checkpoint.layouts.ggml.layer import config, find, read, refuse, specs, write
from arrondi.checkpoint.layouts.layout import Layout

LAYOUT: Final = Layout("gguf", refuse, specs, write, read, config, find)

__all__ = ["BLOCKS", "LAYOUT", "BlockType", "block_type", "decode_blocks", "encode_blocks", "type_of"]
