"""Products by ONNX Runtime: the operator MatMulNBits of com.microsoft, in 4 and 8 bits, on the CPU.

Owns: the ONNX models of one node, and their sessions.  `accuracy_level` 0 lets the kernel compute in float32; 4 lets
it quantize the activations to int8. Weights are symmetric, with one float32 scale for each block; activations and
results are float32. The sessions of all copies use one pool of threads, and inputs and outputs are bound beforehand.

    VENV/bin/pip install "onnxruntime==1.31.*" onnx numpy
    VENV/bin/python peer_onnxruntime.py --shapes 4096x4096 --m 1,16 --threads 2 --json out.json
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import numpy as np
import onnxruntime
from common import Bind, Case, Run
from onnx import ModelProto, TensorProto, helper, numpy_helper


def model(n: int, k: int, bits: int, block: int, level: int, rng: np.random.Generator) -> ModelProto:
    """A model of one MatMulNBits with random weights: x (m, k) to y (m, n), both float32."""
    blocks = -(-k // block)
    codes = rng.integers(0, 256, (n, blocks, block * bits // 8), np.uint8)
    scales = np.full((n, blocks), 0.02 / 2 ** (bits - 2), np.float32)
    sizes = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": level}
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **sizes)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")],
    )
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=10)


def matmul_nbits(bits: int, block: int, level: int) -> Case:
    """MatMulNBits with this width, block and accuracy level."""

    def build(n: int, k: int, copies: int) -> Bind:
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False
        rng = np.random.default_rng(0)
        models = (model(n, k, bits, block, level, rng).SerializeToString() for _ in range(copies))
        sessions = [onnxruntime.InferenceSession(m, options, providers=["CPUExecutionProvider"]) for m in models]

        def bind(m: int) -> Run:
            x = onnxruntime.OrtValue.ortvalue_from_numpy(rng.standard_normal((m, k), np.float32))
            y = onnxruntime.OrtValue.ortvalue_from_numpy(np.empty((m, n), np.float32))
            bindings = [session.io_binding() for session in sessions]
            for binding in bindings:
                binding.bind_ortvalue_input("x", x)
                binding.bind_ortvalue_output("y", y)
            return lambda copy: sessions[copy].run_with_iobinding(bindings[copy])

        return bind

    return Case(f"MatMulNBits {bits}b g{block} level {level}", bits + 32 / block, build)


def prepare(threads: int) -> Sequence[Case]:
    """The cases, with so many threads in the pool."""
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    return [matmul_nbits(bits, block, level) for bits in (4, 8) for block in (32, 128) for level in (0, 4)]


if __name__ == "__main__":
    common.main("onnxruntime", prepare, __doc__)
