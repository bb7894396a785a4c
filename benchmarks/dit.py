"""A small diffusion transformer of clothes: trained in float and in three values (TerDiT), packed, and made to draw.

    python benchmarks/dit.py --data DIR [--steps 2000] [--seeds 1] [--width 96] [--picture samples.png] [--json]

A DiT (patches of 4 x 4, blocks with adaLN-Zero, SwiGLU, class and time as condition) learns the straight way from Fashion-MNIST pictures to
noise (rectified flow), in float32 and with the linears of its blocks ternary (`terdit`), with and without an RMSNorm behind the modulation. Printed for each, with EMA weights:
the loss while it was trained (mean and deviation of the last fifth) and on test pictures with fixed noise; of drawn samples the share that a
small network, trained here on the real ones, takes for the class asked for, and the Frechet distance of its features to those of test
pictures; and the bytes of the blocks. "rounded afterwards" is the float network with the same linears rounded to ternary. Sizes and samples of
ternary networks are those of packed, saved and loaded ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import arrondi
from arrondi.nn import QLinear
from arrondi.runtime.modules import load_into
from arrondi.training.models import make_latent, pack
from networks import fashion

CLASSES, PATCH, SIDE, NOISES = 10, 4, 28, 1000
TERNARY = ("re:blocks\\.",)
FLOAT, NORM, BARE, AFTER = "float32", "ternary, RMSNorm", "ternary, none", "rounded afterwards"


class Block(nn.Module):
    """x += gate · attention(norm(x) (1 + scale) + shift), and the same of a SwiGLU."""

    def __init__(self, width: int, heads: int, inner: int, normed: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.w1, self.w3, self.w2 = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.modulation_norm = nn.RMSNorm(6 * width, eps=1e-6) if normed else nn.Identity()
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x (n, tokens, width), c (n, width)."""
        six = self.modulation_norm(self.modulation(F.silu(c))).unsqueeze(1).chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = six
        y = F.rms_norm(x, x.shape[-1:]) * (1 + scale1) + shift1
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.out(y)
        y = F.rms_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        return x + gate2 * self.w2(F.silu(self.w1(y)) * self.w3(y))


