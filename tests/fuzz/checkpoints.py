"""A fuzzer of the checkpoint readers: `python -m tests.fuzz.checkpoints --seconds 60 --seed 1`.

Every mutant of a small checkpoint either gives exactly the unmutated numbers, or those that the compressed-tensors package itself
gives for the mutant (of other tools' layouts: a plain decoder), or raises an ArrondiError. A traceback, a hang of more than five seconds and a number that is silently another
one are failures. Mutations that change numbers in a legitimate way (scales, codes) are not made.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from arrondi.checkpoint import LAYOUTS, Checkpoint, LayerValues, ModelFacts, Placed
from arrondi.checkpoint.layouts.bitsandbytes.blocks import nested_scheme
from arrondi.errors import ArrondiError
from arrondi.formats import Scheme, parse_scheme
from arrondi.tensor.nearest import quantize_tensor
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.turned import Sides
from tests.checkpoint.copies import static_grid
from tests.checkpoint.layouts.plain import decoded
from tests.fuzz.inputs import inputs_apart
from tests.fuzz.mutations import mutate_header, mutate_json, mutate_small, mutate_text

READERS = {
    "compressed-tensors": [
        "w=int4/g32", "w=int3/g32/asym", "w=int4/channel/asym", "w=int8/channel,a=int8/token", "w=int8/channel,a=int8/tensor/asym/static",
        "w=fp8/tensor,a=fp8/tensor/static", "w=fp8/b32x32,a=fp8/g32", "NVFP4", "MXFP4", "MXFP8A16", "w=int5/g16/bfloat16", "mixed", "indexed",
    ],
    "arrondi": [
        "w=int4/g32/asym", "NF4", "TERNARY", "T158", "NVFP4", "w=int3/g32/offset", "w=int8/channel,a=int8/tensor/asym/static", "BINARY", "w=fp6_e2m3/g32/e8m0",
        "w=dynamic8/channel", "mixed", "indexed", "stack",
    ],
    "gptq": ["w=int4/g32", "w=int3/g32/asym", "w=int8/channel/asym", "mixed", "indexed"],
    "awq": ["w=int4/g32", "w=int4/g32/asym"],
    "bitsandbytes": ["w=nf4/g32", "w=fp4_bnb/g32", "NF4_DQ32", "W8A8"],
    "auto-round": ["w=int4/g32", "w=int3/g32/asym", "mixed"],
    "fp8": ["w=fp8/b32x32,a=fp8/g32", "w=fp8/tensor,a=fp8/tensor/static"],
    "mxfp4": ["MXFP4A16"],
    "hqq": ["w=uint4/g32/asym", "w=uint3/g32/asym", "w=uint8/channel/asym", "w=uint4/g32/offset"],
    "torchao": ["w=int4/g32", "w=int3/channel/asym", "w=int8/channel,a=int8/token", "w=fp8/channel"],
    "mlx": ["w=uint4/g32/offset", "w=uint3/g32/offset/float16", "MXFP4A16", "MXFP8A16"],
    "modelopt": ["w=fp8/tensor,a=fp8/tensor/static", "w=fp8/b128x128", "w=int4/g32", "w=int8/channel", "NVFP4", "MXFP8", "w=fp8/channel,a=fp8/token"],
    "exl3": ["EXL3_2", "w=tcq5-l16-3inst-tile/tensor/rht128:sides", "w=tcq8-l16-mcg-tile/tensor/rht128:sides", "signs"],
    "plain": ["plain"],
}  # fmt: skip
SHAPES = {"model.layers.0.a.weight": (32, 64), "model.layers.0.b.weight": (64, 96)}
_MIXED = ["w=int4/g32", "w=int8/channel,a=int8/token"]
_NF4_DQ32 = f"w=nf4/g32/s:({nested_scheme()})"
_OF_OTHERS = ("gptq", "awq", "bitsandbytes", "auto-round", "fp8", "mxfp4", "hqq", "torchao", "mlx", "exl3", "modelopt")
"""Layouts whose numbers the plain decoders of the tests know."""
_SUMS = ("exl3",)
"""Of these, layouts whose numbers are sums, which may be rounded in another order."""


@dataclass(frozen=True)
class Base:
    """A small checkpoint in memory, and its numbers; `notes`: small tensors of it may be changed, because a plain decoder follows."""

    config: dict[str, Any]
    file: bytes
    numbers: dict[str, torch.Tensor]
    placed: dict[str, Placed]
    notes: bool = False


def base(reader: str, scheme: str) -> Base:
    """The unmutated checkpoint of a reader and a scheme."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "model.norm.weight": torch.randn(64, generator=generator),
        "model.layers.0.a.bias": torch.randn(128 if reader == "exl3" else 32, generator=generator),
    }
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 64,
    }
    made = []
    for i, (name, shape) in enumerate(SHAPES.items()):
        if reader == "exl3":
            old = scheme == "signs"
            placed = Placed(name, (128, 128), parse_scheme("EXL3_3" if old else scheme), storage=scheme if old else "")
            tensors |= LAYOUTS[reader].write(placed, LayerValues(random_tiles(placed.scheme.weights, generator)))
            made.append(placed)
            continue
        weight = torch.randn(shape, generator=generator)
        if reader == "plain":
            tensors[name] = weight
            continue
        text = _MIXED[i] if scheme == "mixed" else "w=int4/g32" if scheme in ("indexed", "stack") else scheme
        text = _NF4_DQ32 if text == "NF4_DQ32" else text.partition(",")[0] if reader in ("gptq", "auto-round") else text
        layer = LAYOUTS[reader].fit(parse_scheme(text))
        q = quantize_tensor(weight, layer.weights)
        placed = Placed(name, shape, layer)
        if scheme == "indexed":
            index = torch.arange(shape[1], dtype=torch.int32) % (shape[1] // 32)
            q = QTensor(q.codes, q.scale, q.zero_point, q.offset, q.scheme, index)
            placed = Placed(name, shape, layer, indexed=True)
        if scheme == "stack":
            placed = Placed(name, (2, shape[0] // 2, shape[1]), layer)
        if reader == "mxfp4":
            placed = Placed(name.removesuffix(".weight"), (2, shape[1], shape[0] // 2), layer, transposed=True)
        tensors |= LAYOUTS[reader].write(placed, LayerValues(q, static_grid(layer, 3.0)))
        made.append(placed)
    if made:
        config["quantization_config"] = LAYOUTS[reader].config(made, ["lm_head"])
    parts = {n for p in made for n, _, _ in LAYOUTS[reader].specs(p)}
    words = LAYOUTS[reader].metadata(made, sorted(tensors.keys() - parts), ModelFacts()) if made else {}
    file = save({n: t.contiguous() for n, t in tensors.items()}, words or None)
    numbers = {p.name: torch.empty(0) for p in made}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = opened(Path(folder), json.dumps(config).encode(), file)
        numbers = {name: checkpoint.dense(name) for name in checkpoint.names}
    return Base(config, file, numbers, dict(checkpoint.placed), reader in _OF_OTHERS)


def random_tiles(scheme: Scheme, generator: torch.Generator) -> QTensor:
    """128 × 128 codes of a trellis in tiles: any codes are rings."""
    codes = torch.randint(0, 2**scheme.format.bits, (128, 128), generator=generator, dtype=torch.uint8)
    sides = Sides(*(torch.randn(128, generator=generator).half().float() for _ in range(2)))
    return QTensor(codes, torch.ones(1, 1), None, None, scheme, sides=sides)


def opened(folder: Path, config: bytes, file: bytes) -> Checkpoint:
    """A checkpoint of these bytes, every quantized layer read."""
    (folder / "config.json").write_bytes(config)
    (folder / "model.safetensors").write_bytes(file)
    checkpoint = Checkpoint.open(folder)
    checkpoint.verify()
    return checkpoint


def mutant(of: Base, rng: random.Random) -> tuple[bytes, bytes, str]:
    """config.json, model.safetensors and what was done, of one mutant: one to three mutations."""
    config, text, file, done = of.config, None, of.file, []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        kind = rng.randrange(10)
        if kind < 5 and "quantization_config" in config:
            part = config["quantization_config"]
            if isinstance(part, dict):
                config = {**config, "quantization_config": mutate_json(part, rng)}
                done.append("quantization_config")
        elif kind < 6:
            config = mutate_json(config, rng)
            done.append("config")
        elif kind < 7 and text is None:
            text = mutate_text(json.dumps(config).encode(), rng)
            done.append("text")
        else:
            small = of.notes and rng.random() < 0.4
            try:
                file = mutate_small(file, rng) if small else mutate_header(file, rng)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, UnicodeError):
                continue  # the header is broken already
            done.append("small tensor" if small else "header")
    return json.dumps(config).encode() if text is None else text, file, "+".join(done)


def verdict(reader: str, of: Base, config: bytes, file: bytes, folder: Path) -> str | None:
    """What is wrong with how a mutant is read, None if nothing is."""
    try:
        checkpoint = opened(folder, config, file)
    except ArrondiError as error:
        message = str(error)
        return None if message and "\n" not in message else f"a message of several lines or none: {message!r}"
    except Exception:
        return "a traceback: " + traceback.format_exc(limit=-3)
    theirs: dict[str, torch.Tensor] | None = None
    for name in of.placed:
        if name not in checkpoint.names:
            continue  # all its parts have other names now: whoever builds the model misses it
        if name not in checkpoint.placed:
            return f"{name} is no longer quantized, and nobody says so"
        found = checkpoint.dense(name)
        if found.shape == of.numbers[name].shape and torch.equal(found, of.numbers[name]):
            continue
        if reader in _OF_OTHERS:
            if wrong := unlike_plain(config, file, name, found, exact=reader not in _SUMS):
                return wrong
            continue
        if reader != "compressed-tensors":
            return f"{name} has other numbers"
        try:
            theirs = theirs or package_numbers(json.loads(config), file, checkpoint)
        except Exception as error:
            return f"{name} has other numbers, and the package refuses: {type(error).__name__} {error}"
        if name not in theirs or not close(found, theirs[name]):
            return f"{name} has other numbers than the package gives"
    if reader in _OF_OTHERS:
        return None
    other = [
        n
        for n, p in of.placed.items()
        if n in checkpoint.placed and checkpoint.placed[n].scheme.inputs != p.scheme.inputs
    ]
    return inputs_apart(package_schemes(json.loads(config), checkpoint), checkpoint, other) if other else None


def unlike_plain(config: bytes, file: bytes, name: str, found: torch.Tensor, exact: bool) -> str | None:
    """What is wrong with numbers of another tool's layout, held against a plain decoder; None if nothing is."""
    try:
        expected = decoded(json.loads(config), load(file))[name.removesuffix(".weight")]
    except Exception as error:
        return f"{name} has other numbers, and the plain decoder fails: {type(error).__name__} {error}"
    plain = torch.from_numpy(expected.copy())
    bound = 0.0 if exact else 1e-5 * float(plain.abs().max())
    same = found.shape == plain.shape and torch.allclose(found, plain, rtol=0.0, atol=bound)
    return None if same else f"{name} has other numbers than a plain decoder gives"


def package_numbers(config: dict[str, Any], file: bytes, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The quantized weights as the package itself restores them: its config, its matching, its decompressors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig

    known = QuantizationConfig.model_validate(config["quantization_config"])
    tensors, found = load(file), {}
    for name, scheme in package_schemes(config, checkpoint).items():
        prefix = name.removesuffix("weight")
        state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        format = scheme.format or infer_module_format(torch.nn.Linear, scheme)
        if known.format not in (getattr(format, "value", format), "mixed-precision") and scheme.format is None:
            format = known.format
        found[name] = BaseCompressor.get_value_from_registry(getattr(format, "value", format)).decompress(
            state, scheme
        )["weight"]
    return found


def package_schemes(config: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """The package's scheme of every quantized weight."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_targets

    known = QuantizationConfig.model_validate(config["quantization_config"])
    schemes = {target: scheme for scheme in known.config_groups.values() for target in scheme.targets}
    linear = torch.nn.Linear(1, 1)
    return {n: schemes[match_targets(p.path, linear, schemes)[0]] for n, p in checkpoint.placed.items()}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal up to the type in which the package restores."""
    if ours.shape != theirs.shape:
        return False
    bound = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}.get(theirs.dtype, 1e-6)
    return bool(((ours - theirs.float()).abs() <= ours.abs() * bound).all())


@dataclass
class Result:
    """Counts of one run, and its failures."""

    mutants: int = 0
    read: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in what computes longer; the machine may have other things to do."""

    def ring(number: int, frame: object) -> None:
        raise TimeoutError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run(readers: list[str], seed: int, mutants: int, seconds: float) -> Result:
    """As many mutants as asked for of every reader, or as the time allows."""
    warnings.simplefilter("ignore")
    import compressed_tensors.compressors  # noqa: F401  (seconds, which are no hang of the first mutant)

    result = Result()
    stop = time.monotonic() + seconds
    bases = {(r, s): base(r, s) for r in readers for s in READERS[r]}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for number in range(mutants):
            for reader in readers:
                if time.monotonic() > stop:
                    return result
                key = f"{seed}-{reader}-{number}"
                rng = random.Random(key)
                of = bases[reader, rng.choice(READERS[reader])]
                config, file, what = mutant(of, rng)
                with limited(5):
                    wrong = verdict(reader, of, config, file, Path(folder))
                result.mutants += 1
                result.read[reader] += 1
                if wrong:
                    result.failures.append(f"{key} ({what}): {wrong}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutants", type=int, default=1_000_000, help="of every reader")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--reader", choices=READERS, action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = run(options.reader or list(READERS), options.seed, options.mutants, options.seconds)
    for failure in result.failures[:20]:
        print(failure, file=sys.stderr)
    print(
        f"{result.mutants} mutants ({', '.join(f'{n} {r}' for r, n in result.read.items())}), {len(result.failures)} failures, seed {options.seed}"
    )
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
