"""The real networks of the data directory, rebuilt from their weights, and their samples: `NETWORKS`.

Each is a module whose parameters have the names of its file. Run alone, this prints how well they do before anything is rounded:

    python benchmarks/networks.py --data DIR
"""

from __future__ import annotations

import argparse
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

Arrays = dict[str, np.ndarray]


class Basic(nn.Module):
    """Two convolutions and a shortcut that drops every second pixel and pads channels with zeros."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.stride, self.missing = stride, (outside - inside) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.missing, self.missing))
        return F.relu(x + y)


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [16, 16, 32, 64]
        for n in (1, 2, 3):
            blocks = [
                Basic(widths[n - 1], widths[n], 1 if n == 1 else 2),
                *(Basic(widths[n], widths[n], 1) for _ in range(2)),
            ]
            setattr(self, f"layer{n}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class DSCNN(nn.Module):
    """Depthwise separable convolutions over 49 × 10 features of speech."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 64, (10, 4), 2), nn.BatchNorm2d(64, eps=1e-3)
        for k in range(1, 5):
            setattr(self, f"dw{k}", nn.Conv2d(64, 64, 3, 1, 1, groups=64))
            setattr(self, f"pw{k}", nn.Conv2d(64, 64, 1))
            for kind in ("dwbn", "pwbn"):
                setattr(self, f"{kind}{k}", nn.BatchNorm2d(64, eps=1e-3))
        self.fc = nn.Linear(64, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(F.pad(x, (1, 1, 4, 5)))))
        for k in range(1, 5):
            for kind in ("dw", "pw"):
                x = F.relu(getattr(self, f"{kind}bn{k}")(getattr(self, f"{kind}{k}")(x)))
        return self.fc(x.mean((2, 3)))


