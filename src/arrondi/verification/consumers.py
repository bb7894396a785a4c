"""Who runs what is written here, and how they are asked: the table `CONSUMERS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from arrondi.checkpoint.other_readers import packages_for

NETWORK: Final = "onnx"
"""What a network of ONNX operators is called where others have the name of a layout."""
PLAIN: Final = "plain"
"""A model directory without quantized layers."""


@dataclass(frozen=True)
class Consumer:
    """A program that reads files.

    Attributes:
        name: as in `--with`.
        package: what is installed to have it.
        script: which of `scripts` asks it.
        layouts: what it reads, by name; None: whatever `packages_for` knows, and plain directories.
    """

    name: str
    package: str
    script: str
    layouts: tuple[str, ...] | None

    def takes(self, layout: str) -> bool:
        """Whether it reads a layout at all."""
        if self.layouts is None:
            return layout == PLAIN or packages_for(layout) is not None
        return layout in self.layouts

    def packages(self, layout: str) -> tuple[str, ...]:
        """What must be installed for a layout."""
        return (self.package, *((packages_for(layout) or ()) if self.layouts is None else ()))


CONSUMERS: Final[Mapping[str, Consumer]] = MappingProxyType({
    c.name: c
    for c in (
        Consumer("transformers", "transformers", "ask_transformers.py", None),
        Consumer("llama.cpp", "llama-cpp-python", "ask_llama_cpp.py", ("gguf",)),
        Consumer("onnxruntime", "onnxruntime", "ask_onnxruntime.py", (NETWORK,)),
        Consumer("openvino", "openvino", "ask_openvino.py", (NETWORK,)),
    )
})  # fmt: skip
"""Every consumer by its name."""
