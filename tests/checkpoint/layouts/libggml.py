"""ggml's own C functions for blocks, by ctypes, out of the library that llama-cpp-python ships.

Owns: `Libggml`. ARRONDI_LLAMA_CPP names an interpreter that has llama-cpp-python; it only says where the library lies.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arrondi.checkpoint.layouts.ggml import BlockType

_WHERE = "import importlib.util as u; print(u.find_spec('llama_cpp').submodule_search_locations[0])"


class _Products(ctypes.Structure):
    """What ggml's CPU code has for a type: how floats become it, the dot product, and the type of the other side."""

    _fields_ = [
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("other", ctypes.c_int),
        ("rows", ctypes.c_int64),
    ]


class Libggml:
    """The library of an interpreter; a test is skipped where there is none, and fails under make peers."""

    def __init__(self) -> None:
        python = os.environ.get("ARRONDI_LLAMA_CPP", "")
        if not python:
            if os.environ.get("ARRONDI_PEERS"):
                pytest.fail("make peers needs ARRONDI_LLAMA_CPP, an interpreter with llama-cpp-python")
            pytest.skip("ARRONDI_LLAMA_CPP names no interpreter with llama-cpp-python")
        env = {**os.environ, "PYTHONPATH": ""}
        found = subprocess.run([python, "-c", _WHERE], capture_output=True, text=True, env=env, check=True).stdout
        folder = Path(found.strip()) / "lib"
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"))
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        self.cpu.ggml_cpu_init()
        self.cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_Products)
        self.base.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.base.ggml_row_size.restype = ctypes.c_size_t
        self.base.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]

    def decode(self, raw: torch.Tensor, kind: BlockType) -> np.ndarray:
        """The numbers that rows of blocks (m, bytes) hold, float32 (m, n)."""
        blocks = np.ascontiguousarray(raw.numpy())
        out = np.empty((len(blocks), blocks.shape[1] // kind.size * kind.elements), np.float32)
        decoder = getattr(self.base, f"dequantize_row_{self._spelled(kind)}")
        decoder(_at(blocks), _at(out), ctypes.c_int64(out.size))
        return out

    def encode(self, x: np.ndarray, kind: BlockType, weights: np.ndarray | None = None) -> torch.Tensor:
        """Rows of blocks, uint8 (m, bytes), as ggml's own encoder rounds float32 (m, n); `weights` (n,) is an importance matrix."""
        rows, columns = x.shape
        out = np.empty((rows, columns // kind.elements * kind.size), np.uint8)
        given = None if weights is None else _at(np.ascontiguousarray(weights, np.float32))
        sizes = ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(columns)
        done = self.base.ggml_quantize_chunk(kind.number, _at(x), _at(out), *sizes, given)
        assert done == out.size
        return torch.from_numpy(out)

    def dot(self, raw: torch.Tensor, kind: BlockType, other: np.ndarray) -> float:
        """The product of one row of blocks (bytes,) with float32 (n,), which its kernel rounds first."""
        found = self.cpu.ggml_get_type_traits_cpu(kind.number).contents
        rounded = np.empty(self.base.ggml_row_size(found.other, other.size), np.uint8)
        through = self.cpu.ggml_get_type_traits_cpu(found.other).contents.from_float
        ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(through)(
            _at(other), _at(rounded), other.size
        )
        blocks, out = np.ascontiguousarray(raw.numpy()), np.zeros(1, np.float32)
        size, pointer = ctypes.c_size_t, ctypes.c_void_p
        product = ctypes.CFUNCTYPE(None, ctypes.c_int, pointer, size, pointer, size, pointer, size, ctypes.c_int)
        product(found.vec_dot)(other.size, _at(out), 0, _at(blocks), 0, _at(rounded), 0, 1)
        return float(out[0])

    def _spelled(self, kind: BlockType) -> str:
        """How C spells a type: q4_K, iq2_xxs."""
        return kind.name.lower().replace("_k", "_K") if kind.name[0] == "Q" else kind.name.lower()


def _at(array: np.ndarray) -> Any:
    return ctypes.c_void_p(array.ctypes.data)
