"""What the metadata of torchao's safetensors files says of a tensor: its class and what that keeps beside its numbers.

Owns: `Note`, its text both ways. Classes are of three kinds: `Int8Tensor` (int8, float32 scales), `IntxUnpackedToInt8Tensor` (codes of 1 to 8 bits,
each in a byte) and `Float8Tensor`.

Source: torchao 0.18, `prototype/safetensors` and `quantization/quantize_/workflows`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from arrondi.checkpoint.containers.json_file import parse_json
from arrondi.checkpoint.layouts.claims import Claims
from arrondi.errors import FileFormatError
from arrondi.formats import FORMATS, ActivationScheme, PerTensor, PerToken, Scheme

INT8: Final = "Int8Tensor"
INTX: Final = "IntxUnpackedToInt8Tensor"
FLOAT8: Final = "Float8Tensor"
PLAIN: Final = "Tensor"
DATA: Final = {
    INT8: ("zero_point", "qdata", "scale"),
    INTX: ("qdata", "scale", "zero_point"),
    FLOAT8: ("qdata", "scale"),
}
"""Class → its tensors, in the order of the package."""
_FLOATS: Final = ("float32", "bfloat16", "float16")
_F8: Final = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}
_BY_TOKEN: Final = ActivationScheme(Scheme(FORMATS["int8"], PerToken(), "integer"))
_AUTO: Final = {"_type": "KernelPreference", "_data": "AUTO"}


@dataclass(frozen=True)
class Note:
    """The note of one quantized tensor.

    Attributes:
        kind: the name of its class.
        block: numbers that share a scale, rows and columns.
        dtype: the type in which the package restores it.
        inputs: how inputs are rounded where they are multiplied; None: they are not.
        target: of `IntxUnpackedToInt8Tensor`, its format; else "".
        parts: the names of its tensors.
    """

    kind: str
    block: tuple[int, int]
    dtype: str
    inputs: ActivationScheme | None = None
    target: str = ""
    parts: tuple[str, ...] = ()

    def text(self) -> str:
        """As the package writes it."""
        data: dict[str, Any]
        if self.kind == INT8:
            data = {"act_quant_kwargs": _of_int8(self.inputs), "reduce_range": False, "block_size": list(self.block)}
        elif self.kind == INTX:
            data = {"target_dtype": _dtype(self.target), "block_size": list(self.block)}
        else:
            data = {"block_size": list(self.block), "mm_config": None, "act_quant_kwargs": _of_float8(self.inputs), "kernel_preference": _AUTO}  # fmt: skip
        data["dtype"] = _dtype(self.dtype)
        if self.kind == INTX:
            data["activation_quantization"] = None if self.inputs is None else "int8_asym_per_token"
        return json.dumps({"_type": self.kind, "_data": data, "_tensor_data_names": list(self.parts)})


def read_note(name: str, text: str) -> Note | None:
    """The note of a tensor; None: it is an ordinary one.

    Args:
        name: of the tensor.
        text: JSON.

    Raises:
        FileFormatError: it is no JSON object, or says what is not known here.
    """
    where = f"the metadata of {name}"
    try:
        claims = Claims(parse_json(text), where)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{where} is no JSON ({error}).") from error
    kind = claims.text("_type")
    if kind == PLAIN:
        claims.done()
        return None
    if kind not in DATA:
        raise FileFormatError(
            f"{name} is a {kind[:60]} of torchao, a class that is not read here. Give the original model."
        )
    parts, data = tuple(claims.words("_tensor_data_names")), Claims(claims.table("_data"), where)
    claims.done()
    strange = [part for part in parts if part not in DATA[kind]]
    missing = [part for part in DATA[kind] if part not in parts and part != "zero_point"]
    if strange or missing or len(set(parts)) != len(parts) or (kind == INTX and "zero_point" not in parts):
        raise FileFormatError(
            f"{where} names the parts {', '.join(parts)[:60]}, of which a {kind} that is read here has {', '.join(DATA[kind])}."
        )
    block = data.numbers("block_size")
    if len(block) != 2 or not all(0 < n < 2**31 for n in block):
        raise FileFormatError(f"{where}: block_size should be two sizes, found {block}.")
    dtype, target, inputs = _dtype_of(data, "dtype", where, _FLOATS), "", None
    if kind == INTX:
        target = _dtype_of(data, "target_dtype", where, [f"int{b}" for b in range(2, 9)])
        asked = data.word("activation_quantization", "none", ["none", "int8_asym_per_token"])
        inputs = None if asked == "none" else _BY_TOKEN
    else:
        inputs = (_int8_of if kind == INT8 else _float8_of)(
            data.table("act_quant_kwargs"), f"{where}: act_quant_kwargs"
        )
        if kind == INT8:
            data.only("reduce_range", False)
        else:
            data.remarks(["mm_config", "kernel_preference"])  # how a runtime multiplies
    data.done()
    return Note(kind, (block[0], block[1]), dtype, inputs, target, parts)


def _dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


def _dtype_of(claims: Claims, key: str, where: str, allowed: Any) -> str:
    typed = Claims(claims.table(key), f"{where}: {key}")
    typed.word("_type", None, ["torch.dtype"])
    found = typed.word("_data", None, allowed)
    typed.done()
    return found


def _granularity(claims: Claims, where: str) -> PerToken | PerTensor:
    typed = Claims(claims.table("granularity"), f"{where}.granularity")
    kind = typed.word("_type", None, ["perrow", "pertensor"])
    inner = Claims(typed.table("_data"), f"{where}.granularity")
    typed.done()
    inner.only("dim", -1, *([] if kind == "perrow" else [None]))
    inner.done()
    return PerToken() if kind == "perrow" else PerTensor()


def _granularity_text(inputs: ActivationScheme) -> dict[str, Any]:
    by_token = isinstance(inputs.scheme.granularity, PerToken)
    return {"_type": "PerRow", "_data": {"dim": -1}} if by_token else {"_type": "PerTensor", "_data": {}}


def _inner(value: dict[str, Any], kind: str, where: str) -> Claims:
    typed = Claims(value, where)
    typed.word("_type", None, [kind.lower()])
    inner = Claims(typed.table("_data"), where)
    typed.done()
    return inner


def _int8_of(value: dict[str, Any], where: str) -> ActivationScheme | None:
    if not value:
        return None
    claims = _inner(value, "QuantizeTensorToInt8Kwargs", where)
    granularity = _granularity(claims, where)
    mapping = Claims(claims.table("mapping_type"), f"{where}.mapping_type")
    mapping.word("_type", None, ["mappingtype"])
    symmetric = mapping.word("_data", None, ["symmetric", "asymmetric"]) == "symmetric"
    mapping.done()
    claims.only("reduce_range", False)
    claims.done()
    return ActivationScheme(Scheme(FORMATS["int8"], granularity, "none" if symmetric else "integer"))


def _of_int8(inputs: ActivationScheme | None) -> dict[str, Any] | None:
    if inputs is None:
        return None
    mapping = {"_type": "MappingType", "_data": "SYMMETRIC" if inputs.scheme.symmetric else "ASYMMETRIC"}
    data = {"granularity": _granularity_text(inputs), "mapping_type": mapping, "reduce_range": False}
    return {"_type": "QuantizeTensorToInt8Kwargs", "_data": data}


def _float8_of(value: dict[str, Any], where: str) -> ActivationScheme | None:
    if not value:
        return None
    claims = _inner(value, "QuantizeTensorToFloat8Kwargs", where)
    format = _dtype_of(claims, "float8_dtype", where, _F8)
    granularity = _granularity(claims, where)
    for key in ("hp_value_lb", "hp_value_ub"):
        claims.only(key)
    claims.remarks(["mm_config", "kernel_preference"])
    claims.done()
    return ActivationScheme(Scheme(FORMATS[_F8[format]], granularity))


def _of_float8(inputs: ActivationScheme | None) -> dict[str, Any] | None:
    if inputs is None:
        return None
    format = next(word for word, name in _F8.items() if name == inputs.scheme.format.name)
    data = {
        "float8_dtype": _dtype(format), "granularity": _granularity_text(inputs), "mm_config": None, "hp_value_lb": None, "hp_value_ub": None,
        "kernel_preference": _AUTO,
    }  # fmt: skip
    return {"_type": "QuantizeTensorToFloat8Kwargs", "_data": data}
