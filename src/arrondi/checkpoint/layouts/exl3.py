"""The layout of ExLlamaV3: trellis codes in tiles, between two Hadamard transforms.

Owns: `LAYOUT`. Of a weight P.weight (m outputs, n inputs, both multiples of 128), K bits a code:

    P.trellis       int16 (n/16, m/16, 16·K)  tiles of 16 × 16; bits from the highest of 32-bit words down
    P.suh, P.svh    float16 (n,), (m,)        what inputs and outputs are multiplied by
    P.su, P.sv      int16 (n/16,), (m/16,)    the same in older files, signs alone, a bit each; read
    P.mcg, P.mul1   int32 ()                  the factor of one of two functions of states; neither: "3inst"

The stored tensors say all that is needed; the config counts bits for people, and is written as ExLlamaV3 writes it.

Source: exllamav3 1.4, `modules/quant/exl3.py`, `conversion/compile.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch

from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.beside import check_beside, groups_of, shape_of
from arrondi.checkpoint.layouts.checks import checked
from arrondi.checkpoint.layouts.claims import Claims
from arrondi.checkpoint.layouts.layout import LayerValues, Layout, ModelFacts, Names, Placed, Reader
from arrondi.errors import FileFormatError
from arrondi.formats import LayerScheme, PerTensor, Scheme, Trellis, Turned
from arrondi.formats.format import of_trellis
from arrondi.formats.trellis import RING, Function
from arrondi.tensor.packing import pack, unpack
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.trellis import TILE, from_lines, to_lines
from arrondi.tensor.turned import Sides

_BLOCK: Final = 128
_STATE: Final = 16
_MARKS: Final[Mapping[Function, int]] = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
"""Functions of states that a stored factor names."""
_LEAVES: Final = ("trellis", "suh", "svh", "su", "sv", *_MARKS)
_TOLD: Final = (
    "version", "bits", "head_bits", "codebook", "calibration", "out_scales", "tensor_storage", "original_quantization_config", "meta",
    "lm_head", "dynamic", "pack_dtype",
)  # fmt: skip
"""Keys of ExLlamaV3 and GPTQModel that the stored tensors say themselves, layer by layer."""
SIGNS: Final = "signs"
"""The storage of older files."""
_AT_ONCE: Final = 8
"""Codes whose bits fill whole bytes."""


def exl3_scheme(bits: int, function: Function) -> Scheme:
    """What a layer with so many bits a code is."""
    trellis = Trellis(float(bits), _STATE, function, "tile")
    return Scheme(of_trellis(trellis), PerTensor(), turned=Turned(_BLOCK, None))


def _function(scheme: Scheme) -> Function:
    assert scheme.format.trellis is not None
    return scheme.format.trellis.function


def _refuse(placed: Placed) -> str | None:
    scheme = placed.scheme.weights
    found = scheme.format.trellis
    like = found is not None and found.function != "bytes" and found.rate % 1 == 0
    if (
        found is None
        or not like
        or scheme != exl3_scheme(int(found.rate), found.function)
        or placed.scheme.inputs is not None
    ):
        return f"exl3 has no format for {placed.scheme}"
    if placed.matrices > 1 or placed.kind != "Linear":
        return "exl3 stores the weights of linear layers, each by itself"
    if any(n % _BLOCK for n in placed.matrix_shape):
        rows, columns = placed.matrix_shape
        return f"exl3 has blocks of {_BLOCK} inputs and outputs, which {rows} × {columns} does not divide into"
    return None


# ── the weight ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _specs(placed: Placed) -> list[TensorSpec]:
    path, (rows, columns) = placed.name.removesuffix(".weight"), placed.matrix_shape
    bits = placed.scheme.weights.format.bits
    specs: list[TensorSpec] = [(f"{path}.trellis", torch.int16, (columns // TILE, rows // TILE, TILE * bits))]
    for side, count in (("u", columns), ("v", rows)):
        old = placed.storage == SIGNS
        specs.append(
            (f"{path}.s{side}", torch.int16, (count // 16,)) if old else (f"{path}.s{side}h", torch.float16, (count,))
        )
    function = _function(placed.scheme.weights)
    return [*specs, (f"{path}.{function}", torch.int32, ())] if function in _MARKS else specs


def _write(placed: Placed, values: LayerValues) -> dict[str, torch.Tensor]:
    path, q = placed.name.removesuffix(".weight"), values.weight
    assert q.sides is not None and q.scheme.format.trellis is not None
    (lines,) = to_lines(q.codes, q.scheme.format.trellis)
    words = _stored(lines, q.scheme.format.bits).reshape(q.shape[1] // TILE, q.shape[0] // TILE, -1)
    tensors = {f"{path}.trellis": words}
    for side, numbers in (("u", q.sides.columns), ("v", q.sides.rows * q.real_scale.reshape(()))):
        old = placed.storage == SIGNS
        tensors |= {f"{path}.s{side}": _packed_signs(numbers)} if old else {f"{path}.s{side}h": numbers.half()}
    function = _function(q.scheme)
    return tensors | ({f"{path}.{function}": _mark(_MARKS[function])} if function in _MARKS else {})


def _read(placed: Placed, read: Reader) -> LayerValues:
    path, scheme = placed.name.removesuffix(".weight"), placed.scheme.weights
    assert scheme.format.trellis is not None
    function = _function(scheme)
    if function in _MARKS and (found := int(read(f"{path}.{function}")) % 2**32) != _MARKS[function]:
        raise FileFormatError(
            f"{path}.{function} is {found:#x}; the only factor that is known is {_MARKS[function]:#x}."
        )
    codes = from_lines(
        [_codes(read(f"{path}.trellis"), scheme.format.bits)], placed.matrix_shape, scheme.format.trellis
    )
    old = placed.storage == SIGNS
    rows, columns = (
        _signs(read(f"{path}.s{side}")) if old else read(f"{path}.s{side}h").float() for side in ("v", "u")
    )
    q = QTensor(codes, torch.ones(1, 1), None, None, scheme, sides=Sides(rows, columns))
    return LayerValues(checked(placed.name, q))


def _codes(trellis: torch.Tensor, bits: int) -> torch.Tensor:
    """Stored words → the codes of every tile in the order of its ring, uint8 (tiles, 256)."""
    stream = trellis.contiguous().view(torch.uint8).reshape(-1, 4).flip(-1)
    runs = stream.reshape(-1, bits).flip(-1).contiguous()  # the last of eight codes now begins at the lowest bit
    return unpack(runs, bits, _AT_ONCE).flip(-1).reshape(-1, RING)


def _stored(lines: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_codes`: int16, flat."""
    runs = pack(lines.reshape(-1, _AT_ONCE).flip(-1).contiguous(), bits).flip(-1)
    return runs.reshape(-1, 4).flip(-1).contiguous().view(torch.int16).reshape(-1)


