"""A quantized layer as rows of ggml's blocks, and the config that says of which type they are.

Owns: the functions of the layout `gguf`. A tensor keeps its name and becomes uint8 (…, out, bytes of a row). `types` in the
`quantization_config` has the type of every such tensor, alone or in an object with the module that calls it, its kind and whether its plain
form is transposed, where these are not the usual ones. A GGUF file gives the same view of itself, in which the type of an entry is its ggml
type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.checks import checked
from arrondi.checkpoint.layouts.claims import check_described, check_ignored
from arrondi.checkpoint.layouts.ggml.blocks import BLOCKS, BlockType, type_of
from arrondi.checkpoint.layouts.ggml.coding import block_type, decode_blocks, encode_blocks
from arrondi.checkpoint.layouts.layout import LayerValues, ModelFacts, Names, Placed, Reader
from arrondi.errors import FileFormatError
from arrondi.formats import LayerScheme

_KEYS: Final = frozenset({"quant_method", "version", "ignore", "types"})
_FACTS: Final[Mapping[str, type]] = {"type": str, "module": str, "kind": str, "transposed": bool}
_MATRICES: Final = ("Linear", "Embedding", "Conv1D")


def refuse(placed: Placed) -> str | None:
    """Why blocks cannot hold a layer, as the end of a sentence; None if they can."""
    scheme = placed.scheme
    if any(part is not None for part in (scheme.inputs, scheme.outputs, scheme.kv)):
        return "a GGUF file does not say how inputs, outputs or caches are rounded"
    if type_of(scheme.weights) is None:
        known = ", ".join(t.name for t in BLOCKS.values() if t.written and t.scheme is not None)
        return f"no type of GGUF files is {scheme.weights}; they hold {known}"
    if placed.kind not in _MATRICES:
        return f"a GGUF file holds no kernels of a {placed.kind} in blocks"
    if placed.indexed:
        return "a GGUF file has no index of groups (order=dynamic)"
    kind, columns = _kind(placed), placed.matrix_shape[1]
    if columns % kind.elements:
        return f"rows of {kind.name} are blocks of {kind.elements}, which do not divide {columns} inputs"
    return None


def specs(placed: Placed) -> list[TensorSpec]:
    """The one tensor that a layer becomes."""
    kind, (_, columns) = _kind(placed), placed.matrix_shape
    *lead, inner, last = placed.shape
    rows = last if placed.transposed else inner
    return [(placed.name, torch.uint8, (*lead, rows, columns // kind.elements * kind.size))]


def write(placed: Placed, values: LayerValues) -> dict[str, torch.Tensor]:
    """The blocks of a layer."""
    ((name, _, shape),) = specs(placed)
    return {name: encode_blocks(values.weight, _kind(placed), name).reshape(shape)}


def read(placed: Placed, reader: Reader) -> LayerValues:
    """The layer that blocks hold.

    Raises:
        FileFormatError: a scale or a code in them that cannot be.
    """
    raw = reader(placed.name)
    q = decode_blocks(raw.reshape(-1, raw.shape[-1]), _kind(placed), placed.name)
    return LayerValues(checked(placed.name, q))


def config(placed: list[Placed], kept: list[str], facts: ModelFacts = ModelFacts()) -> dict[str, Any]:
    """What config.json says of these layers."""
    return {
        "quant_method": "gguf",
        "version": 1,
        "ignore": list(dict.fromkeys(kept)),
        "types": {p.name: _facts(p) for p in placed},
    }


def find(config: Mapping[str, Any], names: Names, reader: Reader) -> list[Placed]:
    """What is quantized in a directory, or in the view of a GGUF file.

    Raises:
        FileFormatError: a key, a type or a tensor that is not known, or a tensor that is no blocks of its type.
    """
    described = config["quantization_config"]
    if type(described.get("version")) is not int or described["version"] != 1:
        raise FileFormatError(
            f"these blocks are described in version {described.get('version')!r} of the layout gguf; this release reads 1. Update arrondi."
        )
    if strange := sorted(str(key) for key in described.keys() - _KEYS):
        raise FileFormatError(f"quantization_config has the key {strange[0]!r}, which is not known here.")
    types = described.get("types")
    if not isinstance(types, Mapping):
        raise FileFormatError(f"types should be an object, found {type(types).__name__}.")
    check_ignored(described.get("ignore", []))
    stray = next(
        (n for n, (kind, _) in names.items() if n not in types and (kind in BLOCKS or _looks_packed(n, kind))), None
    )
    if stray is not None:
        raise FileFormatError(f"{stray} is stored as {names[stray][0]} and has no type in the config.")
    return [_place(str(name), facts, names) for name, facts in types.items()]


def _looks_packed(name: str, kind: str) -> bool:
    return kind == "U8" and name.endswith("weight")


def _kind(placed: Placed) -> BlockType:
    """The type of a layer that is not refused."""
    kind = block_type(placed.storage) if placed.storage else type_of(placed.scheme.weights)
    assert kind is not None
    return kind


def _facts(p: Placed) -> str | dict[str, Any]:
    facts: dict[str, Any] = {"type": _kind(p).name}
    if p.module:
        facts["module"] = p.module
    if p.kind != "Linear":
        facts["kind"] = p.kind
    if p.transposed:
        facts["transposed"] = True
    return facts if len(facts) > 1 else str(facts["type"])


def _place(name: str, facts: object, names: Names) -> Placed:
    facts = {"type": facts} if isinstance(facts, str) else facts
    if not isinstance(facts, Mapping) or "type" not in facts:
        raise FileFormatError(f"{name} should be described by a type or an object that has one, found {facts!r}.")
    check_described(name, facts, _FACTS)
    kind = block_type(facts["type"])
    if kind.scheme is None:
        raise FileFormatError(
            f"{name} is of the type {kind.name}, whose values are not on a grid that is known here. It can be read as plain numbers only."
        )
    if name not in names:
        raise FileFormatError(f"{name} has a type, and is not stored.")
    stored, shape = names[name]
    if stored not in ("U8", kind.name) or len(shape) < 2 or 0 in shape or shape[-1] % kind.size:
        raise FileFormatError(
            f"{name} should be rows of {kind.name}, blocks of {kind.size} bytes, found {stored} {tuple(shape)}."
        )
    columns, transposed = shape[-1] // kind.size * kind.elements, facts.get("transposed", False)
    plain = (*shape[:-2], columns, shape[-2]) if transposed else (*shape[:-1], columns)
    storage = "" if type_of(kind.scheme) is kind else kind.name
    return Placed(
        name,
        plain,
        LayerScheme(kind.scheme),
        facts.get("module", ""),
        facts.get("kind", "Linear"),
        transposed,
        storage=storage,
    )
