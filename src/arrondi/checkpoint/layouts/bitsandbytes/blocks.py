"""A weight of 4 bits.

Owns: `refuse`, `specs`, `write`, `read_layer` and `place`. Of a weight P.weight (m outputs, n inputs), NF4 or the package's FP4, in blocks of
B elements of the flattened matrix, of which there are G:

    P.weight                                uint8 (m·n/2, 1)     two codes a byte, the first in the high half
    P.weight.absmax                         float32 (G,)         the scale of a block
    P.weight.quant_map                      float32 (16,)        the values of the codes
    P.weight.quant_state.bitsandbytes__nf4  uint8                a note, JSON (`state`); __fp4 for FP4

With double quantization absmax is uint8 and there are, for blocks of 256 scales,

    P.weight.nested_absmax                  float32 (G/256,)
    P.weight.nested_quant_map               float32 (256,)       the values of absmax, to which the note's nested_offset is added

`Placed.storage` says what the scheme does not: the type in which the package restores the weight, the type in whose clothes the bytes are
stored (`bnb_4bit_quant_storage`), the length of the note, and the size of blocks of scales whose table of values is not ours. The package
computes it in float32, and so do we; on a CPU without fused multiplication some values would differ in their last bit. Such scales are
read as the float32 numbers that they are, and not written. "" is float32, uint8, and a note with room for any offset.

Source: bitsandbytes 0.50, `functional.py` (`QuantState`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import torch

from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.beside import linear
from arrondi.checkpoint.layouts.bitsandbytes.state import KINDS, SIZES, State, read_state
from arrondi.checkpoint.layouts.checks import checked
from arrondi.checkpoint.layouts.layout import LayerValues, Names, Placed, Reader
from arrondi.errors import FileFormatError
from arrondi.formats import FORMATS, LayerScheme, PerFlat, PerGroup, PerRun, PerTensor, Scheme, scale_shape
from arrondi.tensor.packing import pack, unpack
from arrondi.tensor.qtensor import QTensor

NOTE: Final = "weight.quant_state.bitsandbytes__"
_NESTED: Final = 256
_STORAGE: Final = {"U8": torch.uint8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Form:
    """What `Placed.storage` says."""

    dtype: str = "float32"
    storage: torch.dtype = torch.uint8
    length: int = 0
    flat: int = 0

    @classmethod
    def of(cls, placed: Placed) -> Form:
        if not placed.storage:
            return cls()
        dtype, storage, length, flat = placed.storage.split("/")
        return cls(dtype, getattr(torch, storage), int(length), int(flat))

    def __str__(self) -> str:
        if self == Form():
            return ""
        return f"{self.dtype}/{str(self.storage).removeprefix('torch.')}/{self.length}/{self.flat}"


def nested_scheme(size: int = _NESTED) -> Scheme:
    """Scales less their mean, in 8 log-spaced bits."""
    mean = Scheme(FORMATS["binary"], PerTensor())
    return Scheme(FORMATS["dynamic8"], PerFlat(size), "float", offset=mean)


def refuse(placed: Placed) -> str | None:
    """Why a linear layer cannot be stored in blocks, as the end of a sentence; None if it can."""
    scheme, weights = placed.scheme, placed.scheme.weights
    if weights.format.name not in KINDS.values():
        return f"bitsandbytes stores nf4 and fp4_bnb in blocks, and int8 with a float32 scale a row, not {weights}"
    if (scheme.inputs, scheme.outputs, scheme.kv) != (None, None, None) or weights.apart is not None:
        return "bitsandbytes rounds weights of 4 bits alone, no inputs, outputs or caches, and keeps nothing apart"
    granularity = weights.granularity
    if not isinstance(granularity, PerGroup | PerRun) or granularity.size not in SIZES:
        return f"bitsandbytes has blocks of {', '.join(map(str, SIZES))} elements, not {weights}"
    if weights.zero_point != "none" or weights.scale not in ("float32", nested_scheme()):
        return f"bitsandbytes has float32 scales, or such in 8 bits less their mean, and no zero points, not {weights}"
    columns = placed.matrix_shape[1]
    if columns % granularity.size and (isinstance(granularity, PerGroup) or granularity.size % columns):
        return f"blocks of bitsandbytes run over the rows of a matrix, and {granularity.size} does not divide {columns}"
    return (
        "double-quantized scales of bitsandbytes are read as the numbers that they are"
        if Form.of(placed).flat
        else None
    )


def specs(placed: Placed) -> list[TensorSpec]:
    """The tensors that a layer becomes."""
    name, form = placed.name, Form.of(placed)
    note = _state(placed, form)
    count = math.prod(scale_shape(placed.scheme.weights.granularity, placed.matrix_shape))
    stored = -(-math.prod(placed.matrix_shape) // 2) // form.storage.itemsize
    nested = note.nested
    found: list[TensorSpec] = [
        (name, form.storage, (stored, 1)),
        (f"{name}.absmax", torch.uint8 if nested else torch.float32, (count,)),
        (f"{name}.quant_map", torch.float32, (16,)),
        (f"{name}.quant_state.bitsandbytes__{note.kind}", torch.uint8, (note.room,)),
    ]
    if nested:
        found.append((f"{name}.nested_absmax", torch.float32, (-(-count // nested),)))
        found.append((f"{name}.nested_quant_map", torch.float32, (256,)))
    return found


def write(placed: Placed, values: LayerValues) -> dict[str, torch.Tensor]:
    """Those tensors with their numbers."""
    name, form, q = placed.name, Form.of(placed), values.weight
    note = _state(placed, form)
    codes = q.codes.reshape(-1)
    pairs = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).reshape(-1, 2).flip(1)
    tensors = {
        name: pack(pairs.contiguous(), 4).reshape(-1).view(form.storage).reshape(-1, 1),
        f"{name}.quant_map": _values(q.scheme.format.name),
    }
    if isinstance(q.scale, QTensor):
        offset = q.scale.real_offset
        assert offset is not None and isinstance(q.scale.scale, torch.Tensor)
        note = replace(note, offset=float(offset.reshape(-1)[0]))
        tensors[f"{name}.absmax"] = q.scale.codes.reshape(-1)
        tensors[f"{name}.nested_absmax"] = q.scale.scale.reshape(-1)
        tensors[f"{name}.nested_quant_map"] = _values("dynamic8")
    else:
        tensors[f"{name}.absmax"] = q.scale.reshape(-1)
    tensors[f"{name}.quant_state.bitsandbytes__{note.kind}"] = note.bytes()
    return tensors


def read_layer(placed: Placed, read: Reader) -> LayerValues:
    """The numbers of a layer, checked."""
    name, scheme = placed.name, placed.scheme.weights
    note = _state(placed, Form.of(placed))
    _check_values(f"{name}.quant_map", read(f"{name}.quant_map"), scheme.format.name)
    rows, columns = placed.matrix_shape
    packed = read(name).contiguous().view(torch.uint8).reshape(-1)
    codes = unpack(packed, 4, 2 * len(packed)).reshape(-1, 2).flip(1).reshape(-1)
    codes = codes[: rows * columns].reshape(rows, columns).contiguous()
    stored, shape = read(f"{name}.absmax"), scale_shape(scheme.granularity, (rows, columns))
    scale: torch.Tensor | QTensor = stored.reshape(shape)
    if note.nested:
        levels, inner = read(f"{name}.nested_quant_map"), read(f"{name}.nested_absmax")
        offset = read_state(f"{name}.quant_state", read(f"{name}.quant_state.bitsandbytes__{note.kind}")).offset
        if isinstance(scheme.scale, Scheme):
            _check_values(f"{name}.nested_quant_map", levels, "dynamic8")
            scale = _nested(stored.reshape(shape), inner, offset, scheme.scale)
        else:  # in float32, as the package does
            sized = inner.repeat_interleave(note.nested)[: len(stored)]
            scale = (levels[stored.long()] * sized + torch.tensor(offset)).reshape(shape)
    return LayerValues(checked(name, QTensor(codes, scale, None, None, scheme)))


def place(path: str, names: Names, read: Reader, kind: str, turned: bool) -> Placed:
    """The layer that the note of a weight describes.

    Args:
        path: of the module.
        names: every stored tensor.
        read: gives a stored tensor; the note and the values of nested scales are read.
        kind: "nf4" or "fp4".
        turned: the plain weight is (in, out), of a Conv1D.
    """
    name = f"{path}.weight"
    note = read_state(f"{path}.{NOTE}{kind}", read(f"{path}.{NOTE}{kind}"))
    if note.kind != kind:
        raise FileFormatError(f"{path}.{NOTE}{kind} is the note of a weight of kind {note.kind!r}.")
    rows, columns = note.shape
    if columns % note.size and note.size % columns:
        raise FileFormatError(
            f"{name}: blocks of {note.size} elements run across rows of {columns}, which is not read here. Give the original model."
        )
    granularity = PerGroup(note.size) if columns % note.size == 0 else PerRun(note.size)
    scheme = Scheme(FORMATS[KINDS[kind]], granularity)
    flat = False
    if note.nested and names.get(f"{name}.nested_quant_map") == ("F32", (256,)):
        flat = not torch.equal(read(f"{name}.nested_quant_map"), _values("dynamic8"))
    if note.nested and not flat:
        below = _below_zero(name, names, read, note)
        scheme = replace(scheme, scale=nested_scheme(note.nested), signed=True if below else None)
    stored = _STORAGE.get(names.get(name, ("", ()))[0])
    if stored is None:
        raise FileFormatError(f"{name} should hold codes as bytes, found {names.get(name, ('nothing',))[0]}.")
    form = Form(note.dtype, stored, note.length, note.nested if flat else 0)
    canonical = replace(form, length=0)
    placed = linear(path, (rows, columns), LayerScheme(scheme), turned, str(form))
    if _state(placed, canonical).room == note.length:
        placed = replace(placed, storage=str(canonical))
    return placed


def _below_zero(name: str, names: Names, read: Reader, note: State) -> bool:
    """Whether a scale is negative: what should be 0 may come back from its mean on the other side."""
    wanted = {f"{name}.absmax": "U8", f"{name}.nested_absmax": "F32"}
    if any(names.get(n, ("", ()))[0] != dtype for n, dtype in wanted.items()):
        return False  # which is refused later, as another type
    largest = read(f"{name}.nested_absmax")
    if not largest.numel() or note.offset - float(largest.max()) >= 0:
        return False
    scales = _values("dynamic8")[read(f"{name}.absmax").reshape(-1).int()]
    sized = largest.repeat_interleave(note.nested)[: len(scales)]
    return len(sized) == len(scales) and bool((scales * sized + note.offset < 0).any())


def _state(placed: Placed, form: Form) -> State:
    """The note of a layer, without its offset."""
    weights = placed.scheme.weights
    kind = next(word for word, format in KINDS.items() if format == weights.format.name)
    granularity = weights.granularity
    assert isinstance(granularity, PerGroup | PerRun)
    nested = form.flat
    if isinstance(weights.scale, Scheme) and isinstance(weights.scale.granularity, PerFlat):
        nested = weights.scale.granularity.size
    return State(kind, granularity.size, form.dtype, placed.matrix_shape, nested, 0.0, form.length)


def _nested(codes: torch.Tensor, scale: torch.Tensor, offset: float, scheme: Scheme) -> QTensor:
    """Scales in 8 bits; their mean is one number with one sign."""
    shape = scale_shape(scheme.granularity, tuple(codes.shape))
    assert isinstance(scheme.offset, Scheme)
    sign = torch.full(shape, int(offset >= 0), dtype=torch.uint8)
    mean = QTensor(sign, torch.tensor([[abs(offset)]], dtype=torch.float32), None, None, scheme.offset)
    return QTensor(codes, scale.reshape(shape), None, mean, scheme)


def _values(format: str) -> torch.Tensor:
    """The values of codes as the package's tables have them: its zeros have no sign."""
    return torch.tensor(FORMATS[format].values, dtype=torch.float32) + 0.0


def _check_values(name: str, stored: torch.Tensor, format: str) -> None:
    if not torch.equal(stored, _values(format)):
        raise FileFormatError(f"{name} does not hold the values of {format}, and no others are read here.")
