"""What an ONNX file says: operators and constants, and where the numbers of each constant lie. No weight is read.

Owns: `read_model`, `Model`, `Node` and `Constant`. The package onnx is not needed for it. Everything is checked before it is believed: lengths,
shapes against bytes, and that numbers beside the file lie in its folder.

Source: onnx.proto of ONNX 1.23.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from arrondi.checkpoint.containers.descriptors import reraise_exhaustion
from arrondi.checkpoint.containers.tensor_file import DTYPES
from arrondi.checkpoint.containers.wire import BYTES, Field, Wire, signed
from arrondi.errors import FileFormatError

TYPES: Final[Mapping[int, str]] = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 8: "STRING", 9: "BOOL", 10: "F16", 11: "F64", 12: "U32", 13: "U64",
    14: "C64", 16: "BF16", 17: "F8_E4M3", 19: "F8_E5M2", 21: "UINT4", 22: "INT4", 23: "FLOAT4E2M1", 24: "F8_E8M0", 25: "UINT2", 26: "INT2",
}  # fmt: skip
"""Number of an element type → its name, safetensors' where it has one."""
NARROW: Final[Mapping[str, int]] = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}
"""Types of which several share a byte → bits."""

_DATA: Final = {9: "", 4: "F32", 10: "F64"}
"""Fields of a tensor whose bytes are its numbers → the only type that they hold."""
_COUNTED: Final = (5, 7, 11)
"""Fields of a tensor that hold varints."""
_MOST: Final = 1 << 20
"""Operators or constants: no real file has as many."""
_DEEPEST: Final = 8
"""Graphs inside operators."""
_AGAIN: Final = "Export it again."


@dataclass(frozen=True)
class Constant:
    """A tensor of the file.

    Attributes:
        dtype: a name of `TYPES`.
        path, start, stop: where its bytes are.
        varints: they are varints, one for each number (for each byte's worth of narrow ones).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int
    varints: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Node:
    """An operator.

    Attributes:
        op: its type in ONNX's own domain, or domain.type.
        attrs: whole numbers, floats, texts and lists of numbers; other attributes are left out.
        scope: path of the module that it was exported from, as PyTorch's exporter notes it; None: not noted.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any]
    scope: str | None = None


@dataclass
class Model:
    """What a file says.

    Attributes:
        opsets: domain → version; "" is ONNX's own.
        metadata: keys of the file, and who made it.
        nodes: all operators, those of inner graphs among them.
        constants: by name; `stored` are the initializers of the outer graph among them.
        inputs, outputs: of the outer graph: name → (element type, shape).
        functions: operators that the file itself says in others.
    """

    path: Path
    opsets: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)
    stored: list[str] = field(default_factory=list)
    inputs: dict[str, tuple[str, tuple[int | str, ...]]] = field(default_factory=dict)
    outputs: dict[str, tuple[str, tuple[int | str, ...]]] = field(default_factory=dict)
    functions: list[str] = field(default_factory=list)


def read_model(path: Path) -> Model:
    """The header of an ONNX file.

    Raises:
        FileFormatError: truncated, no ONNX file, a name twice, an unknown type, a shape that contradicts its bytes, or numbers that should
            lie beside the file and do not, or lie outside of its folder.
    """
    try:
        with path.open("rb") as file:
            return _Parser(Wire(path, file)).model()
    except OSError as error:
        reraise_exhaustion(error)
        raise FileFormatError(f"{path}: cannot be read ({error.strerror}). Give an ONNX file.") from error


