"""A fuzzer of the reader of GGUF: `python -m tests.fuzz.gguf --seconds 60 --seed 1`.

Every mutant of a small file either raises an ArrondiError of one line that names the file, or is read as the package gguf decodes the same bytes
of it. A traceback, a hang of more than five seconds, an allocation far beyond the file's size and a number that is silently another one are
failures.
"""

from __future__ import annotations

import argparse
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers

from arrondi.checkpoint import Checkpoint
from arrondi.checkpoint.containers.gguf.encode import GGUFPlan, GGUFWriter
from arrondi.checkpoint.containers.gguf.header import Field, Header, read_header
from arrondi.errors import ArrondiError
from tests.fuzz.checkpoints import Result, limited

KINDS = ("header", "model")
_NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    9,
    16,
    31,
    32,
    33,
    64,
    255,
    256,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63,
    2**64 - 1,
)
_WORDS = (
    b"general.architecture",
    b"llama",
    b"gpt2",
    b"general.alignment",
    b"blk.0.attn_q.weight",
    b"token_embd.weight",
    b"",
    b"\xff\xfe",
    b"F32",
)
_ALLOCATED = 256 << 20
"""Bytes by which the process may grow: what the libraries that read configs take once, and nothing of what a header claims."""
_TYPES = ("Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL", "F32", "F16", "BF16")
_STRING, _UINT32, _FLOAT32, _ARRAY = 8, 4, 6, 9


@cache
def bases() -> dict[str, bytes]:
    """Unmutated files: one of every kind of value and several types, and a whole small model."""
    fields = {
        "general.architecture": Field(_STRING, None, "llama"),
        "general.alignment": Field(_UINT32, None, 32),
        "a": Field(_ARRAY, _FLOAT32, [1.0, 2.0, -1.0]),
        "b": Field(_ARRAY, _STRING, ["x", "", "é"]),
        "c": Field(7, None, True),
        "d": Field(11, None, -5),
    }
    sizes = {
        "context_length": 64, "embedding_length": 256, "block_count": 1, "feed_forward_length": 256,
        "attention.head_count": 4, "attention.head_count_kv": 4, "vocab_size": 32,
    }  # fmt: skip
    model = {f"llama.{k}": Field(_UINT32, None, v) for k, v in sizes.items()} | {
        "general.architecture": Field(_STRING, None, "llama"),
        "llama.attention.layer_norm_rms_epsilon": Field(_FLOAT32, None, 1e-5),
    }
    square = (256, 256)
    tensors = {
        "token_embd.weight": ("F16", (32, 256)), "output_norm.weight": ("F32", (256,)), "output.weight": ("Q8_0", (32, 256)),
        "blk.0.attn_norm.weight": ("F32", (256,)), "blk.0.ffn_norm.weight": ("F32", (256,)), "blk.0.attn_q.weight": ("Q4_K", square),
        "blk.0.attn_k.weight": ("Q4_0", square), "blk.0.attn_v.weight": ("Q6_K", square), "blk.0.attn_output.weight": ("IQ4_NL", square),
        "blk.0.ffn_gate.weight": ("Q2_K", square), "blk.0.ffn_up.weight": ("Q5_K", square), "blk.0.ffn_down.weight": ("Q3_K", square),
    }  # fmt: skip
    plain = {f"t.{kind}": (kind, (2, 256)) for kind in _TYPES}
    return {"header": _file(fields, plain), "model": _file(model, tensors)}


