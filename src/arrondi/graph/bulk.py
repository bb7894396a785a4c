"""An ONNX file whose constants are made one at a time while it is written: `write_bulk`.

Owns: `Bulk`. Together more than `APART` bytes lie in a file beside it, so that neither the format's two gigabytes nor memory are a limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from arrondi.checkpoint import guard_disk
from arrondi.errors import OutputError
from arrondi.graph.read import onnx_package
from arrondi.graph.write import beside

APART: Final = 256 << 20
"""Bytes of constants that stay inside the file."""
_SMALL: Final = 1024
_ALIGNED: Final = 4096


@dataclass(frozen=True)
class Bulk:
    """A constant that is not made yet.

    Attributes:
        dims, data_type: as a TensorProto has them.
        nbytes: what it will take.
        make: gives its bytes.
    """

    name: str
    dims: tuple[int, ...]
    data_type: int
    nbytes: int
    make: Callable[[], bytes]


def write_bulk(model: Any, constants: list[Bulk], path: Path, *, overwrite: bool = False, apart: int = APART) -> int:
    """Write a model with these constants besides those that it has.

    Args:
        model: an `onnx.ModelProto`; its initializers are small.
        path: of the file; `beside(path)` holds what lies apart.

    Returns:
        bytes of both files.

    Raises:
        OutputError: something is there, or the disk is full.
    """
    check_onnx_file(path, overwrite)
    helper = onnx_package().external_data_helper
    large = sum(b.nbytes for b in constants) > apart
    data, other = path.with_name(f".{beside(path).name}.part"), path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with guard_disk(path.parent):
            with data.open("wb") as file:
                for one in constants:
                    tensor = model.graph.initializer.add(name=one.name, dims=one.dims, data_type=one.data_type)
                    raw = one.make()
                    assert len(raw) == one.nbytes, f"{one.name}: {len(raw)} bytes do not fill {one.nbytes}"
                    tensor.raw_data = raw
                    if large and one.nbytes >= _SMALL:
                        file.write(b"\0" * (-file.tell() % _ALIGNED))
                        helper.set_external_data(tensor, beside(path).name, file.tell(), len(raw))
                        tensor.ClearField("raw_data")
                        file.write(raw)
            other.write_bytes(model.SerializeToString())
            nbytes = other.stat().st_size + (data.stat().st_size if large else 0)
            if large:
                os.replace(data, beside(path))
            os.replace(other, path)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{path} cannot be written ({error.strerror}).") from error
    finally:
        data.unlink(missing_ok=True)
        other.unlink(missing_ok=True)
    return nbytes


def check_onnx_file(path: Path, overwrite: bool) -> None:
    """Whether an ONNX file may be written there.

    Raises:
        OutputError: it is a directory, or something is there.
    """
    if path.is_dir():
        raise OutputError(f"{path}: is a directory. Give a name that ends with .onnx, such as {path / 'model.onnx'}.")
    there = next((p for p in (path, beside(path)) if p.exists()), None)
    if there is not None and not overwrite:
        raise OutputError(f"{there}: is there already. Choose another name, or add --overwrite.")
