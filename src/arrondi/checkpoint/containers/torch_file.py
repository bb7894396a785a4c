"""A file that torch.save wrote, seen as a table of tensors, where the user allows that.

Owns: `allow_torch_load` and `torch_load_allowed` (the one place that says whether), `is_torch_file`, `torch_files` (those of a folder) and
`read_torch_header`. Nothing but tensors is loaded: PyTorch's weights-only loader reads names, types and shapes, without a storage, and gives the
place of every storage in the file. From there on bytes are read as those of any other file, a tensor at a time.

Source: PyTorch 2.13, `torch/serialization.py` (`torch.load` under `FakeTensorMode`).
"""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.checkpoint.containers.descriptors import reraise_exhaustion
from arrondi.checkpoint.containers.tensor_file import DTYPE_NAMES, Entry
from arrondi.errors import FileFormatError

SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt")
INDEX: Final = "pytorch_model.bin.index.json"
_WHOLE: Final = "pytorch_model.bin"
_OF_TRAINING: Final = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
_INSIDE: Final = ("state_dict", "model", "module")
"""Keys under which training programs keep the tensors."""
_LOCAL: Final = 30
"""Bytes of a ZIP entry in front of its name."""

_allowed: ContextVar[bool] = ContextVar("allowed", default=False)


def torch_load_allowed() -> bool:
    """Whether files of torch.save are read here and now."""
    return _allowed.get()


@contextmanager
def allow_torch_load() -> Iterator[None]:
    """Read models whose weights are files of torch.save (.bin, .pt), as long as it lasts.

    PyTorch's weights-only loader is used, which makes tensors and runs nothing; a file that asks for more is refused. Every function that
    opens a model takes such files inside; outside they are refused.
    """
    token = _allowed.set(True)
    try:
        yield
    finally:
        _allowed.reset(token)


def is_torch_file(path: Path) -> bool:
    """Whether a file is called as one of torch.save is, and may be read."""
    return torch_load_allowed() and path.suffix.lower() in SUFFIXES and path.is_file()


def torch_files(folder: Path) -> list[Path]:
    """The files of a folder that hold weights, as transformers names them, or whatever is there; none where they may not be read."""
    if not torch_load_allowed():
        return []
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    found = (p for p in folder.iterdir() if is_torch_file(p) and not p.name.startswith(_OF_TRAINING))
    return sorted(found)


def read_torch_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file, in the order of its table.

    Raises:
        FileFormatError: it holds more than tensors, was written by a PyTorch before 1.6, or its parts contradict each other.
    """
    places, state = _places(path), _state(path)
    entries = {}
    for name, tensor in state.items():
        dtype = DTYPE_NAMES.get(tensor.dtype)
        if dtype is None or tensor.layout != torch.strided:
            raise FileFormatError(f"{path}: tensor {name!r} is of type {tensor.dtype}, {tensor.layout}. Save it as numbers of a plain type.")  # fmt: skip
        if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
            raise FileFormatError(f"{path}: tensor {name!r} is a view whose numbers do not lie in a row. Save a contiguous copy of it.")  # fmt: skip
        offset: int | None = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        start, size = int(tensor.storage_offset()) * tensor.itemsize, tensor.numel() * tensor.itemsize
        if offset is None or offset not in places or start + size > places[offset]:
            raise FileFormatError(
                f"{path}: tensor {name!r} needs {start + size} bytes of a storage at {offset}, which has {places.get(offset or 0, 0)}. The file lies; download it again."
            )
        entries[name] = Entry(name, path, dtype, tuple(tensor.shape), offset + start, offset + start + size)
    return entries


def _places(path: Path) -> dict[int, int]:
    """Where every part of the archive begins in the file, and its bytes."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for part in archive.infolist():
                file.seek(part.header_offset)
                head = file.read(_LOCAL)
                begin = part.header_offset + _LOCAL + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")  # fmt: skip
                if part.compress_type != zipfile.ZIP_STORED or part.flag_bits & 1:
                    raise FileFormatError(f"{path}: {part.filename} is compressed, which torch.save never does. Save the model again.")  # fmt: skip
                if part.filename.endswith("/byteorder") and archive.read(part) != b"little":
                    raise FileFormatError(f"{path}: was written on a big-endian machine. Save the model again on another.")  # fmt: skip
                found[begin] = part.file_size
            size = os.fstat(file.fileno()).st_size
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(
            f"{path}: no archive of torch.save (of PyTorch 1.6 or later): {error}. Load it where it comes from, and save it again."
        ) from error
    except OSError as error:
        reraise_exhaustion(error)
        raise FileFormatError(f"{path}: cannot be read ({error.strerror}). Download it again.") from error
    return {begin: min(count, size - begin) for begin, count in found.items()}


def _state(path: Path) -> Mapping[str, torch.Tensor]:
    """The table of tensors, none of them with a storage."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with warnings.catch_warnings(), FakeTensorMode():
            warnings.simplefilter("ignore")
            held: Any = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise FileFormatError(
            f"{path}: holds more than tensors ({_reason(error)}), which could run code. Ask for safetensors where it comes from."
        ) from error
    except Exception as error:  # whatever the loader makes of a damaged file
        if isinstance(error, OSError):
            reraise_exhaustion(error)
        raise FileFormatError(f"{path}: cannot be loaded ({str(error).splitlines()[0][:120] if str(error) else type(error).__name__}). Download it again.") from error  # fmt: skip
    for key in _INSIDE:
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping) or not held:
        raise FileFormatError(f"{path}: holds no table of tensors. Give a file of the state dict alone.")
    for name, value in held.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise FileFormatError(f"{path}: {str(name)[:60]!r} is no tensor but {type(value).__name__}. Give a file of the state dict alone.")  # fmt: skip
    return held


def _reason(error: Exception) -> str:
    """The loader's own words for what it refused, in the middle of much advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line or "unsupported" in line), lines[0] if lines else "")  # fmt: skip
    return words.rstrip(".")[:160]
