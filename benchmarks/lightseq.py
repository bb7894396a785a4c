"""One training step of a Transformer encoder layer, and its inference, in LightSeq's int8 beside float32.

    python benchmarks/lightseq.py [--threads 1] [--clock wall|cpu] [--rounds 7] [--tokens 512 4096] [--width 512] [--hidden 2048] [--heads 8]

Sides take turns, and the median of each counts; ratios are of one run. `--clock cpu` counts the process's own time, for machines
that others use as well. A step is forward and backward in training mode without
dropout, with gradients of the input and of every parameter.

    float32      PyTorch's layer
    fake         the same layer, whose products round and restore both sides and what leaves in floating point, with the
                 gradients of learned clips: quantization-aware training without integers
    lightseq     integer products forward, gradients of rounded sides in floating point

Inference: PyTorch's layer in eval mode (its fast path), and the exported layer of codes; `error` is of its outputs, relative to
float32. `kept` is what waits for the way back, by saved-tensor hooks.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from arrondi.kernels.sides import engine
from arrondi.training.lightseq import LightSeqEncoderLayer


class Fake(torch.autograd.Function):
    """x rounded by a clip and restored, with the gradients of both."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clip: torch.Tensor, low: int, scale: int) -> torch.Tensor:
        ctx.save_for_backward(x, clip)
        ctx.low = low
        return (x * (scale / clip)).add_(0.5).floor_().clamp_(low, scale).mul_(clip / scale)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
        x, clip = ctx.saved_tensors
        above, below = x >= clip, x <= (-clip if ctx.low else 0 * clip)
        ends = above.float() - (below.float() if ctx.low else 0)
        return slopes[0] * ~(above | below), (slopes[0] * ends).sum().reshape(1), None, None


class FakeLinear(nn.Module):
    """A linear layer that rounds in floating point."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, kind: str) -> None:
        super().__init__()
        self.weight, self.bias, self.kind = nn.Parameter(weight.clone()), nn.Parameter(bias.clone()), kind
        self.clip = nn.Parameter(torch.full((1,), 4.0))
        self.clip_out = torch.full((1,), 4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        unsigned = self.kind == "unsigned"
        x = Fake.apply(x, self.clip, 0 if unsigned else -127, 254 if unsigned else 127)
        weight = Fake.apply(self.weight, self.weight.detach().abs().max().reshape(1) * 1.0001, -127, 127)
        if self.kind != "int8":
            return F.linear(x, weight, self.bias)
        return Fake.apply(F.linear(x, weight), self.clip_out, -127, 127) + self.bias


def fake_layer(layer: LightSeqEncoderLayer) -> LightSeqEncoderLayer:
    """The same layer with rounding in floating point."""
    made = copy.deepcopy(layer)
    for name, kind in (
        ("self_attn.qkv", "int8"),
        ("self_attn.out_proj", "int8"),
        ("linear1", "int8"),
        ("linear2", "unsigned"),
    ):
        linear: Any = made.get_submodule(name)
        made.set_submodule(name, FakeLinear(linear.weight.detach(), linear.bias.detach(), kind))
    return made


def step(layer: nn.Module, x: torch.Tensor, slope: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        for p in layer.parameters():
            p.grad = None
        layer(x).backward(slope)

    return run


def look(layer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            layer(x)

    return run


def times(sides: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds, in turns."""
    for run in sides.values():
        run()
    seen: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = clock()
            run()
            seen[name].append(1000 * (clock() - start))
    return {name: statistics.median(values) for name, values in seen.items()}


def kept(layer: nn.Module, x: torch.Tensor) -> float:
    """MiB that wait for the way back, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    found: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        alive.append(t)
        return t

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x)
    del y
    return sum(found.values()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(options.width, options.heads, options.hidden, 0.0, batch_first=True)
    ours = LightSeqEncoderLayer.from_torch(plain)
    for tokens in options.tokens:
        x = torch.randn(max(tokens // options.length, 1), options.length, options.width, requires_grad=True)
        slope = torch.randn_like(x)
        ours(x)
        fake = fake_layer(ours)
        layers: dict[str, nn.Module] = {"float32": plain.train(), "fake": fake, "lightseq": ours.train()}
        found = times({name: step(layer, x, slope) for name, layer in layers.items()}, options.rounds, clock)
        row: dict[str, Any] = {"what": "training step", "tokens": tokens, "engine": engine("cpu")}
        row |= {f"{name}_ms": round(ms, 2) for name, ms in found.items()}
        row |= {f"{name}_kept_mib": round(kept(layer, x), 1) for name, layer in layers.items()}
        row |= {f"times_{name}": round(found[name] / found["lightseq"], 2) for name in ("float32", "fake")}
        print(json.dumps(row), flush=True)
        exported, eager = ours.export(), copy.deepcopy(plain).eval()
        found = times(
            {"float32": look(eager, x.detach()), "integer": look(exported, x.detach())}, options.rounds, clock
        )
        with torch.no_grad():
            reference = eager(x)
            error = float((exported(x) - reference).norm() / reference.norm())
        row = {"what": "inference", "tokens": tokens} | {f"{name}_ms": round(ms, 2) for name, ms in found.items()}
        sizes = [sum(t.nbytes for t in layer.state_dict().values()) / 2**20 for layer in (eager, exported)]
        row |= {"times_float32": round(found["float32"] / found["integer"], 2), "error": round(error, 4)}
        print(json.dumps(row | {"float32_mib": round(sizes[0], 1), "integer_mib": round(sizes[1], 1)}), flush=True)


if __name__ == "__main__":
    main()
