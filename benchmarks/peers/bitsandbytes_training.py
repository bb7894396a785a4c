"""8-bit AdamW and an NF4 layer of bitsandbytes, for `benchmarks/adapters.py --peer bitsandbytes=PYTHON`.

PYTHON bitsandbytes_training.py COUNT TOKENS INPUTS OUTPUTS ROUNDS     prints JSON: CPU seconds of a step on COUNT parameters and bytes of its states,
CPU seconds forward and back to the input of an NF4 layer with double quantization, and bytes of its weight
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from bitsandbytes.nn import Linear4bit
from bitsandbytes.optim import AdamW8bit
from torch import nn


def fastest(run: Callable[[], object], rounds: int) -> float:
    found = []
    for _ in range(rounds + 1):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found[1:])


def main() -> None:
    count, tokens, inputs, outputs, rounds = map(int, sys.argv[1:6])
    torch.set_num_threads(1)
    p = nn.Parameter(torch.randn(count))
    p.grad = torch.randn(count) * 0.01
    optimizer = AdamW8bit([p])
    step = fastest(optimizer.step, rounds)
    states = sum(v.nbytes for k, v in optimizer.state[p].items() if torch.is_tensor(v) and not k.startswith("qmap"))
    layer = Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True)  # fmt: skip
    layer = layer.to("cpu")
    x, slope = torch.randn(tokens, inputs, requires_grad=True), torch.randn(tokens, outputs)
    both = fastest(lambda: layer(x).backward(slope), rounds)
    state = layer.weight.quant_state
    size = layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    print(json.dumps({"step": step, "states": states, "layer": both, "weight": size}))


if __name__ == "__main__":
    main()
