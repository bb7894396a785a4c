"""What quantized copies of one model cost: relative loss of every linear, and mean KL to the original.

Owns: the comparison of finished checkpoints, ours beside a peer's.  Uses: transformers (with compressed-tensors,
where a copy is stored that way) to load them, `yardstick` for the windows and the KL protocol; nothing of the library
under test.

For a linear with weight W, its quantized copy V and D = W - V, the relative loss is tr(D H D^T) / tr(W H W^T) with
H = X^T X. X are the inputs in the *original* float model, on text that no copy was calibrated on, so every copy is
judged on the same H and the errors of earlier layers do not enter (the KL has them). It is computed as
|X D^T|^2 / |X W^T|^2, which is the same number and needs no H: X = [[1, 2]], W = [[1, 1]], V = [[1, 0.5]] give
|1|^2 / |3|^2 = 1/9.

A linear counts as quantized where V differs from W by more than rounding to bfloat16 can: |D| > 2^-9 |W|. All
arithmetic is float32, also for weights stored in 16 bits, and the sums are float64.

    python benchmarks/layer_loss.py ORIGINAL COPY [COPY ...] --text TEXT [--skip N] [--layers] [--json]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from yardstick import mean_kl, token_windows

BFLOAT16_ROUNDING: Final = 2.0**-9  # largest relative error of rounding to 8 significant bits


@dataclass(frozen=True, slots=True)
class Cost:
    """What one copy lost: relative loss by linear, and mean KL(original || copy) in nats."""

    losses: dict[str, float]
    kl: float

    @property
    def mean(self) -> float:
        return sum(self.losses.values()) / len(self.losses) if self.losses else 0.0


def load(directory: Path) -> nn.Module:
    """A model in float32 with dense weights; compressed ones are unpacked by the one-token pass."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    return model


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: m.weight.detach() for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@torch.no_grad()
def layer_losses(original: nn.Module, copy: nn.Module, windows: Tensor) -> dict[str, float]:
    """Relative loss of every linear that `copy` quantizes, by name, on the inputs `original` sees in `windows`."""
    copied = linear_weights(copy)
    lost, total = {}, {}
    hooks = []
    for name, module in original.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        difference = module.weight - copied[name]
        if difference.norm() <= BFLOAT16_ROUNDING * module.weight.norm():
            continue
        lost[name] = total[name] = 0.0

        def add(
            module: nn.Module, args: tuple[Tensor, ...], *, name: str = name, difference: Tensor = difference
        ) -> None:
            inputs = args[0].flatten(0, -2)
            lost[name] += (inputs @ difference.T).square().sum(dtype=torch.float64).item()
            total[name] += (inputs @ module.weight.T).square().sum(dtype=torch.float64).item()

        hooks.append(module.register_forward_pre_hook(add))
    try:
        for window in windows.split(1):
            original(window, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: lost[name] / total[name] for name in lost}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Relative layer losses and mean KL of quantized copies of a model.")
    parser.add_argument("original", type=Path, help="float checkpoint with its tokenizer")
    parser.add_argument("copies", type=Path, nargs="+", help="quantized checkpoints, plain or compressed-tensors")
    parser.add_argument("--text", type=Path, required=True, help="text that no copy was calibrated on")
    parser.add_argument("--skip", type=int, default=0, help="windows of the text to pass over")
    parser.add_argument("--samples", type=int, default=32, help="windows")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window, BOS included")
    parser.add_argument("--no-bos", action="store_true", help="windows of text tokens only")
    parser.add_argument("--layers", action="store_true", help="a row for every linear")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    original = load(options.original)
    windows = token_windows(
        options.original,
        options.text,
        options.samples,
        length=options.length,
        skip=options.skip,
        bos=not options.no_bos,
    )
    costs: dict[str, Cost] = {}
    for directory in options.copies:
        copy = load(directory)
        costs[str(directory)] = Cost(layer_losses(original, copy, windows), mean_kl(original, copy, windows))

    if options.json:
        print(json.dumps({d: {"mean": c.mean, "kl": c.kl, "losses": c.losses} for d, c in costs.items()}))
        return
    width = max(map(len, costs))
    print(f"{'copy':<{width}}  {'linears':>7}  {'mean relative loss':>18}  {'mean KL / nats':>14}")
    for directory, cost in costs.items():
        print(f"{directory:<{width}}  {len(cost.losses):>7}  {cost.mean:>18.6g}  {cost.kl:>14.6g}")
    if len({frozenset(cost.losses) for cost in costs.values()}) > 1:
        print("The copies quantize different linears: their means are over different sets.")
    if options.layers:
        names = list(dict.fromkeys(name for cost in costs.values() for name in cost.losses))
        width = max(map(len, names), default=0)
        for name in names:
            print(f"{name:<{width}}", *(f"{cost.losses.get(name, 0.0):>12.6g}" for cost in costs.values()))


if __name__ == "__main__":
    main()
