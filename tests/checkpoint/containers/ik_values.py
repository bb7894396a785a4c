"""Numbers of blocks by ik_llama.cpp's own C functions; run by an interpreter that has ik_llama_cpp.

    python ik_values.py RAW.npz COLUMNS OUT.npz

RAW has rows of bytes by the name of their type.
"""  # fmt: skip

import ctypes
import sys
from pathlib import Path

import ik_llama_cpp
import numpy as np


class Parameters(ctypes.Structure):
    """What a context of ggml is made of; making one fills the tables of float16."""

    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


package = Path(ik_llama_cpp.__file__).parent
for found in package.parent.glob("ik_llama_cpp_python.libs/libgomp*"):
    ctypes.CDLL(str(found), ctypes.RTLD_GLOBAL)
library = ctypes.CDLL(str(package / "lib" / "libggml.so"))
library.ggml_init.restype, library.ggml_init.argtypes = ctypes.c_void_p, [Parameters]
library.ggml_init(Parameters(1 << 20, None, False))

columns, values = int(sys.argv[2]), {}
for name, rows in np.load(sys.argv[1]).items():
    decode = getattr(library, f"dequantize_row_{name.lower()}")
    decode.argtypes, decode.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    values[name] = np.empty((len(rows), columns), np.float32)
    for row, made in zip(np.ascontiguousarray(rows), values[name], strict=True):
        decode(row.ctypes.data, made.ctypes.data, columns)
np.savez(sys.argv[3], **values)
