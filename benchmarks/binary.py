"""Transformers of one and two bits, trained on real data: a sentence encoder taught by its float self, a language model from scratch.

    python benchmarks/binary.py --data DIR [--parts encoder,language] [--steps 150] [--seeds 1] [--json]

encoder: MiniLM (6 layers) learns from itself in float on sentences of CoLA and of STS-B dev; measured is Spearman's correlation on STS-B test.
language: a BitNet (transformers' BitNetForCausalLM, norms in front of every linear) learns the first nine tenths of Emma; measured is the loss, in nats a
token, on the last one. Every figure of a trained network is of the packed one, saved and loaded by `arrondi.load`; "afterwards" is the float
network rounded without training. Bytes are those of the weight files.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import arrondi
from arrondi.training.bibert import binarize_bert
from arrondi.training.distill import attended, direction_loss, hidden_loss
from arrondi.training.models import make_latent, pack, split_ternary

Row = dict[str, Any]
WORDS = "embeddings.word_embeddings"


def rows_of(path: Path, delimiter: str) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(
            csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL)
        )


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of ranks; equal numbers share theirs."""
    ranks = []
    for x in (a, b):
        _, inverse, counts = x.double().unique(return_inverse=True, return_counts=True)
        ends = counts.cumsum(0)
        ranks.append((ends - (counts - 1) / 2)[inverse])
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def vector(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the tokens, of length 1."""
    weights = mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


class Sentences:
    """A tokenizer, sentences to learn from, and pairs to measure on."""

    def __init__(self, data: Path, pairs: int) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(data / "minilm-l6")
        dev = rows_of(data / "sts-b" / "stsb-en-dev.csv", ",")
        cola = rows_of(data / "cola" / "in_domain_train.tsv", "\t")
        self.learned = [r[3] for r in cola] + [s for r in dev for s in r[:2]]
        self.pairs = rows_of(data / "sts-b" / "stsb-en-test.csv", ",")[:pairs]

    def batches(self, size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Without end."""
        g = torch.Generator().manual_seed(seed)
        while True:
            chosen = [self.learned[i] for i in torch.randint(0, len(self.learned), (size,), generator=g)]
            yield self.encoded(chosen)

    def encoded(self, texts: list[str]) -> dict[str, torch.Tensor]:
        return dict(self.tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt"))

    @torch.no_grad()
    def correlation(self, model: Any) -> tuple[float, float]:
        """Spearman's of cosine and score, and milliseconds a sentence."""
        texts = [s for row in self.pairs for s in row[:2]]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = torch.empty(len(texts), model.config.hidden_size)
        start = time.perf_counter()
        for part in torch.tensor(order).split(32):
            x = self.encoded([texts[i] for i in part])
            found[part] = vector(model(**x).last_hidden_state, x["attention_mask"])
        seconds = time.perf_counter() - start
        cosine = (found[::2] * found[1::2]).sum(1)
        return spearman(cosine, torch.tensor([float(r[2]) for r in self.pairs])), 1000 * seconds / len(texts)


def taught(
    student: Any, teacher: Any, data: Sentences, args: argparse.Namespace, seed: int, *, directions: bool = False
) -> float:
    """Train by the teacher's hidden states and sentence vectors, and directions of queries, keys and values; seconds a step."""
    optimizer = torch.optim.Adam(student.train().parameters(), args.rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, args.steps)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batches, start = data.batches(args.batch, seed), time.perf_counter()
    for _ in range(args.steps):
        x = next(batches)
        mask = x["attention_mask"]
        with attended(teacher) as wanted, torch.no_grad():
            right = teacher(**x, output_hidden_states=True)
        with attended(student) as own:
            found = student(**x, output_hidden_states=True)
        cosine = F.cosine_similarity(vector(found.last_hidden_state, mask), vector(right.last_hidden_state, mask))
        loss = hidden_loss(found.hidden_states, right.hidden_states, mask) + 5 * (1 - cosine).mean()
        if directions:
            loss = loss + direction_loss(own, wanted, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    student.eval()
    return (time.perf_counter() - start) / args.steps


def loaded(model: Any, folder: Path) -> tuple[Any, int]:
    """A model as `arrondi.load` gives it after it was packed and saved, and the bytes of its weights."""
    arrondi.save(model, folder)
    return arrondi.load(folder), sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def encoder(args: argparse.Namespace, seed: int, say: Callable[[Row], None]) -> None:
    """All rows of the encoder."""
    data = Sentences(args.data, args.pairs)
    teacher = arrondi.load(args.data / "minilm-l6", fuse=False)
    ways: dict[str, Callable[[Any], Any]] = {
        "twn": lambda m: make_latent(m, "twn", targets=("Linear", WORDS), inputs="int8/token"),
        "bitnet": lambda m: make_latent(m, "bitnet", targets=("Linear", WORDS)),
        "binary": lambda m: make_latent(m, "binary", targets=("Linear", WORDS), inputs="int8/token"),
        "bibert": binarize_bert,
        "bibert 50 %": lambda m: binarize_bert(m, half=True),
    }

    def row(name: str, model: Any, size: int, seconds: float = 0.0) -> None:
        found, each = data.correlation(model)
        say(
            {
                "network": "MiniLM",
                "method": name,
                "seed": seed,
                "metric": "Spearman",
                "value": found,
                "bytes": size,
                "step_s": seconds,
                "sentence_ms": each,
            }
        )

    row("float32", teacher, sum(p.numel() * 4 for p in teacher.parameters()))
    for name, scheme in (("ternary afterwards", "TERNARY"), ("binary afterwards", "w=binary/channel")):
        with tempfile.TemporaryDirectory() as folder:
            rounded = arrondi.quantize(copy.deepcopy(teacher), scheme, embeddings=scheme)
            row(name, *loaded(rounded, Path(folder) / "out"))
    kept: dict[str, Any] = {}
    for name in args.methods:
        torch.manual_seed(seed)
        if name == "split":  # goes on from the ternary network
            student = split_ternary(copy.deepcopy(kept["twn"]))
        else:
            student = ways[name](copy.deepcopy(teacher))
        for parameter in student.parameters():
            parameter.requires_grad_()
        seconds = taught(student, teacher, data, args, seed, directions=name.startswith("bibert"))
        kept[name] = copy.deepcopy(student) if name == "twn" else None
        with tempfile.TemporaryDirectory() as folder:
            row(name, *loaded(pack(student), Path(folder) / "out"), seconds)


def language(args: argparse.Namespace, seed: int, say: Callable[[Row], None]) -> None:
    """All rows of the language model."""
    from transformers import AutoTokenizer, BitNetConfig, BitNetForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(args.data / "books-llama-6m")
    text = (args.data / "text" / "emma.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    cut = int(0.9 * len(ids))
    held = ids[cut : cut + 128 * args.windows].view(-1, 128)
    config = BitNetConfig(
        vocab_size=len(tokenizer), hidden_size=args.width, intermediate_size=3 * args.width, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip

    @torch.no_grad()
    def row(name: str, model: Any, size: int, seconds: float = 0.0) -> None:
        start = time.perf_counter()
        loss = sum(float(model(input_ids=w, labels=w).loss) * len(w) for w in held.split(8)) / len(held)
        each = 1000 * (time.perf_counter() - start) / len(held)
        say(
            {
                "network": "BitNet",
                "method": name,
                "seed": seed,
                "metric": "loss",
                "value": loss,
                "bytes": size,
                "step_s": seconds,
                "sentence_ms": each,
            }
        )

    for name in ("float32", "bitnet", "twn"):
        torch.manual_seed(seed)
        model = BitNetForCausalLM(config)
        if name != "float32":
            make_latent(model, name)
        g = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(
            model.parameters(), args.language_rate * (1 if name == "float32" else 1.5), weight_decay=0.0
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, optimizer.param_groups[0]["lr"], total_steps=args.language_steps
        )
        start = time.perf_counter()
        for _ in range(args.language_steps):
            first = torch.randint(0, cut - 128, (8, 1), generator=g)
            window = ids[first + torch.arange(128)]
            optimizer.zero_grad()
            model(input_ids=window, labels=window).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        seconds = (time.perf_counter() - start) / args.language_steps
        model.eval()
        if name == "float32":
            row(name, model, sum(p.numel() * 4 for p in model.parameters()), seconds)
            for after in ("w=ternary/tensor,a=int8/token", "TERNARY"):
                with tempfile.TemporaryDirectory() as folder:
                    row(
                        f"{after} afterwards",
                        *loaded(arrondi.quantize(copy.deepcopy(model), after), Path(folder) / "out"),
                    )
            continue
        with tempfile.TemporaryDirectory() as folder:
            row(name, *loaded(pack(model), Path(folder) / "out"), seconds)


PARTS = {"encoder": encoder, "language": language}


def said(row: Row) -> str:
    """A line of the table."""
    step = f"{row['step_s']:.2f} s a step" if row["step_s"] else ""
    return f"{row['network']:<8}{row['method']:<40}{row['metric']:<9}{row['value']:8.4f}{row['bytes']:>13,} B{row['sentence_ms']:9.1f} ms  {step}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--parts", type=lambda s: s.split(","), default=list(PARTS))
    parser.add_argument(
        "--methods", type=lambda s: s.split(","), default=["twn", "split", "bitnet", "binary", "bibert", "bibert 50 %"]
    )
    parser.add_argument("--steps", type=int, default=150, help="of the encoder, for each method")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--pairs", type=int, default=1379)
    parser.add_argument("--language-steps", type=int, default=300)
    parser.add_argument("--language-rate", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument(
        "--windows", type=int, default=64, help="of 128 tokens of the language model's text to measure on"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows: list[Row] = []

    def say(row: Row) -> None:
        rows.append(row)
        if not args.json:
            print(said(row), flush=True)

    for part in args.parts:
        for seed in range(args.seeds):
            PARTS[part](args, seed, say)
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
