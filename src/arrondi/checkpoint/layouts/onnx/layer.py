"""A quantized layer as the tensors of a graph's weight, and the config that says how they lie.

Owns: the functions of the layouts `onnx` and `onnx-qdq`, which differ in what they write: the first has the form `blocks` where MatMulNBits can hold a
layer, the second has standard operators alone (DequantizeLinear). Both, and `tflite`, read all forms. A file of a graph gives the same view of itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from arrondi.checkpoint.containers.graph_weights import CODES, INDEX, SCALE, ZERO
from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.checks import checked
from arrondi.checkpoint.layouts.claims import Claims
from arrondi.checkpoint.layouts.layout import LayerValues, ModelFacts, Names, Placed, Reader
from arrondi.checkpoint.layouts.onnx import blocks, linear
from arrondi.errors import FileFormatError
from arrondi.formats import LayerScheme, Scheme

FORMS: Final = ("linear", "blocks", "bnb4")
LINEAR, TURNED, BLOCKS, BNB4 = "linear", "turned", "blocks", "bnb4"
"""Words of `Placed.storage`: the forms, the first of them also with a matrix (in, out)."""
_SCALES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NEEDED: Final = {
    "linear": linear.TYPES,
    "blocks": ("int2", "int4", "int8", "uint2", "uint4", "uint8"),
    "bnb4": ("nf4", "fp4_bnb"),
}
_LARGEST: Final = 2**31


def refuse(placed: Placed, standard: bool = False) -> str | None:
    """Why a layer cannot be stored, as the end of a sentence; None if it can."""
    scheme = placed.scheme
    if any(part is not None for part in (scheme.inputs, scheme.outputs, scheme.kv)):
        return "a weight of a graph does not say how inputs, outputs or caches are rounded"
    if scheme.weights.format.kind != "integer":
        return f"graphs are written with integer codes, not {scheme.weights.format}"
    if placed.transposed is not (placed.kind == "Conv1D"):
        return f"a {placed.kind} whose plain weight is {placed.shape} is not stored as an operator of a graph reads it"
    return None if not standard and blocks.refuse(placed) is None else linear.refuse(placed)


def specs(placed: Placed, standard: bool = False) -> list[TensorSpec]:
    """The tensors that a layer becomes."""
    form = form_of(placed, standard)
    if form in (BLOCKS, BNB4):
        return (blocks.specs if form == BLOCKS else blocks.flat_specs)(placed)
    return linear.specs(placed, form == TURNED)


def write(placed: Placed, values: LayerValues, standard: bool = False) -> dict[str, Any]:
    """Those tensors with their numbers."""
    form = form_of(placed, standard)
    return blocks.write(placed, values.weight) if form == BLOCKS else linear.write(placed, values.weight, form == TURNED)  # fmt: skip


def read(placed: Placed, reader: Reader, standard: bool = False) -> LayerValues:
    """The layer that they hold.

    Raises:
        FileFormatError: a scale or a code that cannot be.
    """
    form = form_of(placed, standard)
    if form in (BLOCKS, BNB4):
        q = (blocks.read if form == BLOCKS else blocks.flat_read)(placed, reader)
    else:
        q = linear.read(placed, reader, form == TURNED)
    return LayerValues(checked(placed.name, q))


def form_of(placed: Placed, standard: bool = False) -> str:
    """How the codes of a layer lie."""
    if placed.storage:
        return placed.storage
    if not standard and blocks.refuse(placed) is None:
        return BLOCKS
    return TURNED if placed.kind in ("Linear", "Conv1D") and len(placed.shape) == 2 else LINEAR


def config(
    placed: list[Placed], kept: list[str], facts: ModelFacts = ModelFacts(), standard: bool = False
) -> dict[str, Any]:
    """What config.json says of these layers."""
    return {
        "quant_method": "onnx-qdq" if standard else "onnx",
        "version": 1,
        "ignore": list(dict.fromkeys(kept)),
        "weights": {p.name: _facts(p, standard) for p in placed},
    }


def find(config: Mapping[str, Any], names: Names, reader: Reader, standard: bool = False) -> list[Placed]:
    """What is quantized in a directory, or in the view of a file.

    Raises:
        FileFormatError: a key, a form or a type that is not known, or a tensor that is not there.
    """
    claims = Claims(config["quantization_config"], "quantization_config")
    claims.word("quant_method", None, ("onnx", "onnx-qdq", "tflite"))
    claims.number("version", None, (1,))
    claims.words("ignore")
    weights = claims.table("weights")
    claims.done()
    return [_place(str(name), facts, names, standard) for name, facts in weights.items()]


def _facts(p: Placed, standard: bool) -> dict[str, Any]:
    form = form_of(p, standard)
    said: dict[str, Any] = {"form": LINEAR if form == TURNED else form, "shape": list(p.shape)}
    said |= blocks.facts(p) if form == BLOCKS else linear.facts(p, form == TURNED)
    said |= {"kind": p.kind} if p.kind != "Linear" else {}
    return said | ({"module": p.module} if p.module else {})


def _place(name: str, facts: object, names: Names, standard: bool) -> Placed:
    claims = Claims(facts, f"weights.{name}")
    form = claims.word("form", None, FORMS)
    type_ = claims.word("type", None, _NEEDED[form])
    shape = tuple(claims.numbers("shape"))
    rank = len(shape)
    grid = linear.Grid(claims.number("axis", -1, range(-1, max(rank, 1))), claims.number("block", 0))
    kind, module = claims.text("kind", "Linear"), claims.text("module", "")
    turned = claims.flag("transposed", False)
    claims.done()
    if rank < 2 or any(not 0 < n < _LARGEST for n in shape) or ((turned or form != LINEAR) and rank != 2):
        raise FileFormatError(f"{name} has the shape {list(shape)}, which no weight of the form {form} has.")
    scale, zero = names.get(name + SCALE, ("", ()))[0], names.get(name + ZERO, ("", ()))[0]
    if scale not in _SCALES or (name + CODES) not in names:
        raise FileFormatError(
            f"{name} should be stored as {name + CODES} and {name + SCALE}, found {scale or 'nothing'}."
        )
    indexed = name + INDEX in names
    if (form != LINEAR and turned) or (form != BLOCKS and indexed) or (form == BNB4 and zero):
        raise FileFormatError(f"{name}: the form {form} has no such orientation, zero points or index of groups.")
    scheme = LayerScheme(_scheme(name, form, type_, grid, turned, shape, scale, zero))
    storage, flipped = TURNED if turned else form, kind == "Conv1D" and rank == 2
    placed = Placed(name, shape, scheme, module, kind, flipped, indexed, storage)
    if form == LINEAR and (why := linear.refuse(placed)) is not None:
        raise FileFormatError(f"{name}: {why}.")
    return placed if form_of(replace(placed, storage=""), standard) != placed.storage else replace(placed, storage="")


def _scheme(
    name: str, form: str, type_: str, grid: linear.Grid, turned: bool, shape: tuple[int, ...], scale: str, zero: str
) -> Scheme:
    if form == LINEAR:
        if grid.block and (grid.axis == -1 or len(shape) != 2):
            raise FileFormatError(f"{name} has blocks and no axis of a matrix along which they lie.")
        if zero and not type_.startswith(("int", "uint")):
            raise FileFormatError(f"{name} has floats as codes, and zero points.")
        along = linear.Grid(None if grid.axis == -1 else grid.axis, grid.block)
        return linear.scheme_of(type_, along, turned, len(shape), _SCALES[scale], bool(zero))
    if not 0 < grid.block < _LARGEST or grid.axis != -1:
        raise FileFormatError(f"{name} has blocks of {grid.block} numbers.")
    if form == BNB4:
        return blocks.flat_scheme(type_, grid.block, shape, _SCALES[scale])
    bits = int(type_[-1])
    if not zero and type_.startswith("u"):
        raise FileFormatError(f"{name} has unsigned codes in blocks and no zero points.")
    if grid.block * bits % 8:
        raise FileFormatError(f"{name} has blocks of {grid.block} codes of {bits} bits, which fill no bytes.")
    return blocks.scheme_of(
        type_, grid.block, _SCALES[scale], "none" if not zero else "integer" if zero == "U8" else "float"
    )
