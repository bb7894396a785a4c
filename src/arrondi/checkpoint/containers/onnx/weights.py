"""What is quantized in an ONNX graph: `find_weights`.

Owns: the table `HOLDERS`, operator → where it has codes, scales and zero points. Weights are constants that such an operator reads; what flows
through the network is rounded by the same operators and is nothing that a file holds.

Source: the operators of ONNX 1.23 and of com.microsoft in ONNX Runtime 1.31.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from arrondi.checkpoint.containers.graph_weights import CODES, INDEX, SCALE, ZERO, Packed
from arrondi.checkpoint.containers.onnx.entries import FLOATS, entry_of, scaled_entry, value_of
from arrondi.checkpoint.containers.onnx.header import Constant, Model, Node
from arrondi.checkpoint.containers.onnx.names import Names, is_made, weight_name
from arrondi.checkpoint.containers.onnx.uses import Use, Uses
from arrondi.checkpoint.containers.tensor_file import Entry
from arrondi.errors import FileFormatError

FORMATS: Final[Mapping[str, str]] = {
    "I8": "int8", "U8": "uint8", "INT4": "int4", "UINT4": "uint4", "INT2": "int2", "UINT2": "uint2",
    "F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2", "FLOAT4E2M1": "fp4_e2m1",
}  # fmt: skip
"""Element type of codes → what a code means."""
_UNREAD: Final = (
    "DynamicQuantizeLSTM", "QEmbedLayerNormalization", "QMoE", "QOrderedMatMul", "QOrderedAttention", "QOrderedLongformerAttention",
    "MatMulFpQ4", "MatMulNBitsMlp", "MatMulNBitsQkv", "QuickGelu4",
)  # fmt: skip
"""Operators that hold weights in few bits in ways that are not read here."""
_COMPUTED: Final = "inv_freq"
"""How a constant is called that a config says already."""
_SMALL: Final = 1 << 16
"""Zero points of up to so many bytes are looked at: all zero, they say nothing."""
_BNB: Final = {0: "fp4_bnb", 1: "nf4"}
_AGAIN: Final = "Export it again."


class Found:
    """The weights of a graph.

    Attributes:
        packed: those in few bits.
        plain: all other numbers, by name.
        holders: weight → the operator that has its codes, and the names of its constants by what they are.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.uses = model, Uses(model)
        self.packed: list[Packed] = []
        self.plain: dict[str, Entry] = {}
        self.holders: dict[str, tuple[Node, Mapping[str, str]]] = {}
        self.stored: dict[str, str] = {}
        """Plain name → its constant."""
        self._names = Names()
        self._consumed: set[str] = set()
        self._refuse_functions()
        for node in model.nodes:
            if (read := HOLDERS.get(node.op)) is not None:
                read(self, node)
            elif node.op.rpartition(".")[2] in _UNREAD:
                raise FileFormatError(
                    f"{model.path}: {node.name or 'a node'} is a {node.op}, whose weights are not read here. Export the network without it."
                )
        self._leave_grids()
        self._rest()

    def constant(self, name: str) -> Constant | None:
        """The constant that a value is, through operators that change nothing."""
        for _ in range(4):
            if name in self.model.constants:
                return self.model.constants[name]
            maker = self.uses.makers.get(name)
            if maker is None or maker.op != "Identity" or not maker.inputs:
                return None
            name = maker.inputs[0]
        return None

    def named(self, node: Node, name: str, what: str) -> Constant:
        """A constant that has to be one.

        Raises:
            FileFormatError: it is computed.
        """
        found = self.constant(name)
        if found is None:
            raise FileFormatError(
                f"{self.model.path}: {node.name or node.op} has {what} that are computed and not stored. {_AGAIN}"
            )
        return found

    def linear(
        self, node: Node, codes: Constant, scale: str, zero: str, axis: int, block: int = 0, use: Use | None = None
    ) -> None:
        """A tensor of codes under scales of the tensor, of an axis or of blocks."""
        if codes.name in self._consumed:
            return
        scales = self.named(node, scale, "scales")
        zeros = self.constant(zero) if zero else None
        if zero and zeros is None:
            raise FileFormatError(
                f"{self.model.path}: {node.name or node.op} has zero points that are computed. {_AGAIN}"
            )
        if scales.dtype not in FLOATS:
            raise FileFormatError(f"{self.model.path}: the scales {scales.name!r} are of type {scales.dtype}. {_AGAIN}")
        rank = len(codes.shape)
        axis = axis + rank if axis < 0 else axis
        self._check_grid(codes, scales, zeros, axis, block)
        if zeros is not None and zeros.numel * 2 <= _SMALL and not bool((value_of(zeros) != 0).any()):
            self._consumed.add(zeros.name)
            zeros = None
        name = self._take(codes, use.node if use else node)
        self._consumed |= {scales.name, *([zeros.name] if zeros else [])}
        transposed = use is not None and use.transposed
        if not self._said(codes, zeros, scales, axis, block, use):
            self.plain[name] = scaled_entry(name, codes, (scales,), zeros, axis, transposed)
            return
        one = scales.numel == 1 and not block
        facts: dict[str, Any] = {
            "form": "linear",
            "type": FORMATS[codes.dtype],
            "shape": list(codes.shape[::-1] if transposed else codes.shape),
        }
        facts |= {} if one else {"axis": axis}
        facts |= {"block": block} if block else {}
        kind = use.kind if use else "Linear" if rank == 2 else "Tensor"
        facts |= {"kind": kind} if kind != "Linear" else {}
        facts |= {"transposed": True} if transposed else {}
        shape = scales.shape if block else (scales.numel,)
        parts = {CODES: entry_of(name + CODES, codes), SCALE: entry_of(name + SCALE, scales, shape)}
        if zeros is not None:
            parts[ZERO] = entry_of(name + ZERO, zeros, None if zeros.dtype not in ("I8", "U8") else shape)
        self._put(
            name, node, facts, parts, {CODES: codes.name, SCALE: scales.name, **({ZERO: zeros.name} if zeros else {})}
        )

    def blocks(self, node: Node, codes: Constant, scale: str, zero: str, index: str, bits: int, block: int, rows: int, columns: int, kind: str) -> None:  # fmt: skip
        """Rows of blocks of inputs."""
        if codes.name in self._consumed:
            return
        what = f"{self.model.path}: {node.name or node.op}"
        if bits not in (2, 4, 8) or block < 16 or block & (block - 1) or block > 1 << 20 or rows < 1 or columns < 1:
            raise FileFormatError(
                f"{what} has codes of {bits} bits in blocks of {block}, and ({rows}, {columns}) of them; read are 2, 4 and 8 bits in blocks of a power of two from 16. {_AGAIN}"
            )
        count = -(-columns // block)
        scales, zeros = self.named(node, scale, "scales"), self.constant(zero) if zero else None
        if zero and zeros is None:
            raise FileFormatError(f"{what} has zero points that are computed. {_AGAIN}")
        wanted = {
            "codes": (codes, ("U8",), rows * count * (block * bits // 8)),
            "scales": (scales, FLOATS, rows * count),
        }
        packed = zeros is not None and zeros.dtype == "U8"
        if zeros is not None:
            wanted["zero points"] = (zeros, ("U8", scales.dtype), rows * (-(-count * bits // 8) if packed else count))
        for word, (held, types, numel) in wanted.items():
            flat = held.shape == (numel,) or held.shape[:1] == (rows,)
            if held.dtype not in types or held.numel != numel or not flat:
                raise FileFormatError(
                    f"{what}: the {word} {held.name!r} are {held.dtype} of shape {list(held.shape)}, and {numel} of type {' or '.join(dict.fromkeys(types))} are needed. {_AGAIN}"
                )
        name = self._take(codes, node)
        parts = {
            CODES: entry_of(name + CODES, codes, (rows, count, block * bits // 8)),
            SCALE: entry_of(name + SCALE, scales, (rows, count)),
        }
        if zeros is not None:
            parts[ZERO] = entry_of(name + ZERO, zeros, (rows, zeros.numel // rows))
        if index:
            groups = self.named(node, index, "groups")
            if zeros is not None or groups.dtype != "I32" or groups.numel < columns or len(groups.shape) != 1:
                raise FileFormatError(f"{what} has scattered groups with zero points, or too few. Quantize it without act-order.")  # fmt: skip
            parts[INDEX] = entry_of(name + INDEX, groups)
            self._consumed.add(groups.name)
        self._consumed |= {scales.name, *([zeros.name] if zeros else [])}
        facts = {"form": "blocks", "type": f"int{bits}", "shape": [rows, columns], "block": block}
        facts |= {"kind": kind} if kind != "Linear" else {}
        stored = {CODES: codes.name, SCALE: scales.name, **({ZERO: zeros.name} if zeros else {})}
        self._put(name, node, facts, parts, stored)

    def flat(self, node: Node, codes: Constant, scale: str, kind: str, block: int, rows: int, columns: int) -> None:
        """One stream of codes of four bits."""
        if codes.name in self._consumed:
            return
        scales = self.named(node, scale, "scales")
        numel = rows * columns
        if block < 1 or rows < 1 or columns < 1 or codes.dtype != "U8" or codes.numel != -(-numel // 2) or scales.numel != -(-numel // block) or (columns % block and block % columns):  # fmt: skip
            raise FileFormatError(
                f"{self.model.path}: {node.name or node.op} has {codes.numel} bytes and {scales.numel} scales for ({rows}, {columns}) in blocks of {block}. {_AGAIN}"
            )
        name = self._take(codes, node)
        self._consumed.add(scales.name)
        facts = {"form": "bnb4", "type": kind, "shape": [rows, columns], "block": block}
        parts = {
            CODES: entry_of(name + CODES, codes, (codes.numel,)),
            SCALE: entry_of(name + SCALE, scales, (scales.numel,)),
        }
        self._put(name, node, facts, parts, {CODES: codes.name, SCALE: scales.name})

    def bias(self, node: Node, codes: str, scales: list[str]) -> None:
        """Whole numbers that are added to sums, under the product of two scales."""
        held, parts = self.constant(codes) if codes else None, [self.constant(s) for s in scales]
        if held is None or held.name in self._consumed or any(p is None for p in parts) or len(held.shape) != 1:
            return
        name = self._take(held, None)
        self.plain[name] = scaled_entry(name, held, tuple(p for p in parts if p is not None), None, 0)

    def _put(
        self, name: str, node: Node, facts: dict[str, Any], parts: dict[str, Entry], stored: dict[str, str]
    ) -> None:
        self.packed.append(Packed(name, facts, parts))
        self.holders[name] = node, stored

    def _take(self, codes: Constant, node: Node | None) -> str:
        self._consumed.add(codes.name)
        bias = self.uses.bias_of(node) if node is not None else ""
        return self._names.fresh(weight_name(codes.name, node, bias), codes.name)

    def _said(self, codes: Constant, zeros: Constant | None, scales: Constant, axis: int, block: int, use: Use | None) -> bool:  # fmt: skip
        """Whether a scheme says this grid."""
        rank = len(codes.shape)
        if codes.dtype not in FORMATS or rank < 2 or scales.dtype == "F64" or 0 in codes.shape:
            return False
        if zeros is not None and FORMATS[codes.dtype].startswith("fp"):
            return False
        if block:
            return rank == 2
        turned = use is not None and use.kind.startswith("ConvTranspose")
        return scales.numel == 1 or rank == 2 or (axis == 0 and not turned) or turned

    def _check_grid(self, codes: Constant, scales: Constant, zeros: Constant | None, axis: int, block: int) -> None:
        what = f"{self.model.path}: the tensor {codes.name!r} of shape {list(codes.shape)}"
        along = codes.shape[axis] if 0 <= axis < len(codes.shape) else None
        if block:
            wanted = tuple(-(-n // block) if i == axis else n for i, n in enumerate(codes.shape))
            if block < 0 or along is None or scales.shape != wanted:
                raise FileFormatError(f"{what} has scales of shape {list(scales.shape)} for blocks of {block} on axis {axis}. {_AGAIN}")  # fmt: skip
        elif scales.numel != 1 and scales.numel != along:
            raise FileFormatError(f"{what} has {scales.numel} scales on axis {axis}. {_AGAIN}")
        alike = zeros is None or (zeros.shape == scales.shape if block else zeros.numel == scales.numel)
        if zeros is not None and (zeros.dtype != codes.dtype or not alike):
            raise FileFormatError(f"{what} and type {codes.dtype} has zero points {list(zeros.shape)} of type {zeros.dtype} for scales {list(scales.shape)}. {_AGAIN}")  # fmt: skip

    def _refuse_functions(self) -> None:
        strange = next((op for op in self.model.functions if "Quant" in op or op.startswith("MatMulNBits")), None)
        if strange is not None:
            raise FileFormatError(
                f"{self.model.path}: has functions of its own with {strange} inside. Put them in their places first: onnx.inliner.inline_local_functions."
            )

    def _leave_grids(self) -> None:
        """Scales and zero points of what flows are no weights."""
        for node in self.model.nodes:
            op = node.op.rpartition(".")[2]
            if op in ("QuantizeLinear", "DequantizeLinear"):
                self._consumed |= set(node.inputs[1:3])
            elif op.startswith("QLinear"):
                self._consumed |= {
                    n for n in node.inputs if n in self.model.constants and self.model.constants[n].numel == 1
                }

    def _rest(self) -> None:
        """All other numbers: what multiplies as (out, in), the others as they are. Whole numbers, and single ones that an exporter made, are no weights."""
        for name, held in self.model.constants.items():
            outer = name in self.model.stored
            if name in self._consumed or held.dtype not in (*FLOATS, *FORMATS) or not (outer or len(held.shape) > 1):
                continue
            if name not in self.uses.readers or (held.numel == 1 and is_made(name)) or name.endswith(_COMPUTED):
                continue
            use = self.uses.of(name, len(held.shape))
            fresh = self._take(held, use.node if use else None)
            turned = use is not None and use.transposed
            self.plain[fresh] = entry_of(fresh, held, None, turned)
            self.stored[fresh] = name


def find_weights(model: Model) -> Found:
    """The weights of a graph.

    Raises:
        FileFormatError: scales that are not stored, or that do not go with their codes; an operator whose weights are not known here.
    """
    return Found(model)


def _at(node: Node, place: int) -> str:
    return node.inputs[place] if place < len(node.inputs) else ""


def _whole(found: Found, node: Node, key: str, usual: int) -> int:
    """A whole number among the attributes of an operator."""
    value = node.attrs.get(key, usual)
    if not isinstance(value, int):
        raise FileFormatError(
            f"{found.model.path}: {key} of {node.name or node.op} is {value!r}, not a whole number. {_AGAIN}"
        )
    return value


def _dequantized(found: Found, node: Node) -> None:
    codes, use, gathered = found.constant(_at(node, 0)), None, None
    if codes is None:
        gathered = found.uses.makers.get(_at(node, 0))
        if gathered is None or gathered.op != "Gather" or gathered.attrs.get("axis", 0) != 0:
            return
        codes = found.constant(_at(gathered, 0))
        if codes is None:
            return
        scale = found.constant(_at(node, 1))
        if scale is None or scale.numel != 1:
            return
        use = Use(gathered, "Embedding")
    if use is None and node.outputs:
        use = found.uses.of(node.outputs[0], len(codes.shape))
    block = _whole(found, node, "block_size", 0)
    found.linear(node, codes, _at(node, 1), _at(node, 2), _whole(found, node, "axis", 1), block, use)


def _on_codes(weight: int, scale: int, zero: int, kind: str, bias: tuple[int, ...] = ()) -> Callable[[Found, Node], None]:  # fmt: skip
    """Operators that multiply codes: the places of weight, scale and zero point among their inputs, and of a bias with the scales that it has."""

    def read(found: Found, node: Node) -> None:
        codes = found.constant(_at(node, weight))
        if codes is None:
            return
        rank = len(codes.shape)
        turned = kind == "Linear" and rank == 2 and not node.attrs.get("transB", 0)
        use = Use(node, f"Conv{rank - 2}d" if kind == "Conv" else kind, turned)
        axis = 0 if kind == "Conv" or (kind == "Linear" and not turned) else rank - 1
        found.linear(node, codes, _at(node, scale), _at(node, zero), axis, 0, use)
        if bias:
            found.bias(node, _at(node, bias[0]), [_at(node, place) for place in bias[1:]])

    return read


def _integer(kind: str) -> Callable[[Found, Node], None]:
    """Products of codes whose sums are multiplied by scales afterwards."""

    def read(found: Found, node: Node) -> None:
        codes = found.constant(_at(node, 1))
        if codes is None:
            return
        scale = _scale_behind(found, node)
        if scale is None:
            raise FileFormatError(
                f"{found.model.path}: nothing behind {node.name or node.op} multiplies its sums by a stored scale, so the numbers of {codes.name!r} are not known."
            )
        rank = len(codes.shape)
        use = Use(node, f"Conv{rank - 2}d" if kind == "Conv" else "Linear", kind == "Linear" and rank == 2)
        found.linear(node, codes, scale, _at(node, 3), 0 if kind == "Conv" else rank - 1, 0, use)

    return read


def _scale_behind(found: Found, node: Node) -> str | None:
    """The stored scale in the product that sums of codes become."""
    value = node.outputs[0] if node.outputs else ""
    for _ in range(4):
        readers = found.uses.readers.get(value, [])
        if not readers:
            return None
        place, after = readers[0]
        if after.op == "Mul" and len(after.inputs) == 2:
            return _stored_factor(found, after.inputs[1 - place], 3)
        if after.op not in ("Cast", "Add", "Identity", "Reshape") or not after.outputs:
            return None
        value = after.outputs[0]
    return None


def _stored_factor(found: Found, value: str, depth: int) -> str | None:
    if found.constant(value) is not None:
        return value
    maker = found.uses.makers.get(value)
    if maker is None or not depth or maker.op not in ("Mul", "Reshape", "Unsqueeze", "Identity", "Squeeze"):
        return None
    places = maker.inputs if maker.op == "Mul" else maker.inputs[:1]
    return next((f for v in places if (f := _stored_factor(found, v, depth - 1)) is not None), None)


def _nbits(found: Found, node: Node) -> None:
    codes = found.constant(_at(node, 1))
    if codes is None:
        return
    bits, block, rows, columns = (
        _whole(found, node, key, usual) for key, usual in (("bits", 4), ("block_size", 0), ("N", 0), ("K", 0))
    )
    found.blocks(node, codes, _at(node, 2), _at(node, 3), _at(node, 4), bits, block, rows, columns, "Linear")


def _gather_blocks(found: Found, node: Node) -> None:
    codes = found.constant(_at(node, 0))
    if codes is None:
        return
    block, axis = _whole(found, node, "block_size", 128), _whole(found, node, "quantize_axis", 1)
    rank = len(codes.shape)
    if codes.dtype != "U8":
        found.linear(node, codes, _at(node, 2), _at(node, 3), axis, block, Use(node, "Embedding" if rank == 2 else ""))
        return
    bits = _whole(found, node, "bits", 4)
    if rank != 2 or axis % 2 != 1 or not 0 < bits <= 8 or (codes.shape[1] * 8 // bits) % max(block, 1):
        raise FileFormatError(
            f"{found.model.path}: {node.name or node.op} has codes of shape {list(codes.shape)} with blocks of {block} on axis {axis}, which are not read here. {_AGAIN}"
        )
    columns = codes.shape[1] * 8 // bits
    found.blocks(node, codes, _at(node, 2), _at(node, 3), "", bits, block, codes.shape[0], columns, "Embedding")


def _bnb4(found: Found, node: Node) -> None:
    codes = found.constant(_at(node, 1))
    if codes is None:
        return
    kind = _BNB.get(_whole(found, node, "quant_type", 1))
    if kind is None or _whole(found, node, "transB", 1) != 1:
        raise FileFormatError(f"{found.model.path}: {node.name or node.op} has codes of a kind that is not known here. {_AGAIN}")  # fmt: skip
    block, rows, columns = (_whole(found, node, key, 0) for key in ("block_size", "N", "K"))
    found.flat(node, codes, _at(node, 2), kind, block, rows, columns)


HOLDERS: Final[Mapping[str, Callable[[Found, Node], None]]] = {
    "DequantizeLinear": _dequantized,
    "com.microsoft.DequantizeLinear": _dequantized,
    "QLinearConv": _on_codes(3, 4, 5, "Conv", (8, 1, 4)),
    "QLinearMatMul": _on_codes(3, 4, 5, "Linear"),
    "com.microsoft.QLinearConv": _on_codes(3, 4, 5, "Conv", (8, 1, 4)),
    "com.microsoft.QGemm": _on_codes(3, 4, 5, "Linear", (6, 1, 4)),
    "com.microsoft.QAttention": _on_codes(1, 4, 7, "Linear"),
    "com.microsoft.MatMulIntegerToFloat": _on_codes(1, 3, 5, "Linear"),
    "com.microsoft.DynamicQuantizeMatMul": _on_codes(1, 2, 3, "Linear"),
    "MatMulInteger": _integer("Linear"),
    "ConvInteger": _integer("Conv"),
    "com.microsoft.MatMulNBits": _nbits,
    "com.microsoft.MatMulBnb4": _bnb4,
    "com.microsoft.GatherBlockQuantized": _gather_blocks,
}
"""Operator → how its weight is read."""
