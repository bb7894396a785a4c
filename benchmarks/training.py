"""What training in few bits costs and gains: the tables in the README and in docs/benchmarks.md.

    python benchmarks/training.py --speed                                     a training step of a linear layer, beside PyTorch
    python benchmarks/training.py --data DIR                                  every task by every method, three seeds
    python benchmarks/training.py --data DIR --tasks vit --methods int8,int4 --seeds 1 --rows FILE.jsonl

Tasks: `stsb` fine-tunes the sentence encoder on the development pairs of STS-B (Spearman correlation on the test pairs, 0.820 before), `cola` on CoLA (Matthews
correlation, in-domain sentences held out), `gpt` trains the byte-level GPT of
communication.py on Emma (nats a byte of the last tenth), `resnet20` fine-tunes the network of the lossless pictures on JPEG ones, `vit` trains a vision transformer on the same
(top-1). A row has the metric with its range over seeds, CPU seconds a step, and megabytes that wait for the way back.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import nn
from transformers import AutoModel, AutoTokenizer

import arrondi
from arrondi.training import PRODUCTS
from communication import GPT
from networks import _CIFAR, ResNet20, ViT, _pictures, _scaled

VARIANTS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "hlq-input": ("hlq", {"input_rank": 8}),
    "int4-ends": ("int4", {"ignore": ("patch", "head")}),
    "int4-uniform": ("int4", {"sampling": "uniform"}),
}
"""Methods with options: the low rank for the gradient of the input, too; a vision transformer's first and last layer in float; rows drawn uniformly."""

METHODS: Final = ("float32", *PRODUCTS, *VARIANTS)
SHAPES: Final = ((512, 2048, 2048), (4096, 2048, 2048), (512, 4096, 11008), (4096, 4096, 11008))
"""Tokens, inputs, outputs of one layer."""

Loss = Callable[[Any, Any], torch.Tensor]


class Task(NamedTuple):
    """What is trained: a model, batches of one seed, the loss of one, and a figure of merit on what was held out."""

    model: nn.Module
    batches: Iterator[Any]
    loss: Loss
    metric: Callable[[], float]
    rate: float
    ignore: tuple[str, ...] = ()


def pictures(data: Path, count: int) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    images, labels = _pictures(data / "cifar10" / "cifar10_train10k_jpg.zip", 10_000)
    held = np.load(data / "cifar10" / "cifar10_test.npz")
    test = torch.from_numpy(_scaled(held["images"][:count], *_CIFAR)), torch.from_numpy(held["labels"][:count]).long()
    return (torch.from_numpy(_scaled(images, *_CIFAR)), torch.from_numpy(labels).long()), test


def drawn(x: torch.Tensor, y: torch.Tensor, batch: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(x), generator=generator).split(batch):
            flip = torch.rand(len(chosen), 1, 1, 1, generator=generator) < 0.5
            yield torch.where(flip, x[chosen].flip(3), x[chosen]), y[chosen]


def _of_pictures(model: nn.Module, data: Path, seed: int, batch: int, rate: float) -> Task:
    (x, y), (held, classes) = pictures(data, 2000)

    def top1() -> float:
        right = [model(a).argmax(1) == b for a, b in zip(held.split(250), classes.split(250), strict=True)]
        return 100 * float(torch.cat(right).float().mean())

    return Task(model, drawn(x, y, batch, seed), lambda m, b: F.cross_entropy(m(b[0]), b[1]), top1, rate)


def resnet20(data: Path, seed: int) -> Task:
    model = ResNet20()
    model.load_state_dict(load_file(data / "cifar10" / "resnet20.safetensors"), strict=False)
    return _of_pictures(model, data, seed, 64, 5e-4)


def vit(data: Path, seed: int) -> Task:
    return _of_pictures(ViT(channels=3, patches=64, depth=4), data, seed, 64, 1e-3)


