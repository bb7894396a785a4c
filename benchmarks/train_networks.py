"""Trains the networks that no file holds: a vision transformer, a MobileNet of depthwise convolutions and a LeNet, on the Fashion-MNIST pictures.

    python benchmarks/train_networks.py --data DIR --out WEIGHTS [--networks vit,mobilenet,lenet] [--epochs 12]

`benchmarks/vision.py --trained WEIGHTS` measures on them. Same seed, same machine: same weights.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from networks import TRAINED, fashion


def moved(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures shifted by up to two pixels, half of them mirrored."""
    dx, dy = torch.randint(-2, 3, (2,), generator=generator).tolist()
    x = torch.roll(x, (dx, dy), (2, 3))
    return x.flip(3) if torch.rand((), generator=generator) < 0.5 else x


def train(
    name: str, data: Path, epochs: int, limit: int, batch: int = 100, rate: float = 2e-3
) -> tuple[torch.nn.Module, float]:
    """The network and the share of test pictures that it knows."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    (x, y), (held, classes) = ((a[:limit], b[:limit]) for a, b in fashion(data))
    module = TRAINED[name]()
    optimizer = torch.optim.AdamW(module.parameters(), rate, weight_decay=0.05)
    steps = epochs * math.ceil(len(x) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for epoch in range(epochs):
        module.train()
        for chosen in torch.randperm(len(x), generator=generator).split(batch):
            loss = F.cross_entropy(module(moved(x[chosen], generator)), y[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        module.eval()
        with torch.no_grad():
            right = sum(
                int((module(a).argmax(1) == b).sum()) for a, b in zip(held.split(500), classes.split(500), strict=True)
            )
        print(
            f"{name}: epoch {epoch + 1}, loss {loss.item():.3f}, {100 * right / len(held):.2f} % of {len(held):,}",
            flush=True,
        )
    return module, right / len(held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="directory for the weights")
    parser.add_argument("--networks", default=",".join(TRAINED))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--limit", type=int, default=10_000, help="pictures at most")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.networks.split(","):
        module, _ = train(name, args.data, args.epochs, args.limit)
        save_file(
            {k: v for k, v in module.state_dict().items() if v.dtype.is_floating_point},
            args.out / f"{name}.safetensors",
        )


if __name__ == "__main__":
    main()