class TinyDarknet(nn.Module):
    SIZES: Final = (
        (3, 16, 3), (16, 32, 3), (32, 16, 1), (16, 128, 3), (128, 16, 1), (16, 128, 3), (128, 32, 1), (32, 256, 3), (256, 32, 1),
        (32, 256, 3), (256, 64, 1), (64, 512, 3), (512, 64, 1), (64, 512, 3), (512, 128, 1), (128, 1000, 1),
    )  # fmt: skip
    POOLED: Final = (1, 2, 6, 10)

    def __init__(self) -> None:
        super().__init__()
        for k, (inside, outside, size) in enumerate(self.SIZES, 1):
            setattr(self, f"conv{k}", nn.Conv2d(inside, outside, size, padding=size // 2, bias=k == 16))
            if k < 16:
                setattr(self, f"bn{k}", nn.BatchNorm2d(outside, eps=1e-3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for k in range(1, 17):
            x = getattr(self, f"conv{k}")(x)
            x = F.leaky_relu(getattr(self, f"bn{k}")(x), 0.1) if k < 16 else x
            x = F.max_pool2d(x, 2) if k in self.POOLED else x
        return x.mean((2, 3))


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class MobileNet(nn.Module):
    """Inverted residuals with ReLU6: 1 × 1 up, 3 × 3 depthwise, 1 × 1 down."""

    SIZES: Final = ((16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 40, 2), (40, 40, 1), (40, 40, 1))

    def __init__(self) -> None:
        super().__init__()
        self.stem = self._layer(1, 16, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                self._layer(i, 4 * i, 1), self._layer(4 * i, 4 * i, 3, stride, 4 * i),
                nn.Conv2d(4 * i, o, 1, bias=False), nn.BatchNorm2d(o),
            )
            for i, o, stride in self.SIZES
        )  # fmt: skip
        self.head, self.linear = self._layer(40, 128, 1), nn.Linear(128, 10)

    def _layer(self, inside: int, outside: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(inside, outside, size, stride, size // 2, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outside), nn.ReLU6())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block, (inside, outside, stride) in zip(self.blocks, self.SIZES, strict=True):
            y = block(x)
            x = x + y if inside == outside and stride == 1 else y
        return self.linear(self.head(x).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, t, c))


class ViT(nn.Module):
    """A vision transformer of patches of 4 × 4, pre-norm, with a class token."""

    def __init__(self, width: int = 96, depth: int = 6, heads: int = 4, channels: int = 1, patches: int = 49) -> None:
        super().__init__()
        self.patch, self.cls = nn.Conv2d(channels, width, 4, 4), nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(0.02 * torch.randn(1, patches + 1, width))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "norm1": nn.LayerNorm(width), "attention": Attention(width, heads), "norm2": nn.LayerNorm(width),
                "mlp": nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
            })
            for _ in range(depth)
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.place
        for block in self.blocks:
            x = x + block["attention"](block["norm1"](x))
            x = x + block["mlp"](block["norm2"](x))
        return self.head(self.norm(x)[:, 0])


TRAINED: Final = {"vit": ViT, "mobilenet": MobileNet, "lenet": LeNet}
"""Networks that `train_networks.py` trains."""


def fashion(data: Path) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Pictures (N, 1, 28, 28) of mean 0 and deviation 1 and their classes, to train and to test."""
    held = np.load(data / "fashion_mnist" / "fashion_mnist.npz")
    parts = []
    for part in ("train", "test"):
        x = (torch.from_numpy(held[f"{part}_images"]).float()[:, None] / 255 - 0.286) / 0.353
        parts.append((x, torch.from_numpy(held[f"{part}_labels"]).long()))
    return parts[0], parts[1]


def _fashion(data: Path, count: int) -> tuple[Arrays, Arrays]:
    (x, _), (held, classes) = fashion(data)
    return {"inputs": x[:1024].numpy()}, {"inputs": held[:count].numpy(), "labels": classes[:count].numpy()}


def _scaled(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    x = (images.astype(np.float32) / 255 - np.array(mean, np.float32)) / np.array(std, np.float32)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def _pictures(archive: Path, count: int, size: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images of a zip, every n-th of them, with the class that their names begin with; `size` cuts out the middle."""
    from PIL import Image

    with zipfile.ZipFile(archive) as held:
        names = sorted(n for n in held.namelist() if n.lower().endswith((".jpg", ".jpeg")))
        names = names[:: max(len(names) // count, 1)][:count]
        found = [np.asarray(Image.open(io.BytesIO(held.read(n))).convert("RGB")) for n in names]
    labels = np.array(
        [
            int(Path(n).parts[-2] if "/" in n and Path(n).parts[-2].isdigit() else Path(n).name.split("_")[0])
            for n in names
        ]
    )
    if size:
        top, left = (found[0].shape[0] - size) // 2, (found[0].shape[1] - size) // 2
        found = [f[top : top + size, left : left + size] for f in found]
    return np.stack(found), labels


_CIFAR: Final = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _cifar(data: Path, count: int) -> tuple[Arrays, Arrays]:
    images, _ = _pictures(data / "cifar10" / "cifar10_train10k_jpg.zip", 1024)
    test = np.load(data / "cifar10" / "cifar10_test.npz")
    inputs = _scaled(test["images"][:count], *_CIFAR)
    return {"inputs": _scaled(images, *_CIFAR)}, {"inputs": inputs, "labels": test["labels"][:count].astype(np.int64)}


def _kws(data: Path, count: int) -> tuple[Arrays, Arrays]:
    """No other samples are there: the last 200 calibrate, the others measure."""
    held = np.load(data / "kws" / "kws_test1000.npz")
    x, y = held["features"][:, None].astype(np.float32), held["labels"].astype(np.int64)
    return {"inputs": x[800:]}, {"inputs": x[: min(count, 800)], "labels": y[: min(count, 800)]}


def _imagenet(data: Path, count: int) -> tuple[Arrays, Arrays]:
    """One picture a class is all there is: every fifth calibrates, without its label, and the others measure."""
    images, labels = _pictures(data / "imagenet" / "imagenet_samples_256.zip", 1000, 224)
    x = _scaled(images, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    rest = np.arange(len(x)) % 5 != 0
    return {"inputs": x[~rest]}, {"inputs": x[rest][:count], "labels": labels[rest][:count].astype(np.int64)}


def _made_up(data: Path, count: int) -> tuple[Arrays, Arrays]:
    """Noise, whose classes are what the network itself says."""
    x = torch.randn(96, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = built("made-up", data)(x).argmax(1)
    return {"inputs": x[:64].numpy()}, {"inputs": x[64:][:count].numpy(), "labels": labels[64:][:count].numpy()}


class Network(NamedTuple):
    """A network.

    Attributes:
        build: its module.
        weights: its file in the data directory; "" for one that is made up.
        samples: (data directory, how many to measure on) → what to calibrate on and what to measure on.
    """

    build: Callable[[], nn.Module]
    weights: str
    samples: Callable[[Path, int], tuple[Arrays, Arrays]]


NETWORKS: Final = {
    "resnet20": Network(ResNet20, "cifar10/resnet20_ft.safetensors", _cifar),
    "ds-cnn": Network(DSCNN, "kws/ds_cnn.safetensors", _kws),
    "tiny-darknet": Network(TinyDarknet, "imagenet/tiny_darknet.safetensors", _imagenet),
    **{name: Network(build, f"{name}.safetensors", _fashion) for name, build in TRAINED.items()},
    "made-up": Network(ResNet20, "", _made_up),
}
"""Networks that say a class; the last is for trying the scripts."""

REAL: Final = ("resnet20", "ds-cnn", "tiny-darknet")


def built(name: str, data: Path, trained: Path | None = None) -> nn.Module:
    """A network with its weights, in eval mode; those of `TRAINED` lie in a directory of their own."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    module = network.build()
    if network.weights:
        missing, unexpected = module.load_state_dict(
            load_file((trained or data if name in TRAINED else data) / network.weights), strict=False
        )
        assert not unexpected and all(n.endswith("num_batches_tracked") for n in missing), (missing, unexpected)
    return module.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path())
    parser.add_argument("--trained", type=Path, help="directory of what train_networks.py wrote")
    parser.add_argument("--networks", default=",".join(REAL))
    args = parser.parse_args()
    for name in args.networks.split(","):
        module, (_, test) = built(name, args.data, args.trained), NETWORKS[name].samples(args.data, 10_000)
        with torch.no_grad():
            parts = [module(x).argmax(1) for x in torch.from_numpy(test["inputs"]).split(100)]
        right = float((torch.cat(parts).numpy() == test["labels"]).mean())
        print(
            f"{name}: {sum(p.numel() for p in module.parameters()):,} parameters, top-1 {100 * right:.2f} % of {len(test['labels']):,}"
        )


if __name__ == "__main__":
    main()
