"""Other weights in an ONNX graph: packed ones in the place of floats, floats in the place of packed ones, one form in the place of another.

Owns: `Places` (which weights of a graph can be replaced, and by what) and `replace_weights`. Only what holds weights alone is touched: operators that
multiply codes of both sides stay as they are. Every weight is first made a value of its own, by which MatMul, Gemm, Gather or Conv compute, and
that value is then given by MatMulNBits, by a DequantizeLinear or as floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.checkpoint.containers.graph_weights import CODES, INDEX, SCALE, ZERO
from arrondi.checkpoint.containers.onnx.header import NARROW, TYPES, Constant, Node
from arrondi.checkpoint.containers.onnx.view import View
from arrondi.checkpoint.containers.tensor_file import DTYPE_NAMES, as_memory
from arrondi.graph.bulk import Bulk
from arrondi.graph.read import onnx_package

MICROSOFT: Final = "com.microsoft"
_NUMBERS: Final = {name: number for number, name in TYPES.items()}
_BLOCKS: Final = (f"{MICROSOFT}.MatMulNBits", f"{MICROSOFT}.MatMulBnb4")
_TABLES: Final = (f"{MICROSOFT}.GatherBlockQuantized",)
_QDQ: Final = ("DequantizeLinear", f"{MICROSOFT}.DequantizeLinear")
_DROPPED: Final = 1024
"""Bytes of a constant that stays in the message while it is changed."""


@dataclass(frozen=True)
class Place:
    """A weight that can be replaced.

    Attributes:
        name: of the weight, as the file's view has it.
        shape: (out, in) of a matrix, or of a kernel.
        value: name of the value that operators compute by.
        turned: that value is (in, out).
        kind: class of the layer.
        dtype: name of the type of its floats: F32, F16, BF16.
        products: all its readers are products, so that MatMulNBits can take their place.
        codes: name of the constant of its codes; "" of floats.
    """

    name: str
    shape: tuple[int, ...]
    value: str
    turned: bool
    kind: str
    dtype: str
    products: bool
    codes: str = ""


def places_of(view: View) -> dict[str, Place]:
    """The weights of a file that can be replaced, by name."""
    found, places = view.found, dict[str, Place]()
    for weight in found.packed:
        node, stored = found.holders[weight.name]
        shape, kind = tuple(weight.facts["shape"]), weight.facts.get("kind", "Linear")
        dtype = weight.parts[SCALE].dtype
        codes = stored[CODES]
        if codes not in node.inputs:
            continue
        if node.op in _BLOCKS or node.op in _TABLES:
            turned = node.op in _BLOCKS
            free = weight.name not in view.model.constants and weight.name not in found.uses.makers
            value = weight.name if free else codes
            places[weight.name] = Place(weight.name, shape, value, turned, kind, dtype, turned, codes)
        elif node.op in _QDQ and node.inputs[0] == codes:
            turned = bool(weight.facts.get("transposed", False))
            products = kind == "Linear" and _only_products(view, node.outputs[0])
            places[weight.name] = Place(weight.name, shape, node.outputs[0], turned, kind, dtype, products, codes)
    for name, constant in found.stored.items():
        held = view.model.constants[constant]
        use = found.uses.of(constant, len(held.shape))
        if use is not None and held.dtype in ("F32", "F16", "BF16"):
            products = use.kind == "Linear" and _only_products(view, constant)
            shape = held.shape[::-1] if use.transposed else held.shape
            places[name] = Place(name, shape, constant, use.transposed, use.kind, held.dtype, products)
    return places


def _only_products(view: View, value: str) -> bool:
    """Whether a value is read by products alone that MatMulNBits computes, directly or through a transpose."""
    readers = view.found.uses.readers.get(value, [])
    if not readers or value in view.model.outputs:
        return False
    for place, node in readers:
        if node.op == "Transpose" and node.attrs.get("perm", [1, 0]) == [1, 0]:
            inner = view.found.uses.readers.get(node.outputs[0], [])
            if not inner or node.outputs[0] in view.model.outputs or not all(_is_product(p, n) for p, n in inner):
                return False
        elif not _is_product(place, node):
            return False
    return True


def _is_product(place: int, node: Node) -> bool:
    get = node.attrs.get
    plain = get("alpha", 1.0) == 1.0 and get("beta", 1.0) == 1.0 and not get("transA", 0)
    return place == 1 and (node.op == "MatMul" or (node.op == "Gemm" and plain))


Part = tuple[str, tuple[int, ...], int, Callable[[], torch.Tensor]]
"""A tensor that is made when it is written: element type (a name of ONNX's), shape, bytes, and what gives it."""


@dataclass
class Change:
    """What a weight becomes.

    Attributes:
        form: "blocks", "linear" or "float".
        attrs: of its operator: block_size, bits, axis.
        tensors: end of the name → its part.
    """

    form: str
    attrs: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, Part] = field(default_factory=dict)