def _file(fields: dict[str, Field], tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """A file whose blocks are small floats and any codes."""
    import gguf

    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        writer = GGUFWriter(path, GGUFPlan(fields, tensors))
        for name, (kind, shape) in tensors.items():
            values = rng.standard_normal(shape, dtype=np.float32)
            number = gguf.GGMLQuantizationType[kind]
            try:
                raw = gguf.quantize(values, number)
            except NotImplementedError:  # which the package only decodes: zeros in its scales are as good as any
                elements, nbytes = gguf.GGML_QUANT_SIZES[number]
                raw = rng.integers(0, 32, (shape[0], shape[1] // elements * nbytes), dtype=np.uint8)
            writer.put(name, torch.from_numpy(np.ascontiguousarray(raw)))
        writer.publish()
        return path.read_bytes()


def mutant(raw: bytes, rng: random.Random) -> bytes:
    """One to three mutations, most of them in the header."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        raw = _mutated(raw, rng)
    return raw


def _mutated(raw: bytes, rng: random.Random) -> bytes:
    if not raw:
        return raw
    i = rng.randrange(len(raw) if rng.random() < 0.2 else min(len(raw), 1500))
    kind = rng.randrange(9)
    if kind == 0:
        return raw[:i]
    if kind == 1:
        return raw[:i] + bytes([rng.randrange(256)]) + raw[i + 1 :]
    if kind == 2:
        return raw[:i] + raw[i + rng.randrange(1, 40) :]
    if kind == 3:
        return raw[:i] + raw[i : i + rng.randrange(1, 80)] + raw[i:]
    if kind == 4:
        return raw[:i] + bytes([raw[i] ^ 1 << rng.randrange(8)]) + raw[i + 1 :]
    if kind == 5:  # a number where one of that width may be
        width, code = rng.choice([(4, "<I"), (8, "<Q")])
        return raw[:i] + struct.pack(code, rng.choice(_NUMBERS) % 2 ** (8 * width)) + raw[i + width :]
    if kind == 6:  # one of the numbers at the front: version, tensors, keys
        at, code = rng.choice([(4, "<I"), (8, "<Q"), (16, "<Q")])
        new = struct.pack(code, rng.choice(_NUMBERS) % 2 ** (32 if code == "<I" else 64))
        return raw[:at] + new + raw[at + len(new) :]
    if kind == 7:  # a word, with its length
        word = rng.choice(_WORDS)
        return raw[:i] + struct.pack("<Q", len(word)) + word + raw[i:]
    return _known_number(raw, rng)


def _known_number(raw: bytes, rng: random.Random) -> bytes:
    """A size, a type or an offset of a tensor, or a number of a key, changed where it lies."""
    names = [b"t.", b".weight", b"llama.", b"general.alignment", b"norm", b"block_count", b"head_count"]
    name = rng.choice(names)
    found = [i for i in range(len(raw[:1600])) if raw.startswith(name, i)]
    if not found:
        return raw
    at = rng.choice(found) + len(name) + rng.randrange(0, 44)
    new = struct.pack("<I", rng.choice(_NUMBERS) % 2**32)
    return raw[:at] + new + raw[at + 4 :]


def verdict(raw: bytes, kind: str, folder: Path) -> str | None:
    """What is wrong with how a mutant is read, None if nothing is."""
    path = folder / "m.gguf"
    path.write_bytes(raw)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        header = read_header(path)
        checkpoint = Checkpoint.open(path) if kind == "model" else None
        if checkpoint is not None:
            checkpoint.verify()
            for name in checkpoint.names:
                checkpoint.dense(name)
    except ArrondiError as error:
        message = str(error)
        if "\n" in message or "m.gguf" not in message:
            return f"a message of several lines, or without the file: {message!r}"
    except Exception:
        return "a traceback: " + traceback.format_exc(limit=-3)
    else:
        return _unlike_gguf(header, raw) or _grown(before)
    return _grown(before)


def _grown(before: int) -> str | None:
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{(after - before) >> 10} MiB more than before" if (after - before) << 10 > _ALLOCATED else None


def _unlike_gguf(header: Header, raw: bytes) -> str | None:
    """What the header says beside the package's own reading of the file; None if both say the same."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(header.path)
    except Exception:
        return None  # it asks for more than the format does, and does not say what
    theirs = {
        t.name: (t.tensor_type.name, tuple(int(n) for n in t.shape)[::-1], int(t.data_offset)) for t in reader.tensors
    }
    ours = {
        n.encode("utf-8", "surrogateescape").decode("utf-8", "replace"): (s.type, s.shape, s.start)
        for n, s in header.tensors.items()
    }
    if theirs.keys() == ours.keys() and theirs != ours:
        name = next(n for n in ours if ours[n] != theirs[n])
        return f"{name} is {ours[name]}, and {theirs[name]} to the package gguf"
    return None


def run(seed: int, mutants: int, seconds: float, kinds: tuple[str, ...] = KINDS) -> Result:
    """As many mutants of every kind as asked for, or as the time allows."""
    transformers.logging.set_verbosity_error()
    result, stop = Result(read=Counter()), time.monotonic() + seconds
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for kind in kinds:
            if wrong := verdict(bases()[kind], kind, Path(folder)):  # imports are no hang and no allocation of a mutant
                result.failures.append(f"{kind}: {wrong}")
        for number in range(mutants):
            for kind in kinds:
                if time.monotonic() > stop:
                    return result
                key = f"{seed}-{kind}-{number}"
                raw = mutant(bases()[kind], random.Random(key))
                with limited(5):
                    wrong = verdict(raw, kind, Path(folder))
                result.mutants += 1
                result.read[kind] += 1
                if wrong:
                    result.failures.append(f"{key}: {wrong}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutants", type=int, default=1_000_000, help="of every kind")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--kind", choices=KINDS, action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = run(options.seed, options.mutants, options.seconds, tuple(options.kind or KINDS))
    for failure in result.failures[:20]:
        print(failure, file=sys.stderr)
    counts = ", ".join(f"{n} {kind}" for kind, n in result.read.items())
    print(f"{result.mutants} mutants ({counts}), {len(result.failures)} failures, seed {options.seed}")
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
