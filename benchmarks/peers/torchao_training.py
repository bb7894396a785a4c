"""A training step of a linear layer by torchao's int8 mixed-precision training, for `benchmarks/training.py --peer torchao=PYTHON`.

PYTHON torchao_training.py TOKENS INPUTS OUTPUTS ROUNDS THREADS      prints JSON: CPU seconds of float32 and of torchao, best of the rounds
"""

from __future__ import annotations

import json
import sys
import time

import torch
from torch import nn
from torchao.prototype.quantized_training import int8_mixed_precision_training
from torchao.quantization import quantize_


def seconds(layer: nn.Module, x: torch.Tensor, slope: torch.Tensor, rounds: int) -> float:
    found = []
    for _ in range(rounds + 1):
        x.grad = None
        layer.zero_grad()
        start = time.process_time()
        layer(x).backward(slope)
        found.append(time.process_time() - start)
    return min(found[1:])


def main() -> None:
    tokens, inputs, outputs, rounds, threads = map(int, sys.argv[1:6])
    torch.set_num_threads(threads)
    layer = nn.Sequential(nn.Linear(inputs, outputs, bias=False))
    x, slope = torch.randn(tokens, inputs, requires_grad=True), torch.randn(tokens, outputs)
    plain = seconds(layer, x, slope, rounds)
    quantize_(layer, int8_mixed_precision_training())
    print(json.dumps({"float32": plain, "torchao": seconds(layer, x, slope, rounds)}))


if __name__ == "__main__":
    main()