def _mark(factor: int) -> torch.Tensor:
    """A factor of 32 bits as int32 ()."""
    return torch.tensor(factor - 2**32 if factor >= 2**31 else factor, dtype=torch.int32)


def _signs(packed: torch.Tensor) -> torch.Tensor:
    """Bits of int16 words, the lowest first → ±1, a set bit being -1."""
    bits = packed.int()[:, None] >> torch.arange(16, dtype=torch.int32) & 1
    return 1.0 - 2.0 * bits.reshape(-1).float()


def _packed_signs(signs: torch.Tensor) -> torch.Tensor:
    """The inverse of `_signs`."""
    bits = (signs < 0).int().reshape(-1, 16) << torch.arange(16, dtype=torch.int32)
    return bits.sum(1).to(torch.int16)


# ── the config ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _config(placed: list[Placed], kept: list[str], facts: ModelFacts = ModelFacts()) -> dict[str, Any]:
    heads = [p for p in placed if p.path.rpartition(".")[2] == "lm_head"]
    rest = [p for p in placed if p not in heads] or placed
    weights = [math.prod(p.matrix_shape) for p in rest]
    bits = sum(n * p.scheme.weights.format.bits for n, p in zip(weights, rest, strict=True)) / max(sum(weights), 1)
    functions = {_function(p.scheme.weights) for p in placed}
    return {
        "quant_method": "exl3",
        "version": "1.4.1",
        "bits": round(bits, 2),
        "head_bits": heads[0].scheme.weights.format.bits if heads else 16,
        **({"codebook": functions.pop()} if len(functions) == 1 else {}),
    }


