"""How fast this machine is, and how close each operator comes to it.

Owns: `bench`, `SCHEMES`, `OPERATORS`. A roofline (Williams, Waterman, Patterson 2009, CACM 52(4)) has two limits: bytes
over the bandwidth of memory, and operations over the peak of the arithmetic. Both are measured here, on the threads
that PyTorch uses; an operator's share is the time that the nearer limit allows over the time that it took.

Weights are rotated over copies larger than the last cache, so that a product of one token reads them from memory.
A share may pass 1: float products that are computed as integers can outrun the peak of float arithmetic, and a small
operand that was just written is still in a cache.
"""

from __future__ import annotations

import functools
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.errors import SchemeError
from arrondi.formats import FORMATS, ActivationScheme, LayerScheme, PerToken, Scheme, parse_scheme
from arrondi.kernels import KERNELS, Meta, binary_linear, choose, hadamard, pack_signs, sign_tiles
from arrondi.native import native, operand, threads
from arrondi.tensor.nearest import fake_quantize, quantize_tensor
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.tables import round_table

SCHEMES: Final = (
    "W8A16", "W6A16", "W5A16", "W4A16", "W3A16", "W2A16", "NF4", "FP4", "MXFP4A16", "NVFP4A16", "FP8A16", "TERNARY",
    "BINARY", "W8A8", "W4A8",
)  # fmt: skip
"""Products that are timed unless others are named."""

DTYPES: Final = (torch.float32, torch.bfloat16)

_SECONDS: Final = 0.06
"""Time spent on one number, and at least three runs."""

_LONG: Final = 1.0
"""Seconds of a run that needs no other: PyTorch's products of bfloat16 and int8 on a CPU that has none."""

_LEAST_ARENA: Final = 1 << 28
"""Bytes. Copies of operands go round in here; with four times the last cache some 90 % of them come from memory."""

_MOST_COPIES: Final = 256
"""Smaller operands than a 256th of the arena, the rows of x of one token, stay in a cache as they do in a model."""

_LINE: Final = 64
"""Bytes to which copies are aligned."""

_PEAK: Final = 1024
"""Order of the square products that peaks are measured with."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class _Case:
    """One thing to time: `run(i)` is the i-th call, on the i-th copy of its operands."""

    kernel: str
    bytes: int
    operations: int
    peak: str | None
    run: Callable[[int], object]


def bench(
    shapes: Sequence[tuple[int, int]] = ((4096, 4096),),
    tokens: Sequence[int] = (1, 16, 512),
    names: Sequence[str] = (),
    *,
    seconds: float = _SECONDS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time this machine and the operators on it.

    Args:
        shapes: of the weights, (out, in).
        tokens: numbers of rows of x.
        names: schemes and names of `OPERATORS`; none for all of `SCHEMES` and `OPERATORS`.
        seconds: for each number.
        progress: called with (done, all, what).

    Returns:
        `machine`: threads, path of the compiled kernels, bandwidth in GB/s, peaks in TFLOP/s by what measured them.
        `rows`: one for each operator, type, shape and number of tokens, with `ms` (median), `gb_s`, `tflop_s`, `bound`
        (memory or compute) and `share`.

    Raises:
        SchemeError: a name is neither a scheme nor an operator, or a size is not positive.
        ShapeError: a scheme's groups or the Hadamard transform do not fit a shape.
    """
    if not all(size > 0 for size in (*itertools.chain(*shapes), *tokens)):
        raise SchemeError(f"Sizes must be positive, got shapes {list(shapes)} and tokens {list(tokens)}.")
    chosen = {name: None if name in OPERATORS else parse_scheme(name) for name in names or (*SCHEMES, *OPERATORS)}
    for name, scheme in chosen.items():
        if scheme is not None and (scheme.outputs is not None or scheme.kv is not None):
            raise SchemeError(
                f"{name}: products are timed, and outputs and caches are no part of them. Drop 'o' and 'kv'."
            )
    report = progress or (lambda done, total, what: None)
    total = len(shapes) * len(chosen) * len(DTYPES) * len(tokens)
    report(0, total, "this machine")
    arena = torch.ones(max(_LEAST_ARENA, 4 * _last_cache()), dtype=torch.uint8)
    machine = measure_machine(arena, seconds)
    rows: list[dict[str, Any]] = []
    for (n, k), (name, scheme) in itertools.product(shapes, chosen.items()):
        make = OPERATORS[name] if scheme is None else functools.partial(_products, scheme)
        for dtype, m, case in make(n, k, tokens, arena):
            report(len(rows), total, f"{name} {n} × {k}")
            took = statistics.median(_times(case.run, seconds))
            facts = {"operator": name, "dtype": str(dtype).removeprefix("torch."), "shape": [n, k], "m": m}
            rows.append(facts | {"kernel": case.kernel} | _rates(case, took, machine))
    return {"machine": machine, "rows": rows}


