"""A model directory, plain or quantized, whose tensors are named as in the unquantized original.

Owns: `Checkpoint`: files through their layout, lazily, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from arrondi.checkpoint.containers.model_dir import ModelDir
from arrondi.checkpoint.foreign import unlisted, what_method
from arrondi.checkpoint.layouts import LAYOUTS
from arrondi.checkpoint.layouts.layout import LayerValues, Layout, Placed
from arrondi.checkpoint.method import method_of
from arrondi.checkpoint.sidecar import with_sidecar
from arrondi.errors import ArrondiError, FileFormatError, SchemeError
from arrondi.formats import ActivationScheme, parse_activations
from arrondi.rewrite.spread import unspread
from arrondi.tensor.qtensor import QTensor


@dataclass(frozen=True)
class Checkpoint:
    """A checked model directory; `read` gives a Tensor or a QTensor.

    Attributes:
        folder: the files.
        layout: how quantized tensors are stored; None if nothing is quantized.
        placed: every quantized layer by the original name of its weight.
        activations: how the inputs of a quantized layer are rounded whose own scheme leaves them alone; None: they stay.
    """

    folder: ModelDir
    layout: Layout | None = None
    placed: Mapping[str, Placed] = field(default_factory=dict)
    activations: ActivationScheme | None = None

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a directory, quantized or not.

        Raises:
            FileFormatError: not a model, a file that lies, or a quantization that no layout here reads.
        """
        folder = with_sidecar(ModelDir.open(path))
        layout = _layout(folder)
        if layout is None:
            return cls(folder)
        names = {n: (e.dtype, e.shape) for n, e in folder.entries.items()}
        with _described(folder):
            found = {p.name: p for p in layout.find(folder.config, names, folder.read)}
            _check_stored(layout, found, folder)
        return cls(folder, layout, found)

    def rounding(self, activations: str | ActivationScheme | None) -> Checkpoint:
        """The same directory, with the inputs of its weight-only tensors rounded by `activations` (`"int8/g128"`).

        Raises:
            SchemeError: not the grammar of activations, or there is no tensor that is quantized and leaves its input alone.
        """
        if activations is None:
            return self
        scheme = parse_activations(activations) if isinstance(activations, str) else activations
        if all(p.scheme.inputs for p in self.placed.values()):
            why = "its own schemes round them" if self.placed else "it is not quantized"
            raise SchemeError(f"{self.folder.path}: no activations can be rounded to {scheme}: {why}. Leave them out.")
        return replace(self, activations=scheme)

    def inputs_of(self, name: str) -> ActivationScheme | None:
        """How the inputs of a quantized layer are rounded when they are multiplied."""
        return self.placed[name].scheme.inputs or self.activations

    @property
    def quantized(self) -> bool:
        """Whether some tensors are stored in few bits: a layout says what they mean, or they are `lattices`."""
        return self.layout is not None or bool(self.lattices)

    @property
    def lattices(self) -> dict[str, str]:
        """Tensors that are read as numbers though they are stored in few bits → the type of their blocks."""
        return {n: e.lattice for n, e in self.folder.entries.items() if e.lattice}

    @cached_property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by its original name."""
        if self.layout is None:
            return {n: e.shape for n, e in self.folder.entries.items()}
        stored = {name for p in self.placed.values() for name, _, _ in self.layout.specs(p)}
        plain = {n: e.shape for n, e in self.folder.entries.items() if n not in stored}
        return plain | {p.name: p.shape for p in self.placed.values()}

    def layer(self, name: str) -> LayerValues:
        """All numbers of a quantized layer.

        Raises:
            FileFormatError: a stored number cannot be: a code outside its format, a scale that is not finite, …
        """
        assert self.layout is not None
        with _described(self.folder):
            return self.layout.read(self.placed[name], self.folder.read)

    def read(self, name: str) -> torch.Tensor | QTensor:
        """One tensor; a QTensor (a matrix (out, in), also for stacks) if it is stored quantized.

        Raises:
            FileFormatError: as `layer`.
        """
        return self.layer(name).weight if name in self.placed else self.folder.read(name)

    def dense(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """One tensor as ordinary numbers in its original shape and orientation. Integers and booleans keep their type."""
        value = self.read(name)
        if isinstance(value, QTensor):
            return self.placed[name].restored(value.dequantize(dtype))
        return value.to(dtype) if value.dtype.is_floating_point else value

    def plain(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """As `dense`, for a model that does not spread inputs."""
        placed = self.placed.get(name)
        if placed is None or placed.scheme.inputs is None or not placed.scheme.inputs.spread:
            return self.dense(name, dtype)
        weight = self.layer(name).weight.dequantize()
        return placed.restored(unspread(weight, placed.scheme.inputs.spread).to(dtype))

    def verify(self) -> None:
        """Read every quantized layer and check its numbers.

        Raises:
            FileFormatError: as `layer`.
        """
        for name in self.placed:
            self.layer(name)


def _layout(folder: ModelDir) -> Layout | None:
    """The layout that config.json names; None for a directory that is not quantized."""
    method = method_of(folder.config, folder.entries)
    if isinstance(method, str) and method in LAYOUTS:
        return LAYOUTS[method]
    what = what_method(folder.config) or unlisted(folder.path, folder.entries)
    if what:
        raise FileFormatError(f"{folder.path}: {what}.")
    return None


@contextmanager
def _described(folder: ModelDir) -> Iterator[None]:
    """Puts the directory in front of what a layout says of its config and tensors."""
    try:
        yield
    except ArrondiError as error:
        if str(error).startswith(str(folder.path)):
            raise
        raise FileFormatError(f"{folder.path}: its quantization cannot be read: {error}") from error


def _check_stored(layout: Layout, placed: Mapping[str, Placed], folder: ModelDir) -> None:
    """Every tensor of every layer is there, of its type and shape, and belongs to one layer."""
    consumed: set[str] = set()
    for p in placed.values():
        for name, dtype, shape in layout.specs(p):
            entry = folder.entries.get(name)
            if entry is None or entry.shape != shape or entry.torch_dtype != dtype:
                have = f"{entry.dtype} {entry.shape}" if entry else "nothing"
                raise FileFormatError(
                    f"{name} should be {dtype} {shape}, found {have}. The config does not describe these files."
                )
            if name in consumed:
                raise FileFormatError(f"{name} belongs to two layers.")
            consumed.add(name)
