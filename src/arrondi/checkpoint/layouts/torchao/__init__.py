"""The layout of torchao's tensor classes, flattened into safetensors files as transformers saves them.

Owns: `LAYOUT`. `notes` is what the metadata of the files says of each tensor, `storage` a layer as tensors, `config` the description of all,
`find` what a file holds.
"""

from __future__ import annotations

from typing import Final

from arrondi.checkpoint.layouts.layout import Layout
from arrondi.checkpoint.layouts.torchao.config import config, metadata
from arrondi.checkpoint.layouts.torchao.find import find
from arrondi.checkpoint.layouts.torchao.storage import fit, read_layer, refuse, specs, write

LAYOUT: Final = Layout("torchao", refuse, specs, write, read_layer, config, find, fit, metadata=metadata)
