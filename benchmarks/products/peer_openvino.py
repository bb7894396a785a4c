"""Products by OpenVINO's CPU plugin: MatMul with compressed weights.

Owns: the models of one MatMul whose weights are a constant of 4 or 8 bits, converted, shifted and scaled inside the
graph, which the plugin keeps compressed.  `f32` and `bf16` are the precision that inference may use; `dq32` lets the
plugin quantize activations to int8 in groups of 32, its default, `dq0` does not. Activations and results are float32,
scales float16; u4 and u8 have a zero point for each group, i4 and i8 none. Latency hint, one stream.

    VENV/bin/pip install "openvino==2026.4.*" numpy
    VENV/bin/python peer_openvino.py --shapes 4096x4096 --m 1,16 --threads 2 --json out.json
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import numpy as np
import openvino as ov
from common import Bind, Case, Run
from openvino import opset13 as ops

GROUP = 128
TYPES = {"u4": ov.Type.u4, "i4": ov.Type.i4, "u8": ov.Type.u8, "i8": ov.Type.i8}
BITS = {"u4": 4, "i4": 4, "u8": 8, "i8": 8}


def weights(kind: str, n: int, k: int, group: int, rng: np.random.Generator) -> ov.Node:
    """Random weights (n, k), compressed with one scale, and a zero point if unsigned, for each group of a row."""
    shape, grid = (n, k // group, group), (n, k // group, 1)
    codes = rng.integers(0, 256, n * k * BITS[kind] // 8, np.uint8)
    values = ops.convert(constant(codes, shape, kind), np.float16)
    if kind.startswith("u"):
        middle = np.full(-(-n * (k // group) * BITS[kind] // 8), 0x88 if BITS[kind] == 4 else 0x80, np.uint8)
        values = ops.subtract(values, ops.convert(constant(middle, grid, kind), np.float16))
    values = ops.multiply(values, ops.constant(np.full(grid, 0.02 / 2 ** (BITS[kind] - 2), np.float16)))
    return ops.convert(ops.reshape(values, np.array([n, k]), special_zero=False), np.float32)


def constant(data: np.ndarray, shape: tuple[int, ...], kind: str) -> ov.Node:
    """A constant of this type and shape with these packed bytes."""
    tensor = ov.Tensor(TYPES[kind], shape)  # one made of the array itself would not keep it alive
    tensor.data.view(np.uint8).reshape(-1)[:] = data
    return ops.constant(tensor)


def matmul(threads: int, kind: str, group: int | None, precision: str, dynamic: int) -> Case:
    """MatMul with weights of this type, in groups or with one scale a row."""
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": dynamic,
    }

    def build(n: int, k: int, copies: int) -> Bind:
        core, rng = ov.Core(), np.random.default_rng(0)
        compiled = []
        for _ in range(copies):
            x = ops.parameter([-1, k], np.float32, name="x")
            product = ops.matmul(x, weights(kind, n, k, group or k, rng), False, True)
            compiled.append(core.compile_model(ov.Model([product], [x]), "CPU", settings))

        def bind(m: int) -> Run:
            requests = [model.create_infer_request() for model in compiled]
            x = ov.Tensor(rng.standard_normal((m, k), np.float32))
            y = ov.Tensor(np.empty((m, n), np.float32))
            for request in requests:
                request.set_input_tensor(x)
                request.set_output_tensor(y)
            return lambda copy: requests[copy].infer(share_outputs=True)

        return bind

    per_group = 16 + (BITS[kind] if kind.startswith("u") else 0)
    name = f"{kind} {f'g{group}' if group else 'row'} {precision} dq{dynamic}"
    if group:
        return Case(name, BITS[kind] + per_group / group, build)
    return Case(name, BITS[kind], build, row_bytes=per_group // 8)


def prepare(threads: int) -> Sequence[Case]:
    """The cases, each with so many threads."""
    layouts = (("u4", GROUP), ("i4", GROUP), ("u8", GROUP), ("i8", None))
    return [
        matmul(threads, kind, group, precision, dynamic)
        for kind, group in layouts
        for precision in ("f32", "bf16")
        for dynamic in (0, 32)
    ]


if __name__ == "__main__":
    common.main("openvino", prepare, __doc__)