def measure_machine(arena: torch.Tensor, seconds: float = _SECONDS) -> dict[str, Any]:
    """Bandwidth of reading `arena` and peaks of arithmetic, each the best of several runs; see `bench`."""
    sources = _peaks()
    peaks: dict[str, dict[str, float]] = {}
    for kind, found in sources.items():
        taken = {name: min(_times(run, 2 * seconds)) for name, (*_, run) in found.items()}
        peaks[kind] = {name: 2 * m * n * k / taken[name] / 1e12 for name, (m, n, k, _) in found.items()}
    return {
        "cpu": platform.processor() or platform.machine(),
        "threads": threads(),
        "path": None if native is None else native.path(),
        "torch": torch.__version__,
        "last_cache_bytes": _last_cache(),
        "bandwidth_gb_s": _bandwidth(arena, seconds),
        "peak_tflop_s": peaks,
    }


def _rates(case: _Case, took: float, machine: dict[str, Any]) -> dict[str, Any]:
    memory = case.bytes / (machine["bandwidth_gb_s"] * 1e9)
    peak = max(machine["peak_tflop_s"][case.peak].values()) * 1e12 if case.peak else math.inf
    compute = case.operations / peak
    return {
        "ms": took * 1e3,
        "bytes": case.bytes,
        "gb_s": case.bytes / took / 1e9,
        "tflop_s": case.operations / took / 1e12,
        "bound": "memory" if memory >= compute else "compute",
        "share": max(memory, compute) / took,
    }


def _times(run: Callable[[int], object], seconds: float) -> list[float]:
    """Seconds of each of at least three runs, or up to one that takes `_LONG`. The first counts only if it is long: then it had
    time to get warm."""
    taken: list[float] = []
    for i in itertools.count():
        start = time.perf_counter()
        run(i)
        took = time.perf_counter() - start
        if i > 0 or took > seconds:
            taken.append(took)
        if took > max(_LONG, seconds) or (len(taken) >= 3 and sum(taken) >= seconds):
            return taken
    raise AssertionError


def _bandwidth(arena: torch.Tensor, seconds: float) -> float:
    if native is None:
        numbers = arena.view(torch.float32)
        taken = _times(lambda i: numbers.sum(), 4 * seconds)
    else:
        place = operand("arena", arena, (arena.numel(),), torch.uint8)
        taken = _times(lambda i: native.read_memory(place, arena.numel(), threads()), 4 * seconds)
    return arena.numel() / min(taken) / 1e9


@functools.cache
def _last_cache() -> int:
    """Bytes of the largest cache as Linux tells; elsewhere a usual size."""
    units = {"K": 1 << 10, "M": 1 << 20}
    found = [1 << 25]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text[-1:] in units and text[:-1].isdigit():
            found.append(int(text[:-1]) * units[text[-1]])
    return max(found)


_Source = tuple[int, int, int, Callable[[int], object]]


def _peaks() -> dict[str, dict[str, _Source]]:
    """Products in the caches, near the peak of their arithmetic, by what multiplies: (m, n, k, run)."""
    size = _PEAK
    real = torch.ones(size, size)
    short, whole = real.bfloat16(), real.to(torch.int8)
    bits = pack_signs(real)
    tiles = sign_tiles(bits)
    peaks: dict[str, dict[str, _Source]] = {
        "float32": {"torch.matmul": (size, size, size, lambda i: real @ real)},
        "bfloat16": {"torch.matmul": (size, size, size, lambda i: short @ short)},
        "int8": {"torch._int_mm": (size, size, size, lambda i: torch._int_mm(whole, whole))},
        "signs": {"binary_linear": (size, size, size, lambda i: binary_linear(bits, tiles, (size, size)))},
    }
    for kind, name, x in (("float32", "NF4", real), ("bfloat16", "FP8A16", short), ("int8", "W8A8", real)):
        scheme = parse_scheme(name)
        kernel, product, _ = _bound(quantize_tensor(real, scheme), scheme.inputs, x.dtype)
        peaks[kind][f"{kernel} {name}"] = (size, size, size, functools.partial(lambda f, x, i: f(x), product, x))
    return peaks


@functools.lru_cache(maxsize=1)
def _weight(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0))


