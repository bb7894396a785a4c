"""Arrondi's own products, timed like the peers beside: the kernels that `QLinear` chooses.

Run it with the interpreter that has arrondi; options as in `common.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from common import Bind, Case, main

from arrondi.formats import Scheme, parse_scheme
from arrondi.kernels import choose
from arrondi.nn import QLinear
from arrondi.tensor.nearest import quantize_tensor
from arrondi.tensor.qtensor import QTensor

SCHEMES = {
    "w8": "W8A16", "w6": "W6A16", "w5": "W5A16", "w4": "W4A16", "w3": "W3A16", "w2": "W2A16", "ternary": "TERNARY",
    "binary": "BINARY", "nf4": "NF4", "fp4": "FP4", "nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16", "fp8": "FP8A16",
    "tcq2": "TCQ2", "tcq3": "TCQ3", "tcq4": "TCQ4",
    "tcq2s": "TCQ2S", "tcq3s": "TCQ3S", "tcq4s": "TCQ4S", "w4a8": "W4A8", "w8a8": "W8A8", "w4a8g": "w=int4/g128,a=int8/g128",
}  # fmt: skip
"""Case → scheme of arrondi."""
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def cases(threads: int) -> list[Case]:
    torch.set_num_threads(threads)
    return list(_cases())


def _cases() -> Iterator[Case]:
    for name, text in SCHEMES.items():
        scheme = parse_scheme(text)
        for dtype_name, dtype in DTYPES.items():

            def build(n: int, k: int, copies: int, scheme=scheme, dtype=dtype) -> Bind:
                q = _weight(n, k, scheme.weights)
                layers = [QLinear(q, inputs=scheme.inputs, dtype=dtype) for _ in range(copies)]

                def bind(m: int):
                    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype)
                    return lambda copy: layers[copy](x)

                return bind

            weights = scheme.weights
            shape = (1024, 4096)
            bits = _weight(*shape, weights).bits_per_weight
            kernel = choose(weights, shape, dtype).name
            yield Case(f"{name} {dtype_name}" + ("" if kernel == "native" else f" ({kernel})"), bits, build)


def _weight(n: int, k: int, scheme: Scheme) -> QTensor:
    """Random numbers on their grid; of a trellis random codes, for a search takes longer than all that is timed."""
    generator = torch.Generator().manual_seed(0)
    if scheme.format.trellis is None:
        return quantize_tensor(torch.randn(n, k, generator=generator) * 0.02, scheme)
    levels = torch.tensor([2**bits for bits in scheme.format.trellis.bits])[torch.arange(n) % 2, None]
    codes = (torch.randint(0, 256, (n, k), generator=generator) % levels).to(torch.uint8)
    return QTensor(codes, torch.full((n, 1), 2.0**-13), None, None, scheme)


if __name__ == "__main__":
    main("arrondi", cases, __doc__)
