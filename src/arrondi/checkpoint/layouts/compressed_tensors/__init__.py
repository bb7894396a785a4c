"""The compressed-tensors layout, which transformers (with the compressed-tensors package), vLLM and SGLang read.

Owns: `LAYOUT`. `storage` has a table of how each format keeps a weight, `activations` the static scales, `layer` both together; `args`
is one side of a config group both ways, `config` what is written, `reading`, `matching` and `find` what is read.
"""

from __future__ import annotations

from typing import Final

from arrondi.checkpoint.layouts.compressed_tensors.config import config, refuse
from arrondi.checkpoint.layouts.compressed_tensors.find import find
from arrondi.checkpoint.layouts.compressed_tensors.layer import read_layer, specs, write
from arrondi.checkpoint.layouts.layout import Layout

LAYOUT: Final = Layout("compressed-tensors", refuse, specs, write, read_layer, config, find)