def _find(config: Mapping[str, Any], names: Names, read: Reader) -> list[Placed]:
    claims = Claims(config["quantization_config"], "quantization_config")
    for key in ("quant_method", "method", "format", "checkpoint_format"):
        claims.only(key, "exl3")
    claims.only("group_size", -1)
    claims.only("desc_act", False)
    claims.only("sym", True)
    claims.only("adapter")
    claims.only("rotation", False)
    claims.remarks(_TOLD)
    claims.done()
    placed = [_place(path, names) for path in groups_of(names, _LEAVES, ("trellis",))]
    _check_head(placed, config)
    check_beside(placed, [s for p in placed for s in _specs(p)], names)
    return placed


def _check_head(placed: list[Placed], config: Mapping[str, Any]) -> None:
    """Refuse a head that is filled up to whole blocks: what it gives beyond the vocabulary is mixed into all else of its last block."""
    text = config.get("text_config")
    words = config.get("vocab_size", text.get("vocab_size") if isinstance(text, Mapping) else None)
    for p in placed:
        if p.path.rpartition(".")[2] == "lm_head" and type(words) is int and p.shape[0] > words:
            raise FileFormatError(
                f"{p.path}.trellis has {p.shape[0]} outputs for a vocabulary of {words}: it was filled up to blocks of {_BLOCK}, which is not read here."
            )


def _place(path: str, names: Names) -> Placed:
    down, across, width = shape_of(names, f"{path}.trellis", 3)
    bits, rest = divmod(width, TILE)
    if rest or not 1 <= bits <= 8 or names[f"{path}.trellis"][0] != "I16":
        dtype = names[f"{path}.trellis"][0]
        raise FileFormatError(
            f"{path}.trellis is {dtype} with {width} words a tile; int16 words hold 256 codes of 1 to 8 bits, 16 a bit."
        )
    rows, columns = across * TILE, down * TILE
    if rows % _BLOCK or columns % _BLOCK:
        raise FileFormatError(f"{path}.trellis is of {rows} × {columns} weights, which have no blocks of {_BLOCK}.")
    marks = [function for function in _MARKS if f"{path}.{function}" in names]
    if len(marks) > 1:
        raise FileFormatError(
            f"{path}.{marks[0]} and {path}.{marks[1]} are both stored, and a layer has one function of states."
        )
    for mark in marks:
        if names[f"{path}.{mark}"] != ("I32", ()):
            dtype, shape = names[f"{path}.{mark}"]
            raise FileFormatError(f"{path}.{mark} should be one number, I32 (), found {dtype} {shape}.")
    old = f"{path}.suh" not in names and f"{path}.su" in names
    for side, count in (("u", columns), ("v", rows)):
        name, wanted = (f"{path}.s{side}", ("I16", (count // 16,))) if old else (f"{path}.s{side}h", ("F16", (count,)))
        if name not in names:
            raise FileFormatError(f"{name} is missing, though {path}.trellis is stored.")
        if names[name] != wanted:
            raise FileFormatError(f"{name} should be {wanted[0]} {wanted[1]}, found {names[name][0]} {names[name][1]}.")
    scheme = exl3_scheme(bits, marks[0] if marks else "3inst")
    return Placed(f"{path}.weight", (rows, columns), LayerScheme(scheme), storage=SIGNS if old else "")


LAYOUT: Final = Layout(
    "exl3", _refuse, _specs, _write, _read, _config, _find, lambda scheme: scheme.with_scale("float32")
)
