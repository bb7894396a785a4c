"""Write a Llama checkpoint of random weights: the model for timings and memory, where the values do not matter.

Owns: the presets (shapes only), the names of the tensors and the way they are cut into shards.  Uses: NumPy, torch
and safetensors; transformers only reads the result.  Nothing here imports the library under test.

Linear and embedding weights are normal with standard deviation 0.02, norm weights are one, all stored as bfloat16.
Each tensor has its own random stream, seeded by SHA-256 of `seed/name`, so a tensor has the same bytes whatever the
shard size or the number of layers around it. One shard at a time is in memory, and one band of rows of one tensor in
float32.

Worked size, `1.3b` with 32,000 tokens: 24 * (4 * 2048^2 + 3 * 2048 * 5632 + 2 * 2048) + 2 * 32000 * 2048 + 2048
= 1,364,297,728 parameters, 2.73e9 bytes.

    python benchmarks/make_llama.py OUT --size 57m --tokenizer DIR [--vocab N] [--shard-size 500MB] [--seed 0]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.torch import save_file

STD: Final = 0.02  # of every weight that is not a norm's
BYTES: Final = 2  # a bfloat16
BAND: Final = 1 << 22  # values drawn at once: 16 MiB of float32
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of a model; every width is a multiple of 128, so that the usual groups fit."""

    hidden: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    tied: bool = False
    vocab: int = 32_000  # when neither a tokenizer nor --vocab says otherwise


SIZES: Final = {
    "tiny": Size(hidden=128, layers=3, mlp=256, heads=4, kv_heads=2, vocab=512),
    "57m": Size(hidden=512, layers=16, mlp=1536, heads=8, kv_heads=8, tied=True),
    "0.5b": Size(hidden=1280, layers=24, mlp=3584, heads=20, kv_heads=20),
    "1.3b": Size(hidden=2048, layers=24, mlp=5632, heads=16, kv_heads=16),
}


def config(size: Size, vocab: int, bos: int | None, eos: int | None) -> dict[str, object]:
    """What goes into config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "dtype": "bfloat16",
        "eos_token_id": eos,
        "head_dim": size.hidden // size.heads,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "initializer_range": STD,
        "intermediate_size": size.mlp,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": size.tied,
        "vocab_size": vocab,
    }


def tensors(size: Size, vocab: int) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor, in the order of the model."""
    hidden, kv = size.hidden, size.hidden // size.heads * size.kv_heads
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(size.layers):
        block = f"model.layers.{layer}"
        yield f"{block}.input_layernorm.weight", (hidden,)
        for name, shape in (("q", (hidden, hidden)), ("k", (kv, hidden)), ("v", (kv, hidden)), ("o", (hidden, hidden))):
            yield f"{block}.self_attn.{name}_proj.weight", shape
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
        for name, shape in (("gate", (size.mlp, hidden)), ("up", (size.mlp, hidden)), ("down", (hidden, size.mlp))):
            yield f"{block}.mlp.{name}_proj.weight", shape
    yield "model.norm.weight", (hidden,)
    if not size.tied:
        yield "lm_head.weight", (vocab, hidden)


def draw(name: str, shape: Shape, seed: int) -> torch.Tensor:
    """The bfloat16 values of one tensor: a function of its name, its shape and the seed alone."""
    values = torch.ones(shape, dtype=torch.bfloat16)
    if len(shape) > 1:
        stream = np.random.default_rng(np.frombuffer(hashlib.sha256(f"{seed}/{name}".encode()).digest(), np.uint32))
        flat = values.view(-1)
        for start in range(0, flat.numel(), BAND):
            count = min(BAND, flat.numel() - start)
            flat[start : start + count] = torch.from_numpy(stream.standard_normal(count, np.float32)).mul_(STD)
    return values


def plan_shards(entries: list[tuple[str, Shape]], limit: int) -> list[list[tuple[str, Shape]]]:
    """Cut the tensors, in order, into shards of at most `limit` bytes; a tensor above the limit gets its own."""
    shards: list[list[tuple[str, Shape]]] = [[]]
    room = limit
    for name, shape in entries:
        size = prod(shape) * BYTES
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append((name, shape))
        room -= size
    return shards


def write_checkpoint(
    out: Path, size: Size, *, vocab: int | None = None, tokenizer: Path | None = None, shard_bytes: int, seed: int = 0
) -> int:
    """Write the checkpoint and return its number of parameters.

    Raises:
        FileExistsError: `out` already holds weights.
        ValueError: `vocab` is smaller than the vocabulary of the tokenizer.
    """
    if any(out.glob("*.safetensors")):
        raise FileExistsError(f"{out} already holds .safetensors files. Name another directory or remove them first.")
    known, bos, eos = tokenizer_facts(tokenizer) if tokenizer else (None, None, None)
    vocab = vocab or known or size.vocab
    if known and vocab < known:
        raise ValueError(f"--vocab must cover the tokenizer: got {vocab} for {known} tokens. Use at least {known}.")
    out.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        for file in TOKENIZER_FILES:
            shutil.copyfile(tokenizer / file, out / file)
    (out / "config.json").write_text(json.dumps(config(size, vocab, bos, eos), indent=2) + "\n")

    entries = list(tensors(size, vocab))
    shards = plan_shards(entries, shard_bytes)
    parameters = sum(prod(shape) for _, shape in entries)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: draw(name, shape, seed) for name, shape in shard}, out / file, metadata={"format": "pt"})
        where |= dict.fromkeys((name for name, _ in shard), file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": parameters * BYTES}, "weight_map": dict(sorted(where.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return parameters


def tokenizer_facts(directory: Path) -> tuple[int, int | None, int | None]:
    """Number of tokens, and the ids of BOS and EOS, read from the two files without loading a tokenizer."""
    stored = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids = dict(stored["model"]["vocab"]) | {token["content"]: token["id"] for token in stored["added_tokens"]}

    def identity(key: str) -> int | None:
        token = settings.get(key)
        return ids.get(token["content"] if isinstance(token, dict) else token)

    return max(ids.values()) + 1, identity("bos_token"), identity("eos_token")


def byte_count(text: str) -> int:
    """Bytes meant by `500MB`, `1.5GB`, `64KB` (powers of 1000) or a plain number.

    >>> byte_count("500MB")
    500000000
    """
    match = re.fullmatch(r"([0-9.]+)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"not a size: got {text!r}. Write it as 500MB, 2GB or a number of bytes.")
    return int(float(match[1]) * 1000 ** " KMG".index(match[2].upper() or " "))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a Llama checkpoint of random weights.")
    parser.add_argument("out", type=Path, help="directory to create")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--tokenizer", type=Path, help=f"directory whose {' and '.join(TOKENIZER_FILES)} are copied")
    parser.add_argument("--vocab", type=int, help="rows of the embedding; default: what the tokenizer has")
    parser.add_argument("--shard-size", type=byte_count, default=byte_count("500MB"), help="largest file (500MB)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    parameters = write_checkpoint(
        options.out,
        SIZES[options.size],
        vocab=options.vocab,
        tokenizer=options.tokenizer,
        shard_bytes=options.shard_size,
        seed=options.seed,
    )
    files = len(list(options.out.glob("*.safetensors")))
    print(f"{options.out}: {parameters:,} parameters, {parameters * BYTES:,} bytes of weights in {files} file(s)")


if __name__ == "__main__":
    main()