class _Parser:
    def __init__(self, wire: Wire) -> None:
        self.wire, self.path, self.found = wire, wire.path, Model(wire.path)
        self.given: set[str] = set()
        """What graphs are given, inner ones too."""

    def model(self) -> Model:
        graphs = []
        for f in self.wire.fields(0, self.wire.size):
            if f.number == 7 and f.kind == BYTES:
                graphs.append(f)
            elif f.number == 8 and f.kind == BYTES:
                domain, version = self.opset(f)
                self.found.opsets["" if domain == "ai.onnx" else domain] = version
            elif f.number in (2, 3) and f.kind == BYTES:
                self.found.metadata[{2: "producer_name", 3: "producer_version"}[f.number]] = self.wire.text(f)
            elif f.number == 14 and f.kind == BYTES:
                key, value = self.pair(f)
                self.found.metadata[key] = value
            elif f.number == 25 and f.kind == BYTES:
                self.function(f)
        if len(graphs) != 1:
            raise FileFormatError(f"{self.path}: holds {len(graphs)} graphs, so it is no ONNX file. {_AGAIN}")
        self.graph(graphs[0], 0)
        if not self.found.nodes and not self.found.constants:
            raise FileFormatError(f"{self.path}: its graph is empty, so it is no ONNX file. {_AGAIN}")
        self.check_made()
        return self.found

    def check_made(self) -> None:
        """Refuse an operator that reads what is not in the file."""
        made = self.found.constants.keys() | self.given | {name for node in self.found.nodes for name in node.outputs}
        for node in self.found.nodes:
            lost = next((name for name in node.inputs if name and name not in made), None)
            if lost is not None:
                raise FileFormatError(
                    f"{self.path}: {node.name or node.op} reads {lost!r}, which is not in the file. {_AGAIN}"
                )

    def graph(self, whole: Field, depth: int) -> None:
        if depth > _DEEPEST:
            raise FileFormatError(f"{self.path}: has graphs inside graphs, {depth} deep. {_AGAIN}")
        for f in self.wire.fields(whole.start, whole.stop):
            if f.kind != BYTES:
                continue
            if f.number == 1:
                self.node(f, depth)
            elif f.number == 5:
                constant = self.tensor(f)
                self.keep(constant)
                if not depth:
                    self.found.stored.append(constant.name)
            elif f.number == 15:
                raise FileFormatError(f"{self.path}: holds sparse constants, which are not read. Make them dense.")
            elif f.number in (11, 12):
                name, kind, shape = self.value(f)
                self.given |= {name} if f.number == 11 else set()
                if depth:
                    continue
                (self.found.inputs if f.number == 11 else self.found.outputs)[name] = (kind, shape)

    def keep(self, constant: Constant) -> None:
        if not constant.name or len(self.found.constants) > _MOST:
            raise FileFormatError(f"{self.path}: has a constant without a name, or too many. {_AGAIN}")
        if constant.name in self.found.constants:
            raise FileFormatError(f"{self.path}: has the constant {constant.name!r} twice. {_AGAIN}")
        self.found.constants[constant.name] = constant

    def node(self, whole: Field, depth: int) -> None:
        inputs, outputs, attrs = list[str](), list[str](), dict[str, Any]()
        words = {3: "", 4: "", 7: ""}
        scope = None
        for f in self.wire.fields(whole.start, whole.stop):
            if f.kind != BYTES:
                continue
            if f.number in (1, 2):
                (inputs if f.number == 1 else outputs).append(self.wire.text(f))
            elif f.number in words:
                words[f.number] = self.wire.text(f)
            elif f.number == 5:
                name, value = self.attribute(f, depth)
                attrs[name] = value
            elif f.number == 9:
                key, value = self.pair(f)
                scope = _scope(value) if key == "pkg.torch.onnx.name_scopes" else scope
        domain = words[7]
        op = words[4] if domain in ("", "ai.onnx") else f"{domain}.{words[4]}"
        if op == "Constant" and isinstance(attrs.get("value"), Constant) and outputs:
            held = attrs["value"]
            self.keep(Constant(outputs[0], held.dtype, held.shape, held.path, held.start, held.stop, held.varints))
            return
        if len(self.found.nodes) > _MOST:
            raise FileFormatError(f"{self.path}: has more operators than any network. {_AGAIN}")
        plain = {k: v for k, v in attrs.items() if v is not None and not isinstance(v, Constant)}
        self.found.nodes.append(Node(words[3], op, tuple(inputs), tuple(outputs), plain, scope))

    def attribute(self, whole: Field, depth: int) -> tuple[str, Any]:
        name, kind = "", 0
        value: Any = None
        for f in self.wire.fields(whole.start, whole.stop):
            if f.number == 1 and f.kind == BYTES:
                name = self.wire.text(f)
            elif f.number == 2:
                value = self.wire.real(f)
            elif f.number == 3 and f.kind != BYTES:
                value = signed(f.value)
            elif f.number == 4 and f.kind == BYTES:
                value = self.wire.text(f)
            elif f.number == 5 and f.kind == BYTES:
                value = self.tensor(f)
            elif f.number in (6, 11) and f.kind == BYTES:
                self.graph(f, depth + 1)
            elif f.number == 8:
                value = [*(value if isinstance(value, list) else []), *self.wire.numbers(f)]
            elif f.number == 20 and f.kind != BYTES:
                kind = f.value
        return name, _UNSAID.get(kind) if value is None else value

    def tensor(self, whole: Field) -> Constant:
        shape, kind, name = list[int](), 0, ""
        data: list[Field] = []
        beside: dict[str, str] = {}
        outside = False
        for f in self.wire.fields(whole.start, whole.stop):
            if f.number == 1:
                shape += self.wire.numbers(f)
            elif f.number == 2:
                kind = f.value
            elif f.number == 8 and f.kind == BYTES:
                name = self.wire.text(f)
            elif f.number == 13 and f.kind == BYTES:
                key, value = self.pair(f)
                beside[key] = value
            elif f.number == 14:
                outside = f.value == 1
            elif f.number == 3:
                raise self.refused(name, "is stored in segments")
            elif f.number in (*_DATA, *_COUNTED, 6) and f.stop > f.start:
                data.append(f)
        if kind not in TYPES:
            raise self.refused(name, f"has the element type {kind}, which is not known here")
        if any(n < 0 or n >= 2**40 for n in shape) or math.prod(max(n, 1) for n in shape) >= 2**59:
            raise self.refused(name, f"has the shape {shape}")
        dtype = TYPES[kind]
        if dtype == "STRING":
            return Constant(name, dtype, tuple(shape), self.path, whole.start, whole.start)
        if outside:
            return self.outside(name, dtype, tuple(shape), beside)
        return self.inside(name, dtype, tuple(shape), data, whole.start)

    def inside(self, name: str, dtype: str, shape: tuple[int, ...], data: list[Field], at: int) -> Constant:
        need = _nbytes(dtype, shape)
        if len(data) > 1 or any(f.kind != BYTES for f in data):
            raise self.refused(
                name, f"is stored in pieces at byte {at}. Save the file again with the package onnx", stop=""
            )
        if not data:
            if need:
                raise self.refused(name, f"at byte {at} has the shape {list(shape)} and no numbers")
            return Constant(name, dtype, shape, self.path, at, at)
        (f,) = data
        length = f.stop - f.start
        if f.number in _COUNTED:
            count = math.prod(shape) if dtype not in NARROW else need
            if not count <= length <= 10 * count:
                raise self.refused(
                    name, f"at byte {f.start} has {length} bytes, too few or many for the shape {list(shape)}"
                )
            return Constant(name, dtype, shape, self.path, f.start, f.stop, varints=True)
        if f.number not in _DATA or _DATA[f.number] not in ("", dtype) or length != need:
            raise self.refused(
                name, f"at byte {f.start} has {length} bytes, but {dtype} of shape {list(shape)} needs {need}"
            )
        return Constant(name, dtype, shape, self.path, f.start, f.stop)

    def outside(self, name: str, dtype: str, shape: tuple[int, ...], beside: Mapping[str, str]) -> Constant:
        place, need = beside.get("location", ""), _nbytes(dtype, shape)
        path = self.neighbour(name, place)
        try:
            start, length = int(beside.get("offset") or 0), int(beside.get("length") or need)
        except ValueError:
            raise self.refused(name, f"has an offset or a length in {place} that is no number") from None
        size = path.stat().st_size
        if start < 0 or length != need or start + length > size:
            raise self.refused(
                name, f"lies at the bytes {start} to {start + length} of {path.name}, which has {size}; {dtype} of shape {list(shape)} needs {need}"
            )  # fmt: skip
        return Constant(name, dtype, shape, path, start, start + length)

    def neighbour(self, name: str, place: str) -> Path:
        """The file beside this one that holds a constant."""
        parts = Path(place).parts
        if not parts or Path(place).is_absolute() or ".." in parts or "\\" in place or "\0" in place:
            raise self.refused(name, f"lies in {place!r}, which is no file beside this one", stop="")
        path = self.path.parent / place
        if not path.is_file():
            raise self.refused(name, f"lies in {place}, which is not there. Put it beside the file", stop="")
        real, home = Path(os.path.realpath(path)), Path(os.path.realpath(self.path.parent))
        if home not in real.parents and real.parent != Path(os.path.realpath(self.path)).parent:
            raise self.refused(name, f"lies in {place}, a link to a file of another folder", stop="")
        return path

    def refused(self, name: str, what: str, stop: str = f". {_AGAIN}") -> FileFormatError:
        return FileFormatError(f"{self.path}: the tensor {name!r} {what}{stop or '.'}")

    def value(self, whole: Field) -> tuple[str, str, tuple[int | str, ...]]:
        """Name, element type and shape of an input or output."""
        name, kind, shape = "", "", list[int | str]()
        for f in self.wire.fields(whole.start, whole.stop):
            if f.number == 1 and f.kind == BYTES:
                name = self.wire.text(f)
            elif f.number == 2 and f.kind == BYTES:
                for tensor in self.inner(f, 1):
                    for g in self.wire.fields(tensor.start, tensor.stop):
                        if g.number == 1 and g.kind != BYTES:
                            kind = TYPES.get(g.value, str(g.value))
                        elif g.number == 2 and g.kind == BYTES:
                            shape = [self.size_of(d) for d in self.inner(g, 1)]
        return name, kind, tuple(shape)

    def size_of(self, whole: Field) -> int | str:
        for f in self.wire.fields(whole.start, whole.stop):
            if f.number == 1 and f.kind != BYTES:
                return signed(f.value)
            if f.number == 2 and f.kind == BYTES:
                return self.wire.text(f)
        return "?"

    def inner(self, whole: Field, number: int) -> Iterator[Field]:
        return (f for f in self.wire.fields(whole.start, whole.stop) if f.number == number and f.kind == BYTES)

    def pair(self, whole: Field) -> tuple[str, str]:
        words = {1: "", 2: ""}
        for f in self.wire.fields(whole.start, whole.stop):
            if f.number in words and f.kind == BYTES:
                words[f.number] = self.wire.text(f)
        return words[1], words[2]

    def opset(self, whole: Field) -> tuple[str, int]:
        domain, version = "", 0
        for f in self.wire.fields(whole.start, whole.stop):
            if f.number == 1 and f.kind == BYTES:
                domain = self.wire.text(f)
            elif f.number == 2 and f.kind != BYTES:
                version = f.value
        return domain, version

    def function(self, whole: Field) -> None:
        """Operators of a function, of which only the names count: constants inside are refused where they would be weights."""
        for f in self.inner(whole, 7):
            self.found.functions += [self.wire.text(g) for g in self.inner(f, 4)]


_UNSAID: Final[Mapping[int, float]] = {1: 0.0, 2: 0}
"""Types of attributes that may be left out because they are zero: of a float, of a whole number."""


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = math.prod(shape)
    return -(-count * NARROW[dtype] // 8) if dtype in NARROW else count * DTYPES[dtype].itemsize


def _scope(text: str) -> str | None:
    """The path of the innermost module in a list of paths and, last, the name of the operation: "['', 'a', 'a.b', 'linear']"."""
    words = [w.strip().strip("'\"") for w in text.strip("[]").split(",")]
    return words[-2] if len(words) > 1 else None