class DiT(nn.Module):
    """(pictures (n, 1, 28, 28), how far on the way 0 … 1000, class 0 … 9 or 10 for none) → the direction of the way."""

    def __init__(self, width: int = 96, depth: int = 4, heads: int = 4, normed: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, PATCH, PATCH)
        self.place = nn.Parameter(torch.randn(1, (SIDE // PATCH) ** 2, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(CLASSES + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads, 8 * width // 3, normed) for _ in range(depth))
        self.last_modulation, self.last = nn.Linear(width, 2 * width), nn.Linear(width, PATCH * PATCH)
        for layer in (self.last_modulation, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        half = self.label.embedding_dim // 2
        angles = t[:, None] * torch.exp(torch.arange(half) * (-math.log(10000) / half))
        c = self.time(torch.cat((angles.cos(), angles.sin()), 1)) + self.label(y)
        h = self.patch(x).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.last_modulation(F.silu(c)).unsqueeze(1).chunk(2, dim=-1)
        h = self.last(F.rms_norm(h, h.shape[-1:]) * (1 + scale) + shift)
        return F.fold(h.transpose(1, 2), SIDE, PATCH, stride=PATCH)


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the direction from pictures to noise, at t of 1000 of the way."""
    share = (t / NOISES)[:, None, None, None]
    return F.mse_loss(model((1 - share) * x + share * noise, t, y), noise - x)


@torch.no_grad()
def held_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """On test pictures, the same noise for every model."""
    g = torch.Generator().manual_seed(1)
    t, noise = torch.randint(0, NOISES, (len(x),), generator=g), torch.randn(x.shape, generator=g)
    parts = zip(x.split(250), y.split(250), t.split(250), noise.split(250), strict=True)
    return sum(float(loss_of(model, *p)) * len(p[0]) for p in parts) / len(x)


@torch.no_grad()
def drawn(model: nn.Module, y: torch.Tensor, steps: int = 25, guidance: float = 1.5, seed: int = 2) -> torch.Tensor:
    """Samples of the classes y, in -1 … 1: from noise, in steps of equal length, with guidance."""
    none = torch.full_like(y, CLASSES)
    x = torch.randn((len(y), 1, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))
    for i in range(steps, 0, -1):
        t = torch.full((2 * len(y),), NOISES * i / steps)
        asked, free = model(torch.cat((x, x)), t, torch.cat((y, none))).chunk(2)
        x = x - (free + guidance * (asked - free)) / steps
    return x.clamp(-1, 1)


class Judge(nn.Module):
    """A small network that tells clothes apart; its features measure how far samples are from real pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1568, 64), nn.ReLU()
        )  # fmt: skip
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))

    @classmethod
    def trained(cls, x: torch.Tensor, y: torch.Tensor, epochs: int) -> Judge:
        """By Adam, one batch of 100 after the other."""
        torch.manual_seed(0)
        judge = cls()
        optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
        for _ in range(epochs):
            for i in torch.randperm(len(x)).split(100):
                optimizer.zero_grad()
                F.cross_entropy(judge(x[i]), y[i]).backward()
                optimizer.step()
        return judge.eval()

    @torch.no_grad()
    def distance(self, a: torch.Tensor, b: torch.Tensor) -> float:
        """Frechet's, of two Gaussians with the means and covariances of the features."""
        f, g = (self.features(x).double() for x in (a, b))
        one, two = (torch.cov(v.T) for v in (f, g))
        values = torch.linalg.eigvals(one @ two).real.clamp(min=0)
        return float((f.mean(0) - g.mean(0)).square().sum() + one.trace() + two.trace() - 2 * values.sqrt().sum())

    @torch.no_grad()
    def right(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """Percent of the classes that it agrees with."""
        return 100 * float((self(x).argmax(1) == y).double().mean())


def train(
    model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], steps: int, rate: float, seed: int
) -> tuple[nn.Module, list[float]]:
    """The model with averaged weights, and the loss of every step."""
    x, y = data
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 100))
    averaged, losses = copy.deepcopy(model).eval(), []
    for step in range(steps):
        i = torch.randint(0, len(x), (64,), generator=g)
        label = torch.where(torch.rand(64, generator=g) < 0.1, CLASSES, y[i])
        t, noise = torch.randint(0, NOISES, (64,), generator=g), torch.randn(64, 1, SIDE, SIDE, generator=g)
        loss = loss_of(model, x[i], label, t, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        decay = min(0.995, (1 + step) / (10 + step))
        with torch.no_grad():  # of the latent weights and of alpha; they are ternarized afterwards
            for own, new in zip(averaged.parameters(), model.parameters(), strict=True):
                own.lerp_(new, 1 - decay)
    return averaged, losses


def block_bytes(model: DiT) -> tuple[int, int]:
    """Bytes of the weights of the linears of the blocks: in a file, and in memory as the kernel keeps them."""
    layers = [m for m in model.blocks.modules() if isinstance(m, nn.Linear | QLinear)]
    packed = [m for m in layers if isinstance(m, QLinear)]
    dense = sum(m.weight.numel() * 4 for m in layers if not isinstance(m, QLinear))
    return dense + sum(m.unpack().stored_bits // 8 for m in packed), dense + sum(m.weight_nbytes for m in packed)


def deployed(model: DiT, fresh: DiT) -> tuple[DiT, int, float]:
    """A ternary model packed, saved and loaded; bytes of its files; how far its output is from the trained one's."""
    x, t, y = torch.randn(4, 1, SIDE, SIDE), torch.tensor([3, 250, 600, 999]), torch.tensor([0, 3, 9, 10])
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        before = model(x, t, y)
        out = Path(folder) / "out"
        arrondi.save(pack(model), out)
        loaded = load_into(fresh, out)
        gap = float((loaded(x, t, y) - before).norm() / before.norm())
        return loaded, sum(p.stat().st_size for p in out.glob("*.safetensors")), gap


def measured(
    name: str, model: DiT, judge: Judge, held: tuple[torch.Tensor, torch.Tensor], samples: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """A row of the table, and the samples."""
    y = torch.arange(CLASSES).repeat_interleave(samples // CLASSES)
    start = time.perf_counter()
    pictures = torch.cat([drawn(model, part, seed=2 + i) for i, part in enumerate(y.split(100))])
    seconds = time.perf_counter() - start
    stored, memory = block_bytes(model)
    row = {
        "network": name, "test_loss": held_loss(model, *held), "right": judge.right(pictures, y),
        "distance": judge.distance(pictures, held[0]), "file_bytes": stored, "memory_bytes": memory, "seconds_a_sample": seconds / len(y),
    }  # fmt: skip
    return row, pictures


def run(
    args: argparse.Namespace,
    seed: int,
    judge: Judge,
    real: tuple[torch.Tensor, torch.Tensor],
    held: tuple[torch.Tensor, torch.Tensor],
) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """All networks of one seed."""
    rows, pictures = [], []
    for name in (FLOAT, NORM, BARE):
        torch.manual_seed(seed)
        model, fresh = (DiT(args.width, args.depth, normed=name == NORM) for _ in range(2))
        if name != FLOAT:
            make_latent(model, "terdit", targets=TERNARY)
        start = time.perf_counter()
        trained, losses = train(model, real, args.steps, args.rate if name == FLOAT else args.ternary_rate, seed)
        seconds = (time.perf_counter() - start) / args.steps
        last = torch.tensor(losses[-max(args.steps // 5, 2) :])
        extra: dict[str, Any] = {
            "seed": seed,
            "train_loss": float(last.mean()),
            "train_std": float(last.std()),
            "seconds_a_step": seconds,
        }
        versions = [(name, trained)]
        if name == FLOAT:
            ternary = arrondi.quantize(copy.deepcopy(trained), "T158", targets=TERNARY, ignore=())
            versions.append((AFTER, ternary))
        else:
            loaded, size, gap = deployed(trained, fresh)
            versions, extra = [(name, loaded)], {**extra, "model_bytes": size, "gap": gap}
        for version, network in versions:
            row, drawn_ = measured(version, network, judge, held, args.samples)
            rows.append(row if version == AFTER else {**row, **extra})
            pictures.append(drawn_)
            if not args.json:
                print(said(rows[-1]), flush=True)
    return rows, pictures


def said(row: dict[str, Any]) -> str:
    """A line of the table."""
    training = f"{row['train_loss']:.4f} ± {row['train_std']:.4f}" if "train_loss" in row else " " * 15
    rest = f"  gap {row['gap']:.1e}, {row['model_bytes']:,} B in all" if "gap" in row else ""
    return (
        f"{row['network']:<20}{training:>18}{row['test_loss']:>9.4f}{row['right']:>8.1f} %{row['distance']:>9.2f}"
        f"{row['file_bytes']:>11,}{row['memory_bytes']:>11,}{1000 * row['seconds_a_sample']:>9.1f} ms{rest}"
    )


def picture(found: list[torch.Tensor], path: Path, each: int = 8) -> None:
    """One band of rows for each network; a column is a class, `each` samples below each other."""
    from PIL import Image

    bands = []
    for pictures in found:
        grid = pictures.view(CLASSES, -1, SIDE, SIDE)[:, :each]
        bands.append(F.pad(grid.permute(1, 2, 0, 3).reshape(-1, CLASSES * SIDE), (0, 0, 0, 6), value=1.0))
    whole = ((torch.cat(bands) + 1) * 127.5).round().clamp(0, 255).byte()
    Image.fromarray(whole.numpy()).resize((2 * whole.shape[1], 2 * whole.shape[0]), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--ternary-rate", type=float, default=2e-3)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--limit", type=int, default=10000, help="pictures to learn from, and to test on")
    parser.add_argument("--epochs", type=int, default=4, help="of the network that judges")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    (x, y), (hx, hy) = fashion(args.data)
    few = min(args.limit, 2000)
    real = ((x[: args.limit] * 0.353 + 0.286) * 2 - 1, y[: args.limit])  # from -1 to 1, as samples are
    held = ((hx[:few] * 0.353 + 0.286) * 2 - 1, hy[:few])
    judge = Judge.trained(*real, args.epochs)
    real_row = {"right": judge.right(*held), "distance": judge.distance(real[0][:500], held[0])}
    if not args.json:
        print(f"real pictures: the judge is right on {real_row['right']:.1f} %, distance {real_row['distance']:.2f}")
        print(
            "network                 loss, last fifth  on test   class  distance   in files  in memory   a sample",
            flush=True,
        )
    rows, first = [], None
    for seed in range(args.seeds):
        found, pictures = run(args, seed, judge, real, held)
        rows += found
        first = first or pictures
    if args.picture and first:
        picture(first, args.picture)
    if args.json:
        print(json.dumps({"real": real_row, "rows": rows}))


if __name__ == "__main__":
    main()
