"""One layer by llm-compressor's GPTQ, from statistics that are given: the peer of `gptq_layer.py`.

Runs in llm-compressor's own virtual environment (see `llmcompressor_gptq.py`), without the library under test.

    VENV/bin/python llmcompressor_gptq_layer.py FILE [--threads 1] [--rounds 1]

FILE is a safetensors file with `weight` (out, in) float32 and `hessian` (in, in) float32. Prints one JSON line: seconds of every
round, scales included, and the loss Σ (w - ŵ) H (w - ŵ)ᵀ relative to that of leaving the layer out.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from safetensors.torch import load_file

GROUP = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    given = load_file(options.file)
    weight, hessian = given["weight"], given["hessian"]
    scheme = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP, actorder="static"
    )
    seconds = []
    for _ in range(options.rounds):
        stacked, curvature = weight.clone()[None], hessian.clone()[None]
        started = time.perf_counter()
        low, high = torch.aminmax(weight.unflatten(1, (-1, GROUP)), dim=2)
        scale, zero = calculate_qparams(low, high, scheme)
        rounded, *_ = quantize_weight(stacked, curvature, scale[None], zero[None], None, scheme)
        seconds.append(round(time.perf_counter() - started, 3))
    difference = weight - rounded[0]
    loss = (difference @ hessian * difference).sum(dtype=torch.float64) / (weight @ hessian * weight).sum(
        dtype=torch.float64
    )
    print(json.dumps({"seconds": seconds, "loss": float(loss)}))


if __name__ == "__main__":
    main()
