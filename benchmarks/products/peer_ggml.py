"""Products by ggml, the kernels of llama.cpp, through the shared libraries that llama-cpp-python carries.

Owns: the calls of ggml's C functions.  The weights lie in the plain CPU buffer (`Q4_0`) or in the one that puts them in
another order for the CPU when they are stored (`Q4_0 repack`), as llama.cpp does on its own; ggml has such an order for
some types on some CPUs, and a type without one is left out. Activations and results are float32; a graph of one
`ggml_mul_mat` is computed for each product, and quantizing the activations is part of it.

    VENV/bin/pip install llama-cpp-python==0.3.36 numpy   # built here: GGML_NATIVE, for this CPU
    VENV/bin/python peer_ggml.py --shapes 4096x4096 --m 1,16 --threads 2 --json out.json
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Final

import common
import llama_cpp
import numpy as np
from common import Bind, Case, Run

F32: Final = 0  # of enum ggml_type
TYPES: Final = {
    "F16": (1, 16.0), "Q8_0": (8, 8.5), "Q6_K": (14, 6.5625), "Q4_0": (2, 4.5), "Q4_K": (12, 4.5), "Q3_K": (11, 3.4375), "Q2_K": (10, 2.625),
    "IQ3_XXS": (18, 3.0625), "IQ2_XXS": (16, 2.0625),
}  # fmt: skip
"""Type → its number in ggml, and bits of a weight."""
ROWS: Final = 256  # that are encoded; further ones are the same again, for IQ types take seconds a million weights
NODES: Final = 8  # room in a graph: one product and its two sources
ALIGN: Final = 64  # of a tensor in a buffer


class InitParams(Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


FUNCTIONS: Final[dict[str, tuple[object, list[object]]]] = {
    "ggml_backend_alloc_buffer": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_buffer_get_base": (c_void_p, [c_void_p]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_get_device": (c_void_p, [c_void_p]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_tensor_alloc": (c_int, [c_void_p, c_void_p, c_void_p]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_free": (None, [c_void_p]),
    "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_log_set": (None, [c_void_p, c_void_p]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_tensor_overhead": (c_size_t, []),
}


@ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
def silent(level: int, text: bytes, data: int) -> None:
    """Drop what ggml logs, one line for each repacked tensor."""


class Ggml:
    """ggml's CPU backend with so many threads."""

    def __init__(self, threads: int) -> None:
        folder = Path(llama_cpp.__file__).parent / "lib"
        self.c = ctypes.CDLL(str(next(folder.glob("*ggml.*"))))  # those it links to come with it
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(self.c, name)
            function.restype, function.argtypes = result, arguments
        self.c.ggml_log_set(ctypes.cast(silent, c_void_p), None)
        self.backend = self.c.ggml_backend_cpu_init()
        self.c.ggml_backend_cpu_set_n_threads(self.backend, threads)

    def buffer_type(self, repack: bool) -> int | None:
        """The plain CPU buffer type, or that of repacked weights, if there is one."""
        if not repack:
            return self.c.ggml_backend_cpu_buffer_type()
        name = b"ggml_backend_dev_get_extra_bufts"
        address = self.c.ggml_backend_reg_get_proc_address(self.c.ggml_backend_cpu_reg(), name)
        listed = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.c.ggml_backend_get_device(self.backend))
        at = 0
        while (kind := listed[at]) is not None:  # a null pointer ends the list
            if self.c.ggml_backend_buft_name(kind) == b"CPU_REPACK":
                return kind
            at += 1
        return None

    def context(self, tensors: int, graphs: int = 0) -> int:
        """Room for the headers of so many tensors and graphs; their data lie in buffers."""
        room = tensors * self.c.ggml_tensor_overhead() + graphs * self.c.ggml_graph_overhead_custom(NODES, False)
        return self.c.ggml_init(InitParams(room + 1024, None, True))


