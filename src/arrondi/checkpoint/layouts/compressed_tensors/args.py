"""One side of a config group: the package's `QuantizationArgs` ↔ our schemes.

Owns: `args_of` (what is written) and `read_args` (what is read). Reading refuses what the package refuses, what it would
have to guess, and every key that neither of us knows.

Source: compressed_tensors/quantization/quant_args.py of version 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from arrondi.errors import FileFormatError
from arrondi.formats import (
    FORMATS,
    Dynamic,
    Format,
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Scheme,
    integer,
)

NESTED: Final = Scheme(FORMATS["fp8_e4m3"], PerTensor())
"""How NVFP4 keeps its scales: fp8 under one float32."""

_FLOATS: Final = {4: FORMATS["fp4_e2m1"], 6: FORMATS["fp6_e2m3"], 8: FORMATS["fp8_e4m3"]}
_KEYS: Final = frozenset({
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype", "zp_dtype",
    "observer", "observer_kwargs",
})  # fmt: skip
_FLOAT_TYPES: Final = frozenset({"torch.float32", "torch.bfloat16", "torch.float16"})
_TYPES: Final = frozenset(
    {*_FLOAT_TYPES, "torch.float8_e4m3fn", "torch.uint8", "torch.int8", "torch.int16", "torch.int32"}
)


@dataclass(frozen=True)
class Args:
    """What one side of a group says.

    Attributes:
        scheme: format, granularity and zero point; its scale is "float32" where the files decide the type.
        dynamic: whether scales follow the data; False for weights.
        indexed: the groups of columns are given by a stored index (`actorder` "group").
        strategy: the package's word, for its own rules.
    """

    scheme: Scheme
    dynamic: Dynamic
    indexed: bool
    strategy: str


def args_of(scheme: Scheme, dynamic: Dynamic, indexed: bool = False) -> dict[str, Any]:
    """The fields that say a scheme, without those that follow from others."""
    args: dict[str, Any] = {
        "num_bits": scheme.format.bits,
        "type": "int" if scheme.format.kind == "integer" else "float",
        "symmetric": scheme.symmetric,
        "dynamic": dynamic,
    }
    match scheme.granularity:
        case PerTensor():
            args["strategy"] = "tensor"
        case PerChannel():
            args["strategy"] = "channel"
        case PerToken():
            args["strategy"] = "token"
        case PerGroup(size):
            args |= {"strategy": "tensor_group" if isinstance(scheme.scale, Scheme) else "group", "group_size": size}
        case PerBlock(rows, columns):
            args |= {"strategy": "block", "block_structure": [rows, columns]}
    if isinstance(scheme.scale, Scheme):
        args |= {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
    elif scheme.scale == "e8m0":
        args |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    if indexed:
        args["actorder"] = "group"
    return args


def read_args(args: object, where: str, powers: bool = False) -> Args:
    """One side of a config group.

    Args:
        args: the JSON value.
        where: its place in the config, for messages.
        powers: the format of the group keeps scales as powers of two, whatever `scale_dtype` leaves unsaid.

    Raises:
        FileFormatError: an unknown key, a value of the wrong kind, or a combination that the package does not have.
    """
    if not isinstance(args, Mapping):
        raise _wrong(where, args, "an object")
    unknown = sorted(str(k) for k in args.keys() - _KEYS)
    if unknown:
        raise FileFormatError(
            f"{where} has the key {unknown[0]!r}, which is not known here. Remove it, or update arrondi."
        )
    dynamic = args.get("dynamic", False)
    if dynamic not in (True, False, "local") or (isinstance(dynamic, int) and not isinstance(dynamic, bool)):
        raise _wrong(f"{where}.dynamic", dynamic, "true, false or 'local'")
    symmetric = args.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise _wrong(f"{where}.symmetric", symmetric, "true or false")
    format = _format(args, where)
    strategy, granularity = _granularity(args, where)
    if not symmetric and format.kind != "integer":
        raise FileFormatError(f"{where}: {format} has no zero point, but symmetric is false.")
    _check_words(args, where)
    scale = args.get("scale_dtype")
    nested = strategy == "tensor_group"
    if nested and (format != _FLOATS[4] or granularity != PerGroup(16) or scale not in (None, "torch.float8_e4m3fn")):
        raise FileFormatError(f"{where}: tensor_group is known for NVFP4 only (4-bit float, groups of 16, fp8 scales).")
    powers = powers or scale == "torch.uint8"
    if powers and (format.kind != "float" or granularity != PerGroup(32) or scale not in (None, "torch.uint8")):
        raise FileFormatError(
            f"{where}: scales that are powers of two go with MX formats only (floats in groups of 32)."
        )
    if scale == "torch.float8_e4m3fn" and not nested:
        raise FileFormatError(f"{where}: fp8 scales go with strategy 'tensor_group' only, got {strategy!r}.")
    scheme = Scheme(
        format,
        granularity,
        "none" if symmetric else "integer",
        scale=NESTED if nested else "e8m0" if powers else "float32",
    )
    return Args(scheme, dynamic, _indexed(args, where, strategy), strategy)


def _format(args: Mapping[str, Any], where: str) -> Format:
    bits, kind = args.get("num_bits", 8), args.get("type", "int")
    if type(bits) is not int:
        raise _wrong(f"{where}.num_bits", bits, "a whole number")
    if kind not in ("int", "float"):
        raise _wrong(f"{where}.type", kind, "'int' or 'float'")
    if kind == "int" and 2 <= bits <= 8:
        return integer(bits)
    if kind == "float" and bits in _FLOATS:
        return _FLOATS[bits]
    raise FileFormatError(f"{where}: {bits}-bit {kind} is not known here.")


def _granularity(args: Mapping[str, Any], where: str) -> tuple[str, Granularity]:
    """The strategy, inferred as the package does where it is not said, and what it means."""
    strategy, size, block = args.get("strategy"), args.get("group_size"), args.get("block_structure")
    if size is not None and (type(size) is not int or size == 0 or size < -1):
        raise _wrong(f"{where}.group_size", size, "a whole number from 1, or -1")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy not in ("tensor", "channel", "token", "group", "tensor_group", "block"):
        raise FileFormatError(f"{where}: strategy {strategy!r} is not known here.")
    if strategy in ("group", "tensor_group"):
        if size is None or size < 1:
            raise _wrong(f"{where}.group_size", size, "a whole number from 1")
    elif size is not None and size > 0:
        raise FileFormatError(f"{where}: group_size {size} contradicts strategy {strategy!r}.")
    if (strategy == "block") != (block is not None):
        raise FileFormatError(f"{where}: block_structure {block!r} contradicts strategy {strategy!r}.")
    if strategy == "block":
        said = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", block) if isinstance(block, str) else None
        sizes = block if said is None else [int(n) for n in said.groups()]
        if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
            raise _wrong(f"{where}.block_structure", block, "two whole numbers from 1")
        return strategy, PerBlock(*sizes)
    if strategy in ("group", "tensor_group"):
        return strategy, PerGroup(int(size or 0))
    simple: dict[str, Granularity] = {"tensor": PerTensor(), "channel": PerChannel(), "token": PerToken()}
    return strategy, simple[strategy]


def _check_words(args: Mapping[str, Any], where: str) -> None:
    """Keys that say how the numbers were found, or repeat what the files say: they may only be what they can be."""
    for key in ("scale_dtype", "zp_dtype"):
        value = args.get(key)
        if value is not None and (not isinstance(value, str) or value not in _TYPES):
            raise _wrong(f"{where}.{key}", value, "a type such as 'torch.uint8'")
    if args.get("scale_dtype") not in (None, *_FLOAT_TYPES, "torch.uint8", "torch.float8_e4m3fn"):
        raise _wrong(f"{where}.scale_dtype", args["scale_dtype"], "a type of scales")
    observer, options = args.get("observer"), args.get("observer_kwargs")
    if observer is not None and not isinstance(observer, str):
        raise _wrong(f"{where}.observer", observer, "a word")
    if options is not None and not isinstance(options, Mapping):
        raise _wrong(f"{where}.observer_kwargs", options, "an object")


def _indexed(args: Mapping[str, Any], where: str, strategy: str) -> bool:
    order = args.get("actorder")
    if order is None or order is False or order in ("weight", "static"):
        return False
    if order in ("group", "dynamic") or order is True:
        if strategy != "group":
            raise FileFormatError(f"{where}: actorder {order!r} needs strategy 'group', got {strategy!r}.")
        return True
    raise _wrong(f"{where}.actorder", order, "'group', 'weight' or null")


def _wrong(where: str, value: object, wanted: str) -> FileFormatError:
    text = repr(value)
    return FileFormatError(f"{where} should be {wanted}, found {text if len(text) <= 60 else text[:57] + '...'}.")
