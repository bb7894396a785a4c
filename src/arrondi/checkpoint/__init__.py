"""Files ↔ named tensors and QTensors, lazily, one tensor at a time.

Owns: the table `LAYOUTS`, and `Checkpoint`: a model directory, plain or quantized, read through its layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch

from arrondi.checkpoint.containers.disk import (
    digest_of,
    digest_pieces,
    file_sha256,
    guard_disk,
    side_by_side,
    sync_folder,
)
from arrondi.checkpoint.containers.json_file import read_report, write_config, write_json
from arrondi.checkpoint.containers.model_dir import ModelDir
from arrondi.checkpoint.containers.tensor_file import Entry, read_header, read_tensor
from arrondi.checkpoint.containers.writer import ShardPlan, ShardWriter, TensorSpec, shard_digest
from arrondi.checkpoint.layouts import compressed_tensors, packed
from arrondi.checkpoint.layouts.layout import Layout, Placed
from arrondi.errors import ArrondiError, FileFormatError, SchemeError, unknown
from arrondi.formats import Scheme, parse_activations
from arrondi.tensor.qtensor import QTensor

LAYOUTS: Final[Mapping[str, Layout]] = MappingProxyType({
    "compressed-tensors": compressed_tensors.LAYOUT,
    "arrondi": packed.LAYOUT,
})  # fmt: skip
"""Every storage layout, the most widely read first."""


@dataclass(frozen=True)
class Checkpoint:
    """A model directory whose tensors are named as in the unquantized original; `read` gives a Tensor or a QTensor.

    Attributes:
        activations: how the input of a quantized tensor is rounded whose own scheme leaves it alone; None: it stays.
    """

    folder: ModelDir
    layout: Layout | None = None
    placed: Mapping[str, Placed] = field(default_factory=dict)
    activations: Scheme | None = None

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a directory, quantized or not.

        Raises:
            FileFormatError: not a model, a file that lies, or a quantization that no layout here reads.
        """
        folder = ModelDir.open(path)
        config = folder.config.get("quantization_config")
        if config is None:
            return cls(folder)
        method = config.get("quant_method") if isinstance(config, dict) else None
        if not isinstance(method, str) or method not in LAYOUTS:
            raise FileFormatError(str(unknown(f"quantization of {folder.path}:", str(method), LAYOUTS)))
        layout = LAYOUTS[method]
        names = {n: (e.dtype, e.shape) for n, e in folder.entries.items()}
        try:
            found = {p.name: p for p in layout.find(config, names, folder.read)}
            specs = [spec for p in found.values() for spec in layout.specs(p)]
        except (ArrondiError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, re.error) as error:
            if isinstance(error, FileFormatError) and str(error).startswith(str(folder.path)):
                raise
            reason = str(error) if isinstance(error, ArrondiError) else f"{type(error).__name__}: {error}."
            raise FileFormatError(f"{folder.path}: its quantization cannot be read. {reason}") from error
        for name, dtype, shape in specs:
            entry = folder.entries.get(name)
            if entry is None or entry.shape != shape or not _alike(entry.torch_dtype, dtype):
                have = f"{entry.dtype} {entry.shape}" if entry else "nothing"
                raise FileFormatError(
                    f"{folder.path}: {name} should be {dtype} {shape}, found {have}. The config does not describe these files."
                )
        return cls(folder, layout, found)

    def rounding(self, activations: str | Scheme | None) -> Checkpoint:
        """The same directory, with the inputs of its weight-only tensors rounded by `activations` (`"int8/g128"`).

        Raises:
            SchemeError: not the grammar of activations, or there is no tensor that is quantized and leaves its input alone.
        """
        if activations is None:
            return self
        scheme = parse_activations(activations).scheme if isinstance(activations, str) else activations
        if all(p.scheme.inputs for p in self.placed.values()):
            why = "its own schemes round them" if self.placed else "it is not quantized"
            raise SchemeError(f"{self.folder.path}: no activations can be rounded to {scheme}: {why}. Leave them out.")
        return replace(self, activations=scheme)

    def activations_of(self, name: str) -> Scheme | None:
        """How the input of a quantized tensor is rounded when they are multiplied."""
        inputs = self.placed[name].scheme.inputs
        return self.activations if inputs is None else inputs.scheme

    @property
    def quantized(self) -> bool:
        return self.layout is not None

    @cached_property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by its original name."""
        if self.layout is None:
            return {n: e.shape for n, e in self.folder.entries.items()}
        stored = {name for p in self.placed.values() for name, _, _ in self.layout.specs(p)}
        plain = {n: e.shape for n, e in self.folder.entries.items() if n not in stored}
        return plain | {p.name: p.shape for p in self.placed.values()}

    def read(self, name: str) -> torch.Tensor | QTensor:
        """One tensor; a QTensor (a matrix, also for stacks) if it is stored quantized."""
        if self.layout is not None and name in self.placed:
            return self.layout.read(self.placed[name], self.folder.read)
        return self.folder.read(name)

    def dense(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """One tensor as ordinary numbers in its original shape. Integers and booleans keep their type."""
        value = self.read(name)
        if isinstance(value, QTensor):
            return value.dequantize(dtype).reshape(self.placed[name].shape)
        return value.to(dtype) if value.dtype.is_floating_point else value


def _alike(have: torch.dtype, want: torch.dtype) -> bool:
    """Whether stored elements are of the type wanted; bytes may be called int8, uint8 or float8."""
    return have == want or have.itemsize == want.itemsize == 1


__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "Entry",
    "Layout",
    "ModelDir",
    "Placed",
    "ShardPlan",
    "ShardWriter",
    "TensorSpec",
    "digest_of",
    "digest_pieces",
    "file_sha256",
    "guard_disk",
    "read_header",
    "read_report",
    "read_tensor",
    "shard_digest",
    "side_by_side",
    "sync_folder",
    "write_config",
    "write_json",
]
