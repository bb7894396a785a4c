"""Run by an interpreter with llama-cpp-python: one GGUF file into several, each a mix of types. Prints the mixes that it refuses."""

from __future__ import annotations

import ctypes
import json
import sys

import llama_cpp

source, folder, mixes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for name, number in mixes.items():
    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.ftype, wanted.nthread = number, 1
    if llama_cpp.llama_model_quantize(source.encode(), f"{folder}/{name}.gguf".encode(), ctypes.byref(wanted)):
        print(name)