class Weights:
    """`copies` of one random matrix of a type, in one buffer."""

    def __init__(self, ggml: Ggml, kind: int, repack: bool, n: int, k: int, copies: int) -> None:
        self.ggml, self.shape = ggml, (n, k)
        self.context = ggml.context(copies)
        self.tensors = [ggml.c.ggml_new_tensor_2d(self.context, kind, k, n) for _ in range(copies)]
        buffer_type = ggml.buffer_type(repack)
        if buffer_type is None:
            raise NotImplementedError("this build of ggml has no buffer of repacked weights")
        self.buffer = ggml.c.ggml_backend_alloc_ctx_tensors_from_buft(self.context, buffer_type)
        if not Products(self, 1).supported:
            raise NotImplementedError("ggml does not repack this type on this CPU")
        few, row = min(n, ROWS), ggml.c.ggml_row_size(kind, k)
        values = np.random.default_rng(0).standard_normal((few, k), np.float32) * np.float32(0.02)
        some, alike = np.empty(few * row, np.uint8), np.ones(k, np.float32)
        importance = alike.ctypes.data_as(POINTER(c_float))  # without it there is no IQ2_XXS
        ggml.c.ggml_quantize_chunk(kind, values.ctypes.data, some.ctypes.data, 0, few, k, importance)
        packed = np.resize(some, n * row)
        for tensor in self.tensors:
            ggml.c.ggml_backend_tensor_set(tensor, packed.ctypes.data, 0, packed.nbytes)

    def __del__(self) -> None:
        if hasattr(self, "buffer"):
            self.ggml.c.ggml_backend_buffer_free(self.buffer)
        self.ggml.c.ggml_free(self.context)


class Products:
    """One graph for each copy of the weights; all have the same activations and write to the same place."""

    def __init__(self, weights: Weights, m: int) -> None:
        self.weights, self.ggml, c = weights, weights.ggml, weights.ggml.c
        (n, k), copies = weights.shape, len(weights.tensors)
        self.context = self.ggml.context(copies + 1, copies)
        self.buffer = c.ggml_backend_alloc_buffer(self.ggml.backend, 4 * m * (k + n) + 2 * ALIGN)
        base = -(-c.ggml_backend_buffer_get_base(self.buffer) // ALIGN) * ALIGN
        x = np.random.default_rng(1).standard_normal((m, k), np.float32)
        activations = c.ggml_new_tensor_2d(self.context, F32, k, m)
        c.ggml_backend_tensor_alloc(self.buffer, activations, base)
        c.ggml_backend_tensor_set(activations, x.ctypes.data, 0, x.nbytes)
        self.results = [c.ggml_mul_mat(self.context, tensor, activations) for tensor in weights.tensors]
        self.supported = c.ggml_backend_supports_op(self.ggml.backend, self.results[0])
        self.graphs = [c.ggml_new_graph_custom(self.context, NODES, False) for _ in range(copies)]
        for graph, result in zip(self.graphs, self.results, strict=True):
            c.ggml_backend_tensor_alloc(self.buffer, result, base + -(-x.nbytes // ALIGN) * ALIGN)
            c.ggml_build_forward_expand(graph, result)

    def run(self, copy: int) -> None:
        """Compute the graph of this copy."""
        if self.ggml.c.ggml_backend_graph_compute(self.ggml.backend, self.graphs[copy]):
            raise RuntimeError("ggml could not compute the graph")

    def __del__(self) -> None:
        self.ggml.c.ggml_backend_buffer_free(self.buffer)
        self.ggml.c.ggml_free(self.context)


def product(ggml: Ggml, name: str, repack: bool) -> Case:
    """`ggml_mul_mat` with weights of the type of this name."""
    kind, bits = TYPES[name]

    def build(n: int, k: int, copies: int) -> Bind:
        weights = Weights(ggml, kind, repack, n, k, copies)

        def bind(m: int) -> Run:
            return Products(weights, m).run

        return bind

    return Case(f"{name} repack" if repack else name, bits, build)


def prepare(threads: int) -> Sequence[Case]:
    """The cases: each type as it is in a file, and repacked."""
    ggml = Ggml(threads)
    return [product(ggml, name, repack) for name in TYPES for repack in (False, True)]


if __name__ == "__main__":
    common.main("ggml", prepare, __doc__)
