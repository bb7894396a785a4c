"""Rounded keys and values: memory and milliseconds a token at long contexts, and what they cost in KL.

    python benchmarks/kv.py                                             # memory and time
    python benchmarks/kv.py --model MODEL --text FILE --also QUANTIZED  # KL

Memory and time are those of a Llama with random weights in bfloat16 (`--hidden`, `--layers`, …): its cache is filled with random
states, not by reading a text, and then single tokens are decoded by the loop of `arrondi run`. All kinds run in turns.

KL is that of `arrondi eval --kv`: windows of real text, read `--chunk` tokens at a time through the cache, against the original that
reads each window at once. With `--also`, a quantized copy of the model reads through the caches too, against the same original: then
the first line is what its weights cost, and the column behind KL is by how much the cache adds to that.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import arrondi
from arrondi.measure.data import read_windows
from arrondi.measure.text import load_tokenizer
from arrondi.native import kernel_threads
from arrondi.runtime.attention import own_attention
from arrondi.runtime.cache import growing_cache
from arrondi.runtime.kv.layer import PackedLayer
from arrondi.runtime.kv.measure import compare_with_cache

PIECE = 1024
"""Tokens that a cache is filled with at once."""


def random_llama(options: argparse.Namespace, positions: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=options.hidden * 11 // 4, num_hidden_layers=options.layers,
        num_attention_heads=options.heads, num_key_value_heads=options.kv_heads, head_dim=options.width, vocab_size=1000,
        max_position_embeddings=positions, dtype=torch.bfloat16,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


def known(model: Any, kind: str) -> Any:
    """What a kind has to know of the random model, from random words."""
    words = torch.randint(1000, (1, 512), generator=torch.Generator().manual_seed(1))
    return arrondi.calibrate_cache(model, kind, [words])


def filled(model: Any, kind: str, length: int) -> Any:
    """A cache that holds so many tokens of random states."""
    cache = (
        growing_cache(model) if kind == "full" else arrondi.kv_cache(model, kind, clips=known(model, kind), lazily=True)
    )
    heads, width = model.config.num_key_value_heads, model.config.head_dim
    generator = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        for start in range(0, length, PIECE):
            shape = (2, 1, heads, min(PIECE, length - start), width)
            layer.update(*torch.randn(shape, generator=generator).to(torch.bfloat16))
    return cache


def megabytes(cache: Any) -> float:
    """What is kept, without room for tokens to come."""
    if any(isinstance(layer, PackedLayer) for layer in cache.layers):
        return cache.bytes_used() / 1e6
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 1e6


@torch.no_grad()
def decode(model: Any, cache: Any, count: int) -> list[float]:
    """Milliseconds of each token."""
    times = []
    with own_attention(model):
        for i in range(count):
            started = time.perf_counter()
            with kernel_threads(alone=True):
                model(torch.tensor([[i % 1000]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            times.append((time.perf_counter() - started) * 1e3)
    return times


def speed(options: argparse.Namespace) -> None:
    lengths = [int(n) for n in options.lengths.split(",")]
    model = random_llama(options, max(lengths) + 1000)
    print(
        f"Llama of random weights, bfloat16: {options.layers} layers, {options.hidden} wide, {options.heads} heads of {options.width}, {options.kv_heads} for keys and values; {torch.get_num_threads()} threads"
    )
    print(f"{'tokens':>7s}  {'cache':14s} {'MB':>8s} {'of full':>8s} {'ms a token':>11s} {'best':>8s} {'of full':>8s}")
    for length in lengths:
        caches = {kind: filled(model, kind, length) for kind in ["full", *options.kinds]}
        times: dict[str, list[float]] = {kind: [] for kind in caches}
        for _ in range(options.rounds):
            for kind, cache in caches.items():
                times[kind] += decode(model, cache, options.decode)
        size, best = megabytes(caches["full"]), min(times["full"])
        for kind, cache in caches.items():
            print(
                f"{length:7,d}  {kind:14s} {megabytes(cache):8.1f} {megabytes(cache) / size:7.1%} {statistics.median(times[kind]):11.2f} {min(times[kind]):8.2f} {min(times[kind]) / best:7.1%}",
                flush=True,
            )


def calibrated(path: str, kind: str, options: argparse.Namespace) -> Any:
    """What a kind has to know of a model, from the calibration text."""
    if options.calibration is None:
        return None
    windows = read_windows(Path(options.calibration), load_tokenizer(Path(path)), options.seq_len, "calibration text")
    return arrondi.calibrate_cache(arrondi.load(path), kind, windows.ids[:16].split(4))


def cost(options: argparse.Namespace) -> None:
    for path in [options.model, *options.also]:
        base = None
        for kind in ["full", *options.kinds]:
            clips = calibrated(path, kind, options)
            found = compare_with_cache(
                path, options.model, Path(options.text), kind, seq_len=options.seq_len, samples=options.windows, chunk=options.chunk, clips=clips
            )  # fmt: skip
            if base is None:
                print(
                    f"{Path(path).name}: {found['protocol'].partition(', read')[0]}; {options.chunk} tokens at a time"
                )
                base = found["kl_mean"]
            low, high = found["kl_mean_interval"]
            more = f"{found['kl_mean'] / base - 1:+8.1%}" if base > 1e-6 else f"{'':8s}"
            print(
                f"  {kind:14s} KL {found['kl_mean']:.6f} ({low:.6f} … {high:.6f}) {more}   perplexity {found['perplexity_increase']:+.3%}   top-1 {found['top1_agreement']:.2%}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", default=["int8", "int4", "int4-rotated", "kivi4", "kivi2", "pca2"])
    parser.add_argument("--model", help="model directory; then KL is measured instead of time")
    parser.add_argument("--text", help="text that the model has not seen")
    parser.add_argument("--calibration", help="text for kinds that are calibrated: pca2, int8-static")
    parser.add_argument("--also", action="append", default=[], help="a quantized copy of the model; repeatable")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--lengths", default="1024,8192,32768")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--decode", type=int, default=8, help="tokens of a turn")
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    if options.model and not options.text:
        parser.error("--model needs --text")
    cost(options) if options.model else speed(options)


if __name__ == "__main__":
    main()