def _copies(tensors: Sequence[torch.Tensor], arena: torch.Tensor) -> list[list[torch.Tensor]]:
    """As many copies of the tensors as the arena holds, 256 at most; the tensors themselves if they are larger.

    The arena has been written to before: fresh memory would cost a page fault for every 4 KB.
    """
    sizes = [-(-t.numel() * t.element_size() // _LINE) * _LINE for t in tensors]
    starts = range(0, arena.numel() - sum(sizes) + 1, max(sum(sizes), _LINE))[:_MOST_COPIES]
    copies = []
    for start in starts:
        offsets = itertools.accumulate(sizes[:-1], initial=start)
        places = [arena[o : o + t.numel() * t.element_size()] for o, t in zip(offsets, tensors, strict=True)]
        copies.append([p.view(t.dtype).view(t.shape).copy_(t) for p, t in zip(places, tensors, strict=True)])
    return copies or [list(tensors)]


def _bound(
    q: QTensor, inputs: ActivationScheme | None, dtype: torch.dtype, copy: dict[str, torch.Tensor] | None = None
) -> tuple[str, Callable[[torch.Tensor], torch.Tensor], dict[str, torch.Tensor]]:
    """(kernel, product, its tensors) as a layer would choose and run it; `copy` takes the place of packing anew."""
    name = choose(q.scheme, q.shape, dtype).name
    kernel = KERNELS[name]
    tensors = kernel.prepack(q, dtype) if copy is None else copy
    inside = inputs is not None and kernel.rounds(q.scheme, inputs)
    meta = Meta(q.scheme, (q.shape[0], q.shape[1]), dtype, inputs if inside else None)
    if kernel.bind is not None:
        product = kernel.bind(tensors, meta, None)
    else:
        product = functools.partial(lambda f, x: f(x, tensors, meta, None), kernel.linear)
    if inputs is None or inside:
        return name, product, tensors
    return name, lambda x: product(fake_quantize(x, inputs.scheme)), tensors


_Cases = Iterator[tuple[torch.dtype, int, _Case]]


def _products(scheme: LayerScheme, n: int, k: int, tokens: Sequence[int], arena: torch.Tensor) -> _Cases:
    q = _on_grid(_weight(n, k), scheme.weights)
    for dtype in DTYPES:
        name, _, tensors = _bound(q, scheme.inputs, dtype)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        copies = [dict(zip(tensors, copy, strict=True)) for copy in _copies(list(tensors.values()), arena)]
        products = [_bound(q, scheme.inputs, dtype, copy)[1] for copy in copies]
        peak = "int8" if scheme.inputs is not None else str(dtype).removeprefix("torch.")
        for m in tokens:
            x = torch.randn(m, k).to(dtype)
            moved = size + m * (n + k) * x.element_size()
            yield dtype, m, _Case(name, moved, 2 * m * n * k, peak, functools.partial(_rotate, products, x))


def _on_grid(x: torch.Tensor, scheme: Scheme) -> QTensor:
    """x rounded. Learned values take long to learn and no time by themselves: any will do, with codes that occur like theirs."""
    if scheme.table is None:
        return quantize_tensor(x, scheme)
    q, levels = quantize_tensor(x, replace(scheme, format=FORMATS["nf4"], table=None)), scheme.format.levels
    values = torch.linspace(-1, 1, levels).repeat(scheme.table.count(x.shape[0]), 1)
    return replace(q, codes=q.codes % levels, scheme=scheme, table=round_table(values, scheme.table))


def _rotate(products: list[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor, i: int) -> torch.Tensor:
    return products[i % len(products)](x)


def _over_inputs(
    k: int,
    tokens: Sequence[int],
    arena: torch.Tensor,
    function: Callable[[torch.Tensor], object],
    out_bytes: int | None,
    operations: float,
) -> _Cases:
    """An operator on x (m, k) alone: bytes written and operations for each number of x; None writes what it reads."""
    for dtype, m in itertools.product(DTYPES, tokens):
        x = torch.randn(m, k).to(dtype)
        xs = [copy[0] for copy in _copies([x], arena)]
        moved = x.numel() * (x.element_size() + (x.element_size() if out_bytes is None else out_bytes))
        kernel = "native" if native is not None else "torch"
        run = functools.partial(lambda xs, i: function(xs[i % len(xs)]), xs)
        yield dtype, m, _Case(kernel, moved, int(m * k * operations), "float32" if operations else None, run)


def _hadamard(n: int, k: int, tokens: Sequence[int], arena: torch.Tensor) -> _Cases:
    # A sum or a difference for each of log2 k stages; a base costs more, which is the operator's own affair.
    return _over_inputs(k, tokens, arena, hadamard, None, math.log2(k))


def _rounding(n: int, k: int, tokens: Sequence[int], arena: torch.Tensor) -> _Cases:
    scheme = Scheme(FORMATS["int8"], PerToken())
    return _over_inputs(k, tokens, arena, lambda x: quantize_tensor(x, scheme), 1, 0)


def _signs(n: int, k: int, tokens: Sequence[int], arena: torch.Tensor) -> _Cases:
    """Packing the signs of x, and the product with packed weights."""
    tiles = sign_tiles(pack_signs(_weight(n, k)))
    copies = [copy[0] for copy in _copies([tiles], arena)]
    kernel = "native" if native is not None else "torch"
    for dtype, m in itertools.product(DTYPES, tokens):
        x = torch.randn(m, k).to(dtype)
        run = functools.partial(lambda x, i: binary_linear(pack_signs(x), copies[i % len(copies)], (n, k)), x)
        moved = 4 * tiles.numel() + m * k * x.element_size() + 4 * m * n
        yield dtype, m, _Case(kernel, moved, 2 * m * n * k, "signs", run)


OPERATORS: Final = {"hadamard": _hadamard, "quantize": _rounding, "signs": _signs}
"""What is timed beside products with quantized weights: the transform of x (m, in), its rounding to int8 with a scale
for each token, and the product of the signs of x with those of a weight."""
