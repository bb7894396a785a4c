"""The tensors of a file by the layer that they belong to.

Owns: `groups_of` (the paths whose tensors only quantization stores), `check_beside` (nothing is left over, next to a quantized weight
or elsewhere), `shape_of`, `linear` and `placed_under`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Final

from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.layout import Names, Placed
from arrondi.errors import FileFormatError
from arrondi.formats import LayerScheme, Scheme
from arrondi.formats.scheme import ScaleType

FLOATS: Final[Mapping[str, ScaleType]] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PLAIN: Final = frozenset({"F64", "F32", "BF16", "F16"})
_CACHE: Final = frozenset({"k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "kv_scale"})
_NARROW: Final = frozenset({"I8", "U8", "I32", "I16"})


def groups_of(names: Names, leaves: Collection[str], needed: Collection[str]) -> list[str]:
    """Paths P with a stored `P.leaf` that only quantization gives, in the order of the file.

    Args:
        names: every stored tensor.
        leaves: last words of names that only quantization gives.
        needed: those that every quantized layer has.

    Raises:
        FileFormatError: one of `needed` is missing.
    """
    paths = dict.fromkeys(n.rpartition(".")[0] for n in names if n.rpartition(".")[2] in leaves)
    for path in paths:
        missing = next((leaf for leaf in needed if f"{path}.{leaf}" not in names), None)
        if missing is not None:
            have = next(n for n in names if n.rpartition(".")[0] == path and n.rpartition(".")[2] in leaves)
            raise FileFormatError(f"{path}.{missing} is missing, though {have} is stored.")
    return list(paths)


def shape_of(names: Names, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a stored tensor that has so many axes, none of them empty.

    Raises:
        FileFormatError: it is missing, or has another number of axes.
    """
    if name not in names:
        raise FileFormatError(f"{name} is missing.")
    shape = names[name][1]
    if len(shape) != axes or not all(0 < n < 2**31 for n in shape):
        raise FileFormatError(f"{name} should have {axes} axes, found the shape {shape}.")
    return shape


def linear(path: str, shape: tuple[int, ...], scheme: LayerScheme, turned: bool, storage: str = "") -> Placed:
    """A linear layer of this shape, (out, in); `turned`: its plain weight is (in, out), of a Conv1D."""
    plain, kind = (shape[::-1], "Conv1D") if turned else (shape, "Linear")
    return Placed(f"{path}.weight", plain, scheme, kind=kind, transposed=turned, storage=storage)


def placed_under(path: str, shape: tuple[int, int], scheme: Scheme, names: Names, turned: bool = False) -> Placed:
    """A linear layer of this shape, (out, in), whose `P.scales` have the type that is stored.

    Args:
        turned: the plain weight is (in, out), of a Conv1D.

    Raises:
        FileFormatError: they are no floating-point numbers.
    """
    dtype = names[f"{path}.scales"][0]
    if dtype not in FLOATS:
        raise FileFormatError(f"{path}.scales should hold floating-point numbers, found {dtype}.")
    return linear(path, shape, LayerScheme(replace(scheme, scale=FLOATS[dtype])), turned)


def check_beside(
    placed: Iterable[Placed], specs: Iterable[TensorSpec], names: Names, taken: Collection[str] = ()
) -> None:
    """Refuse what nothing consumes: a tensor next to a quantized weight, a bias of another length, codes without a scale.

    Args:
        placed: the quantized layers.
        specs: the tensors that they are made of.
        names: every stored tensor.
        taken: others that are accounted for.
    """
    layers = {p.name.removesuffix(".weight"): p for p in placed}
    consumed = {name for name, _, _ in specs} | set(taken)
    for name, (dtype, shape) in names.items():
        if name in consumed:
            continue
        prefix, _, leaf = name.rpartition(".")
        if leaf in _CACHE:
            raise FileFormatError(f"{name} is the scale of a rounded key/value cache, which is not read here.")
        owner = _owner(name, layers)
        if owner is None:
            if dtype.startswith("F8_") or (leaf == "weight" and dtype not in _PLAIN and dtype in _NARROW):
                raise FileFormatError(f"{name} is stored as {dtype} without a scale. Is a tensor missing, or misnamed?")
        elif prefix != owner or leaf != "bias":
            raise FileFormatError(f"{name} is stored beside a quantized weight, and nothing here says what it is.")
        elif shape != (layers[owner].matrix_shape[0],) or dtype not in _PLAIN:
            raise FileFormatError(
                f"{name} is {dtype} {shape}, but the weight has {layers[owner].matrix_shape[0]} outputs."
            )


def _owner(name: str, layers: Collection[str]) -> str | None:
    """The quantized layer below which a name lies."""
    parts = name.split(".")
    return next((path for i in range(len(parts) - 1, 0, -1) if (path := ".".join(parts[:i])) in layers), None)
