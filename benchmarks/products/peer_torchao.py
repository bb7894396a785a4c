"""Products by torchao: its quantized linear layers, as they are and compiled by Inductor.

Owns: the calls of torchao.  `da8w8` quantizes the activations to int8 for each row and W to int8 for each of its rows;
`w8` and `w4` quantize W alone, `w4` in groups of 128 in torchao's CPU layout; `da8w4` needs a kernel that is not in the
published wheel, and is then left out. Eager, all but `w4` go through unfused operations: compare the compiled ones.
Compilation is with freezing, so that whatever depends on W alone is computed once, each copy a function of its own.

    VENV/bin/pip install torch==2.13.0 "torchao==0.18.*" numpy      # and a C++ compiler, for Inductor
    VENV/bin/python peer_torchao.py --shapes 4096x4096 --m 1,16 --threads 2 --json out.json
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from types import FunctionType

import common
import torch
import torch._inductor.config as inductor
from common import Bind, Case, Run
from torchao.core.config import AOBaseConfig
from torchao.prototype.quantization.int4 import Int8DynamicActivationInt4WeightConfig, PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

GROUP = 128


def compiled(module: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """`module`, compiled on its own: Dynamo keeps what it compiled with the code object, so this has a new one."""

    def call(x: torch.Tensor) -> torch.Tensor:
        return module(x)

    own = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    return torch.compile(own, dynamic=False, fullgraph=True)


def linear(name: str, config: AOBaseConfig, dtype: torch.dtype, bits: float, row_bytes: int, graph: bool) -> Case:
    """A linear layer quantized by this config, eager or compiled."""

    def build(n: int, k: int, copies: int) -> Bind:
        layer = torch.nn.Linear(k, n, bias=False, dtype=dtype).eval()
        quantize_(layer, config)
        layers = [deepcopy(layer) for _ in range(copies)]

        def bind(m: int) -> Run:
            x = torch.randn(m, k, dtype=dtype)
            if not graph:
                return lambda copy: layers[copy](x)
            torch._dynamo.reset()
            calls = [compiled(layer) for layer in layers]
            for call in calls:
                call(x)
            return lambda copy: calls[copy](x)

        return bind

    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    return Case(f"{name} {short} {'compiled' if graph else 'eager'}", bits, build, row_bytes)


def prepare(threads: int) -> Sequence[Case]:
    """The cases, with torch set to so many threads."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    inductor.freezing = True
    single, half = torch.float32, torch.bfloat16
    da8w8, w8 = Int8DynamicActivationInt8WeightConfig(), Int8WeightOnlyConfig()
    w4, da8w4 = PrototypeInt4WeightOnlyConfig(GROUP), Int8DynamicActivationInt4WeightConfig(GROUP)
    group_bits = 4 + 32 / GROUP  # a scale and a zero point of 16 bits
    return [
        *(linear("da8w8", da8w8, dtype, 8, 4, graph) for dtype in (single, half) for graph in (False, True)),
        *(linear("w8", w8, half, 8, 2, graph) for graph in (False, True)),
        *(linear(f"w4 g{GROUP}", w4, half, group_bits, 0, graph) for graph in (False, True)),
        linear(f"da8w4 g{GROUP}", da8w4, half, group_bits, 0, True),
    ]


if __name__ == "__main__":
    with torch.no_grad():
        common.main("torchao", prepare, __doc__)
