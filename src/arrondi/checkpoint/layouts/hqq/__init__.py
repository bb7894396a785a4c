"""The layout of HQQ, as its layers save themselves to safetensors files.

Owns: `LAYOUT`. `facts` is what stands beside a layer's codes, `storage` a layer as tensors, `config` the description of all, read and
written, `find` what a file holds.
"""

from __future__ import annotations

from typing import Final

from arrondi.checkpoint.layouts.hqq.config import config
from arrondi.checkpoint.layouts.hqq.find import find
from arrondi.checkpoint.layouts.hqq.storage import read_layer, refuse, specs, write
from arrondi.checkpoint.layouts.layout import Layout

LAYOUT: Final = Layout(
    "hqq", refuse, specs, write, read_layer, config, find, lambda scheme: scheme.with_scale("float16")
)
