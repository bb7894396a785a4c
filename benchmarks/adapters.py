"""What adapters over packed weights, 8-bit optimizers and saved activations in few bits cost and gain: the tables in docs/benchmarks.md.

    python benchmarks/adapters.py --model DIR --text FILE              all of it
    python benchmarks/adapters.py --model DIR --text FILE --parts starts,train --steps 60
    python benchmarks/adapters.py --parts beside --peer bitsandbytes=PYTHON

Parts: `starts`, the error of every start by scheme; `train`, fine-tuning on the text from every start beside LoRA on the ordinary weights (nats a token of the
last tenth); `optimizer`, nanoseconds a parameter and bytes of states beside PyTorch's AdamW; `saved`, bytes that wait for the way back, and
the time of a step; `beside`, 8-bit AdamW and a layer in NF4 beside bitsandbytes in an environment of its own. Times are CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import arrondi as ar
from arrondi.adapters.initial import Init, initialize
from arrondi.adapters.places import places
from arrondi.checkpoint import Checkpoint
from arrondi.model import OnDisk
from arrondi.pipeline import Recipe, TextOptions
from arrondi.repair.low_rank import nuclear_norm
from arrondi.tensor.nearest import fake_quantize
from arrondi.training.saved_bits import bits_by_sensitivity

SCHEMES: Final = ("NF4_DQ", "W4A16", "w=int3/g64/asym", "w=int2/g64/asym")
STARTS: Final = ("pissa", "qpissa", "loftq")


def starts(model: Path, rank: int, schemes: Sequence[str]) -> None:
    """Mean relative error ‖W - Q - B A‖ / ‖W‖ over all layers, and how much less the nuclear norm of the error is."""
    print(
        f"\nstarts of rank {rank}: mean relative error, and the nuclear norm's reduction\n{'scheme':<18}{'rounded':>9}",
        end="",
    )
    print("".join(f"{name:>20}" for name in STARTS))
    checkpoint = Checkpoint.open(model)
    weights = [place.weight(checkpoint) for name, place in places(OnDisk(checkpoint)).items() if name != "lm_head"]
    for word in schemes:
        scheme = ar.parse_scheme(word).weights

        def rounded(weight: torch.Tensor, scheme: ar.Scheme = scheme) -> torch.Tensor:
            return fake_quantize(weight, scheme)

        alone = [w - rounded(w) for w in weights]
        mean = sum(float(e.norm() / w.norm()) for e, w in zip(alone, weights, strict=True)) / len(weights)
        print(f"{word:<18}{mean:9.4f}", end="", flush=True)
        for name in STARTS:
            errors, less = [], []
            for weight, error in zip(weights, alone, strict=True):
                start = Init(name, rank).start(weight, rounded)
                left = weight - rounded(start.rest) - start.factors.product
                errors.append(float(left.norm() / weight.norm()))
                less.append(1 - nuclear_norm(left) / nuclear_norm(error))
            print(f"{sum(errors) / len(errors):12.4f} {100 * sum(less) / len(less):5.1f} %", end="", flush=True)
        print()


def windows(model: Path, text: Path, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the text but its last tenth, and of that."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8"))["input_ids"])
    rows = ids[: len(ids) // length * length].view(-1, length)
    cut = len(rows) * 9 // 10
    return rows[:cut], rows[cut:]


@torch.no_grad()
def nats(model: Any, rows: torch.Tensor) -> float:
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in rows.split(8)]
    model.train()
    return sum(losses) / len(rows)


def tuned(
    model: Any, data: tuple[torch.Tensor, torch.Tensor], steps: int, rate: float, looks: int
) -> tuple[list[float], float]:
    """Losses on what was held out, before and as it goes, and CPU seconds a step."""
    train, held = data[0], data[1][:32]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    draw, found, spent = torch.Generator().manual_seed(0), [nats(model, held)], 0.0
    for step in range(steps):
        rows = train[torch.randint(len(train), (8,), generator=draw)]
        begun = time.process_time()
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        spent += time.process_time() - begun
        if (step + 1) % max(steps // looks, 1) == 0:
            found.append(nats(model, held))
    return found, spent / max(steps, 1)


def train(model: Path, text: Path, rank: int, steps: int, length: int, rate: float, inits: Sequence[str]) -> None:
    """Fine-tuning from every start."""
    import peft

    warnings.simplefilter("ignore", FutureWarning)  # transformers renames what peft asks for
    data = windows(model, text, length)
    print(f"\nfine-tuning, rank {rank}, {steps} steps of 8 windows of {length} tokens: nats a token of held-out text")
    with tempfile.TemporaryDirectory() as folder:
        seen, words = Path(folder) / "seen.txt", text.read_text(encoding="utf-8")
        seen.write_text(words[: len(words) * 9 // 10], encoding="utf-8")
        for name in inits:
            torch.manual_seed(0)
            if name == "dense":
                config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
                made = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
            else:
                base = Path(folder) / name
                given = TextOptions(seen if name == "eora" else None, samples=32, seq_len=length, evaluate=False)
                initialize(model, base, Init(name, rank), Recipe.simple("NF4_DQ"), text=given)
                made = peft.PeftModel.from_pretrained(ar.load(base), base / "adapter", is_trainable=True)
            losses, seconds = tuned(made, data, steps, rate, 4)
            label = "LoRA on ordinary weights" if name == "dense" else f"NF4_DQ, {name}"
            print(
                f"{label:<26}" + " ".join(f"{loss:7.4f}" for loss in losses) + f"   {seconds:6.3f} s a step", flush=True
            )


def fastest(run: Callable[[], Any], rounds: int) -> float:
    """CPU seconds of the quickest of some runs, after one to warm up."""
    run()
    found = []
    for _ in range(rounds):
        begun = time.process_time()
        run()
        found.append(time.process_time() - begun)
    return min(found)


def optimizer(count: int, rounds: int) -> None:
    """A step on one tensor."""
    kinds: list[tuple[str, Callable[[list[nn.Parameter]], Any]]] = [
        ("torch AdamW", lambda p: torch.optim.AdamW(p)),
        ("torch AdamW, foreach", lambda p: torch.optim.AdamW(p, foreach=True)),
        ("torch AdamW, fused", lambda p: torch.optim.AdamW(p, fused=True)),
        ("arrondi AdamW8bit", lambda p: ar.optim.AdamW8bit(p)),
        ("torch SGD, momentum", lambda p: torch.optim.SGD(p, momentum=0.9)),
        ("arrondi Momentum8bit", lambda p: ar.optim.Momentum8bit(p)),
    ]
    print(f"\na step on {count:,} parameters: ns and bytes of states a parameter")
    for name, make in kinds:
        p = nn.Parameter(torch.randn(count))
        p.grad = torch.randn(count) * 0.01
        made = make([p])
        seconds = fastest(made.step, rounds)
        states = (
            made.state_nbytes
            if hasattr(made, "state_nbytes")
            else sum(v.nbytes for k, v in made.state[p].items() if k != "step")
        )
        print(f"{name:<26}{1e9 * seconds / count:8.2f} {states / count:8.3f}", flush=True)


def beside(python: str, count: int, rounds: int, shape: tuple[int, int, int] = (512, 2048, 2048)) -> None:
    """A step on one tensor, and an NF4 layer forward and back to its input, here and by bitsandbytes."""
    tokens, inputs, outputs = shape
    script = Path(__file__).parent / "peers" / "bitsandbytes_training.py"
    command = [python, str(script), *map(str, (count, *shape, rounds))]
    theirs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    p = nn.Parameter(torch.randn(count))
    p.grad = torch.randn(count) * 0.01
    made = ar.optim.AdamW8bit([p])
    layer = ar.quantize(nn.Sequential(nn.Linear(inputs, outputs, bias=False)), "NF4_DQ")
    x, slope = torch.randn(tokens, inputs, requires_grad=True), torch.randn(tokens, outputs)
    ours = {"step": fastest(made.step, rounds), "states": made.state_nbytes}
    ours |= {"layer": fastest(lambda: layer(x).backward(slope), rounds), "weight": layer[0].weight_nbytes}
    print(f"\nAdamW8bit on {count:,} parameters; NF4 with double quantization, {tokens} tokens, {inputs} → {outputs}")
    for name, row in (("arrondi", ours), ("bitsandbytes", theirs)):
        print(
            f"{name:<14} step {1e9 * row['step'] / count:6.2f} ns a parameter, states {row['states'] / count:6.3f} bytes; "
            f"layer {row['layer']:6.4f} CPU s, weight {row['weight']:,} bytes"
        )


def saved(model: Path, text: Path, length: int, rounds: int, mixed: Sequence[float] = (4, 3)) -> None:
    """One step of training all parameters; `mixed`, bits by tensor at these averages."""
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    rows = windows(model, text, length)[0][:8]
    print(
        f"\na step on 8 windows of {length} tokens: MB that wait for the way back, CPU seconds, the gradient's relative error"
    )
    exact: list[torch.Tensor] = []
    uneven = {
        f"{b} mixed": bits_by_sensitivity(net, lambda: net(input_ids=rows[:2], labels=rows[:2]).loss, b) for b in mixed
    }
    for name, bits in {"32": 32, "8": 8, "4": 4, "2": 2, **uneven}.items():
        sizes = []

        def step(bits: Any = bits, sizes: list[int] = sizes) -> None:
            net.zero_grad()
            if bits == 32:
                net(input_ids=rows, labels=rows).loss.backward()
                return
            with ar.compress_saved_activations(bits=bits) as kept:
                loss = net(input_ids=rows, labels=rows).loss
            sizes[:] = [kept.plain_bytes, kept.kept_bytes]
            loss.backward()

        seconds = fastest(step, rounds)
        grads = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        exact = exact or [g.clone() for g in grads]
        off = float((torch.cat(grads) - torch.cat(exact)).norm() / torch.cat(exact).norm())
        size = "" if not sizes else f"{sizes[1] / 1e6:8.2f} of {sizes[0] / 1e6:8.2f}"
        print(f"{name:>8} bits {size:>24} {seconds:8.3f} {off:8.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--peer", default="", help="bitsandbytes=PYTHON, for the part beside")
    parser.add_argument("--parts", default="starts,optimizer,saved,train")
    parser.add_argument("--schemes", default=";".join(SCHEMES))
    parser.add_argument("--inits", default="dense,lora,pissa,qpissa,loftq,eora", help="of the part train")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--count", type=int, default=1 << 22)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    parts = given.parts.split(",")
    if "beside" in parts:
        beside(given.peer.removeprefix("bitsandbytes="), given.count, given.rounds)
    if "starts" in parts:
        starts(given.model, given.rank, given.schemes.split(";"))
    if "optimizer" in parts:
        optimizer(given.count, given.rounds)
    if "saved" in parts:
        saved(given.model, given.text, given.length, given.rounds)
    if "train" in parts:
        train(given.model, given.text, given.rank, given.steps, given.length, given.rate, given.inits.split(","))


if __name__ == "__main__":
    main()