def replace_weights(view: View, path: Path, changes: Mapping[str, Change], places: Mapping[str, Place]) -> tuple[Any, list[Bulk]]:  # fmt: skip
    """The graph of a file with other weights.

    Args:
        view: of the file.
        path: of the file.
        changes: weight → what it becomes; others stay.
        places: of `places_of`.

    Returns:
        an `onnx.ModelProto` without large constants, and all of these.
    """
    onnx = onnx_package()
    model = onnx.load(path, load_external_data=False)
    work = _Work(onnx, model, view, changes, places)
    work.expose()
    work.define()
    return model, work.bulk


class _Work:
    def __init__(self, onnx: Any, model: Any, view: View, changes: Mapping[str, Change], places: Mapping[str, Place]) -> None:  # fmt: skip
        self.onnx, self.model, self.view = onnx, model, view
        self.changes = {places[name].name: change for name, change in changes.items()}
        self.by_codes = {p.codes: p for n, p in places.items() if n in changes and p.codes}
        self.by_value = {p.value: p for n, p in places.items() if n in changes}
        self.aliases: dict[str, str] = {}
        self.turns: dict[str, Place] = {}
        self.stems: dict[str, str] = {}
        self.bulk: list[Bulk] = []
        self.taken = set(self.by_value)

    def expose(self) -> None:
        """Every weight that changes is a value of its own."""
        self._rewrite(self.model.graph, self._exposed)
        if self.aliases:
            for graph in _graphs(self.model.graph):
                for node in graph.node:
                    for i, name in enumerate(node.input):
                        node.input[i] = self.aliases.get(name, name)
        self._prune()

    def _prune(self) -> None:
        """Constants that nobody reads any more are gone; what stays and is large is read again when it is written."""
        gone = {p.codes or p.value for p in self.by_value.values()}
        graphs = list(_graphs(self.model.graph))
        read = {name for g in graphs for node in g.node for name in node.input} | {
            v.name for g in graphs for v in g.output
        }
        for graph in graphs:
            kept = [t for t in graph.initializer if t.name in read - gone]
            self._keep(graph, kept)
            apart = {b.name for b in self.bulk}
            del graph.initializer[:]
            graph.initializer.extend(t for t in kept if t.name not in apart)
            self.taken |= {t.name for t in kept} | {name for node in graph.node for name in node.output}

    def _keep(self, graph: Any, kept: list[Any]) -> None:
        """Large constants that stay are read again when they are written."""
        if graph is not self.model.graph:
            return
        for tensor in kept:
            held = self.view.model.constants[tensor.name]
            large = held.stop - held.start >= _DROPPED and not held.varints and held.dtype != "STRING"
            if large or tensor.external_data:
                self.bulk.append(
                    Bulk(tensor.name, tuple(tensor.dims), tensor.data_type, held.stop - held.start, _reader(held))
                )

    def _exposed(self, node: Any) -> list[Any]:
        make, op = self.onnx.helper.make_node, node.op_type
        place = self.by_codes.get(node.input[1] if len(node.input) > 1 and op.startswith("MatMul") else node.input[0] if node.input else "")  # fmt: skip
        if place is None:
            return [node]
        if op in ("MatMulNBits", "MatMulBnb4"):
            bias = node.input[5] if len(node.input) > 5 else ""
            output = f"{node.output[0]}_product" if bias else node.output[0]
            made = [make("MatMul", [node.input[0], place.value], [output], node.name)]
            return [*made, make("Add", [output, bias], node.output, f"{node.name}_bias")] if bias else made
        if op == "GatherBlockQuantized":
            return [make("Gather", [place.value, node.input[1]], node.output, node.name, axis=0)]
        if op == "DequantizeLinear":
            if node.output[0] != place.value:
                self.aliases[node.output[0]] = place.value
            return []
        return [node]

    def define(self) -> None:
        """Every such value is given by what its weight becomes."""
        made = []
        for value, place in self.by_value.items():
            change = self.changes[place.name]
            stem = self.stems[value] = self._stem(place.name)
            for end, (kind, shape, nbytes, give) in change.tensors.items():
                name = value if change.form == "float" else stem + end
                self.bulk.append(Bulk(name, shape, _NUMBERS[kind], nbytes, partial(_raw, give)))
            if change.form == "linear":
                inputs = [stem + end for end in (CODES, SCALE, ZERO) if end in change.tensors]
                made.append(self.onnx.helper.make_node("DequantizeLinear", inputs, [value], f"{stem}_dequantize", **change.attrs))  # fmt: skip
        if any(c.form == "blocks" for c in self.changes.values()):
            self._rewrite(self.model.graph, self._product)
            self._drop_turns(self.model.graph)
            if all(o.domain != MICROSOFT for o in self.model.opset_import):
                self.model.opset_import.append(self.onnx.helper.make_opsetid(MICROSOFT, 1))
        nodes = [*made, *self.model.graph.node]
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)

    def _product(self, node: Any) -> list[Any]:
        """A product by a weight in blocks."""
        if node.op_type == "Transpose" and self._in_blocks(node.input[0]) is not None:
            self.turns[node.output[0]] = self.by_value[node.input[0]]
            return [node]
        if node.op_type not in ("MatMul", "Gemm") or len(node.input) < 2:
            return [node]
        place = self._in_blocks(node.input[1]) or self.turns.get(node.input[1])
        if place is None:
            return [node]
        make, stem, change = self.onnx.helper.make_node, self.stems[place.value], self.changes[place.name]
        inputs = [node.input[0], stem + CODES, stem + SCALE, stem + ZERO if ZERO in change.tensors else ""]
        inputs = [*inputs, stem + INDEX] if INDEX in change.tensors else inputs if inputs[-1] else inputs[:-1]
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        output = f"{node.output[0]}_product" if bias else node.output[0]
        rows, columns = place.shape
        made = make("MatMulNBits", inputs, [output], node.name, domain=MICROSOFT, K=columns, N=rows, **change.attrs)
        made.metadata_props.extend(node.metadata_props)
        return [made, make("Add", [output, bias], node.output, f"{node.name}_bias")] if bias else [made]

    def _in_blocks(self, value: str) -> Place | None:
        place = self.by_value.get(value)
        return place if place is not None and self.changes[place.name].form == "blocks" else None

    def _drop_turns(self, graph: Any) -> None:
        """Transposes that nobody reads any more."""
        read = {name for g in _graphs(graph) for node in g.node for name in node.input}
        for g in _graphs(graph):
            kept = [
                n for n in g.node if n.op_type != "Transpose" or n.output[0] not in self.turns or n.output[0] in read
            ]
            del g.node[:]
            g.node.extend(kept)

    def _stem(self, name: str) -> str:
        """A name whose parts nobody has."""
        stem, number = name, 2
        while any(stem + end in self.taken for end in (CODES, SCALE, ZERO, INDEX)):
            stem, number = f"{name}_{number}", number + 1
        self.taken |= {stem + end for end in (CODES, SCALE, ZERO, INDEX)}
        return stem

    def _rewrite(self, graph: Any, change: Callable[[Any], list[Any]]) -> None:
        nodes = []
        for node in graph.node:
            for attribute in node.attribute:
                for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    self._rewrite(inner, change)
            nodes += change(node)
        del graph.node[:]
        graph.node.extend(nodes)


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and all inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _reader(held: Constant) -> Callable[[], bytes]:
    def read() -> bytes:
        with held.path.open("rb") as file:
            file.seek(held.start)
            return file.read(held.stop - held.start)

    return read


def _raw(give: Callable[[], torch.Tensor]) -> bytes:
    return bytes(as_memory(give().contiguous()))


def kind_of(name: str, tensor_type: torch.dtype) -> str:
    """The element type of a part: that of codes of less than a byte is their format's."""
    return name.upper() if name.upper() in NARROW else DTYPE_NAMES[tensor_type]
