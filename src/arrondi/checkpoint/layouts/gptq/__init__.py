"""The layout of GPTQModel, AutoGPTQ and optimum, which transformers (with gptqmodel), vLLM and SGLang read.

Owns: `LAYOUT`. `storage` is a layer as tensors, `config` the description of all, read and written, `find` what a file holds.
"""

from __future__ import annotations

from typing import Final

from arrondi.checkpoint.layouts.gptq.config import config, together
from arrondi.checkpoint.layouts.gptq.find import find
from arrondi.checkpoint.layouts.gptq.storage import read_layer, refuse, specs, write
from arrondi.checkpoint.layouts.layout import Layout

LAYOUT: Final = Layout(
    "gptq", refuse, specs, write, read_layer, config, find, lambda scheme: scheme.with_scale("float16"), together
)