def gpt(data: Path, seed: int) -> Task:
    text = torch.frombuffer(bytearray((data / "text" / "emma.txt").read_bytes()), dtype=torch.uint8).long()
    length = 128
    windows = text[: len(text) // length * length].reshape(-1, length)
    cut = len(windows) * 9 // 10
    train, held = windows[:cut], windows[cut:][:256]
    model = GPT(128, 4, length)
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[torch.Tensor]:
        while True:
            for chosen in torch.randperm(len(train), generator=generator).split(8):
                yield train[chosen]

    def loss(m: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(m(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def nats() -> float:
        return float(torch.stack([loss(model, part) for part in held.split(32)]).mean())

    return Task(model, batches(), loss, nats, 3e-3, ("head",))


def means(encoder: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean vector of every sentence."""
    mask = inputs["attention_mask"][..., None].float()
    return (encoder(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)


class Judge(nn.Module):
    """An encoder whose mean vector says whether a sentence is acceptable."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, 2)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.head(means(self.encoder, inputs))


def cola(data: Path, seed: int) -> Task:
    tokenizer = AutoTokenizer.from_pretrained(data / "minilm-l6")
    encoder = AutoModel.from_pretrained(data / "minilm-l6", dtype=torch.float32)
    model = Judge(encoder, encoder.config.hidden_size)

    def read(name: str) -> tuple[list[str], torch.Tensor]:
        with (data / "cola" / name).open(encoding="utf-8") as lines:
            rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        return [row[3] for row in rows], torch.tensor([int(row[1]) for row in rows])

    (said, labels), (held, truth) = read("in_domain_train.tsv"), read("in_domain_dev.tsv")
    generator = torch.Generator().manual_seed(seed)

    def of(sentences: list[str]) -> dict[str, torch.Tensor]:
        return dict(tokenizer(sentences, padding=True, truncation=True, max_length=32, return_tensors="pt"))

    def batches() -> Iterator[Any]:
        while True:
            for chosen in torch.randperm(len(said), generator=generator).split(32):
                yield of([said[i] for i in chosen]), labels[chosen]

    def matthews() -> float:
        given = torch.cat([model(of(held[i : i + 64])).argmax(1) for i in range(0, len(held), 64)])
        return float(torch.corrcoef(torch.stack((given, truth)).float())[0, 1].nan_to_num())

    return Task(model, batches(), lambda m, b: F.cross_entropy(m(b[0]), b[1]), matthews, 3e-4, ("head",))


def stsb(data: Path, seed: int) -> Task:
    tokenizer = AutoTokenizer.from_pretrained(data / "minilm-l6")
    model = AutoModel.from_pretrained(data / "minilm-l6", dtype=torch.float32)

    def read(name: str) -> tuple[list[str], list[str], torch.Tensor]:
        with (data / "sts-b" / name).open(encoding="utf-8") as lines:
            one, other, scores = zip(*csv.reader(lines), strict=True)
        return list(one), list(other), torch.tensor([float(score) / 5 for score in scores])

    def alike(m: nn.Module, one: list[str], other: list[str]) -> torch.Tensor:
        given = tokenizer([*one, *other], padding=True, truncation=True, max_length=48, return_tensors="pt")
        return F.cosine_similarity(*means(m, dict(given)).chunk(2))

    (one, other, scores), (held_one, held_other, truth) = read("stsb-en-dev.csv"), read("stsb-en-test.csv")
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[Any]:
        while True:
            for chosen in torch.randperm(len(one), generator=generator).split(16):
                yield [one[i] for i in chosen], [other[i] for i in chosen], scores[chosen]

    def spearman() -> float:
        found = [alike(model, held_one[i : i + 64], held_other[i : i + 64]) for i in range(0, len(truth), 64)]
        return float(spearmanr(torch.cat(found).numpy(), truth.numpy()).statistic)

    return Task(model, batches(), lambda m, b: F.mse_loss(alike(m, b[0], b[1]), b[2]), spearman, 5e-5)


TASKS: Final[dict[str, tuple[Callable[[Path, int], Task], int, str]]] = {
    "stsb": (stsb, 100, "Spearman correlation"),
    "cola": (cola, 600, "Matthews correlation"),
    "gpt": (gpt, 200, "nats a byte"),
    "resnet20": (resnet20, 40, "top-1, %"),
    "vit": (vit, 250, "top-1, %"),
}
"""Task → how it is made, steps, what its metric is."""


def waiting(task: Task, batch: Any) -> float:
    """Megabytes that autograd keeps for the way back, without parameters, each piece of memory once."""
    own = {p.untyped_storage().data_ptr() for p in task.model.parameters()}
    found: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        memory = x.untyped_storage()
        if memory.data_ptr() not in own:
            found[memory.data_ptr()] = memory.nbytes()
        return x

    kept = []  # what is freed would give its address to another
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), keep(x))[1], lambda x: x):
        task.loss(task.model, batch)
    return sum(found.values()) / 1e6


def train(make: Callable[[Path, int], Task], data: Path, method: str, seed: int, steps: int) -> dict[str, float]:
    torch.manual_seed(seed)
    task = make(data, seed)
    if method != "float32":
        name, options = VARIANTS.get(method, (method, {}))
        arrondi.convert_to_lowbit_training(task.model, name, **{"ignore": task.ignore, **options})
    task.model.train()
    first = next(task.batches)
    task.loss(task.model, first)  # learned steps begin with the first batch
    optimizer = torch.optim.AdamW(task.model.parameters(), task.rate)
    if method == "int8-unified":
        arrondi.follow_deviation(task.model, optimizer)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.rate, total_steps=steps)
    megabytes, losses, spent = waiting(task, first), [], []
    for _ in range(steps):
        batch = next(task.batches)
        start = time.process_time()
        optimizer.zero_grad()
        loss = task.loss(task.model, batch)
        loss.backward()
        optimizer.step()
        spent.append(time.process_time() - start)
        schedule.step()
        losses.append(float(loss.detach()))
    task.model.eval()
    with torch.no_grad():
        metric = task.metric()
    tail = losses[-max(steps // 10, 1) :]
    return {"metric": metric, "loss": sum(tail) / len(tail), "seconds": median(spent), "megabytes": megabytes}


def table(rows: list[dict[str, Any]], name: str, steps: int, what: str) -> None:
    print(f"\n{name}, {steps} steps, {what}\n{'':14s}  metric (least … most)        loss   CPU s a step   MB waiting")
    for method in METHODS:
        found = [row for row in rows if (row["task"], row["method"]) == (name, method)]
        if found:
            metrics = [row["metric"] for row in found]
            mean = {key: sum(row[key] for row in found) / len(found) for key in ("loss", "seconds", "megabytes")}
            print(
                f"{method:14s}  {sum(metrics) / len(metrics):7.3f} ({min(metrics):7.3f} … {max(metrics):7.3f})"
                f"  {mean['loss']:6.3f}   {mean['seconds']:8.3f}   {mean['megabytes']:9.1f}"
            )


def _seconds(layer: nn.Linear, tokens: int, dtype: torch.dtype, rounds: int) -> tuple[float, float]:
    """CPU seconds of a step, forward and backward, and of its forward part; best of several."""
    x = torch.randn(tokens, layer.in_features, dtype=dtype, requires_grad=True)
    slope = torch.randn(tokens, layer.out_features, dtype=dtype)
    both, forward = [], []
    for _ in range(rounds + 1):
        layer.weight.grad = x.grad = None
        start = time.process_time()
        y = layer(x)
        middle = time.process_time()
        y.backward(slope)
        both.append(time.process_time() - start)
        forward.append(middle - start)
    return min(both[1:]), min(forward[1:])


def _torchao(python: str, shape: tuple[int, int, int], rounds: int) -> None:
    """torchao's int8 training of the same layer, in an environment of its own, beside float32 there."""
    script = Path(__file__).parent / "peers" / "torchao_training.py"
    command = [python, script, *map(str, (*shape, rounds, torch.get_num_threads()))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"  torchao int8   {(done.stderr.strip() or 'failed').splitlines()[-1]}")
        return
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"  torchao int8   {found['float32'] / found['torchao']:5.2f} ×", flush=True)


def speed(shapes: tuple[tuple[int, int, int], ...], methods: list[str], rounds: int, torchao: str = "") -> None:
    print(f"A training step of a linear layer, {torch.get_num_threads()} threads: times of float32 over those of")
    for tokens, inputs, outputs in shapes:
        layer = nn.Linear(inputs, outputs)
        base, base_forward = _seconds(layer, tokens, torch.float32, rounds)
        half, _ = _seconds(nn.Linear(inputs, outputs, dtype=torch.bfloat16), tokens, torch.bfloat16, rounds)
        print(f"{tokens} tokens, {inputs} → {outputs}: float32 {base:.3f} CPU s, bfloat16 {base / half:.2f} ×")
        for method in methods:
            if method == "float32":
                continue
            arrondi.convert_to_lowbit_training(layer, method)
            whole, forward = _seconds(layer, tokens, torch.float32, rounds)
            arrondi.restore_training(layer)
            back = (base - base_forward) / max(whole - forward, 1e-9)
            print(f"  {method:14s} {base / whole:5.2f} ×   backward {back:5.2f} ×   {half / whole:5.2f} × bfloat16", flush=True)  # fmt: skip
        if torchao:
            _torchao(torchao, (tokens, inputs, outputs), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--shapes", help="tokens×inputs×outputs, several with commas")
    parser.add_argument("--peer", default="", help="torchao=PYTHON: its int8 training beside --speed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default=",".join(("float32", *PRODUCTS)), help=f"also {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=float, default=1.0, help="times the steps of each task")
    parser.add_argument("--rows", type=Path, help="file in which finished rows are kept and found again")
    args = parser.parse_args()
    methods = args.methods.split(",")
    if args.speed:
        given = [tuple(map(int, shape.split("x"))) for shape in (args.shapes or "").split(",") if shape]
        peer = args.peer.removeprefix("torchao=")
        speed(tuple((a, b, c) for a, b, c in given) or SHAPES, methods, args.rounds, peer)
    if args.data is None:
        return
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows and args.rows.exists() else []
    for name in args.tasks.split(","):
        make, steps, what = TASKS[name]
        steps = max(math.ceil(steps * args.steps), 10)
        for seed in range(args.seeds):
            for method in methods:
                key = {"task": name, "method": method, "seed": seed, "steps": steps}
                if not any(key.items() <= row.items() for row in rows):
                    rows.append(key | train(make, args.data, method, seed, steps))
                    if args.rows:
                        with args.rows.open("a") as file:
                            file.write(json.dumps(rows[-1]) + "\n")
        table([row for row in rows if row["steps"] == steps], name, steps, what)


if __name__ == "__main__":
    main()
