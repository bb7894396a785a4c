"""The compressed-tensors layout: QTensors ↔ the named tensors and the `quantization_config` that its readers expect.

Owns: `LAYOUT`. Read by transformers (with the compressed-tensors package), vLLM and SGLang. Per weight `P.weight`:

    pack-quantized          P.weight_packed int32, codes + 2^(b-1) as one little-endian bit stream a row;
                            P.weight_scale; P.weight_shape int64; P.weight_zero_point int32, packed along the outputs
    int-quantized           P.weight int8; P.weight_scale; P.weight_zero_point int8
    float-quantized         P.weight float8_e4m3; P.weight_scale
    nvfp4-pack-quantized    P.weight_packed uint8, first code in the low nibble; P.weight_scale float8_e4m3 for 16 codes;
                            P.weight_global_scale float32, the *reciprocal* of our tensor scale
    mxfp4-pack-quantized    P.weight_packed uint8; P.weight_scale uint8, the exponent + 127, for 32 codes
    mxfp8-quantized         P.weight float8_e4m3; P.weight_scale uint8

Source: the package itself, version 0.20. Its packing of 3, 5, 6 and 7 bits changed in 0.18 under the same name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from arrondi.checkpoint.layout import Layout, Placed
from arrondi.checkpoint.writer import TensorSpec
from arrondi.encoding import code_dtype
from arrondi.errors import FileFormatError
from arrondi.fitting import STORED
from arrondi.formats import (
    FORMATS,
    Granularity,
    LayerScheme,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Scheme,
    integer,
    scale_shape,
)
from arrondi.packing import pack, packed_width, unpack
from arrondi.qtensor import QTensor
from arrondi.storage import load_scale, signed, store_scale, unsigned

_F8 = torch.float8_e4m3fn
_WORD = 4
"""Bytes of the words that integer codes are packed into."""


@dataclass(frozen=True)
class _Storage:
    """How one of the package's formats stores a weight: tensors by suffix, both ways."""

    specs: Callable[[tuple[int, ...], Scheme], dict[str, tuple[torch.dtype, tuple[int, ...]]]]
    write: Callable[[QTensor], dict[str, torch.Tensor]]
    read: Callable[[Mapping[str, torch.Tensor], Scheme], QTensor]


def _scale_spec(shape: tuple[int, ...], scheme: Scheme) -> tuple[torch.dtype, tuple[int, ...]]:
    if scheme.scale == "e8m0":
        return torch.uint8, scale_shape(scheme.granularity, shape)
    wanted = scale_shape(scheme.granularity, shape)
    return STORED[str(scheme.scale)], (1,) if isinstance(scheme.granularity, PerTensor) else wanted


def _write_scale(q: QTensor) -> torch.Tensor:
    scale = store_scale(q.real_scale, str(q.scheme.scale))
    return scale.reshape(1) if isinstance(q.scheme.granularity, PerTensor) else scale


def _read_scale(stored: torch.Tensor, shape: tuple[int, ...], scheme: Scheme) -> torch.Tensor:
    return load_scale(stored).reshape(scale_shape(scheme.granularity, shape))


def _packed_specs(shape: tuple[int, ...], scheme: Scheme) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    rows, columns = shape
    bits = scheme.format.bits
    specs = {
        "weight_packed": (torch.int32, (rows, packed_width(columns, bits, _WORD) // _WORD)),
        "weight_scale": _scale_spec(shape, scheme),
        "weight_shape": (torch.int64, (2,)),
    }
    if scheme.zero_point == "integer":
        groups = scale_shape(scheme.granularity, shape)[1]
        specs["weight_zero_point"] = (torch.int32, (packed_width(rows, bits, _WORD) // _WORD, groups))
    return specs


def _packed_write(q: QTensor) -> dict[str, torch.Tensor]:
    bits = q.scheme.format.bits
    tensors = {
        "weight_packed": pack(unsigned(q.codes, q.scheme.format), bits, word_bytes=_WORD).view(torch.int32),
        "weight_scale": _write_scale(q),
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if q.zero_point is not None:
        zero = (q.zero_point - q.scheme.format.qmin).to(torch.uint8)
        tensors["weight_zero_point"] = (
            pack(zero.T.contiguous(), bits, word_bytes=_WORD).view(torch.int32).T.contiguous()
        )
    return tensors


def _packed_read(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    shape = tuple(tensors["weight_shape"].tolist())
    bits = scheme.format.bits
    codes = signed(unpack(tensors["weight_packed"].view(torch.uint8), bits, shape[1]), scheme.format)
    zero = None
    if scheme.zero_point == "integer":
        stored = tensors["weight_zero_point"].T.contiguous().view(torch.uint8)
        zero = unpack(stored, bits, shape[0]).T.int() + scheme.format.qmin
    return QTensor(codes, _read_scale(tensors["weight_scale"], shape, scheme), zero, None, scheme)


def _plain_specs(shape: tuple[int, ...], scheme: Scheme) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    specs = {
        "weight": (torch.int8 if scheme.format.kind == "integer" else _F8, shape),
        "weight_scale": _scale_spec(shape, scheme),
    }
    if scheme.zero_point == "integer":
        specs["weight_zero_point"] = (torch.int8, specs["weight_scale"][1])
    return specs


def _plain_write(q: QTensor) -> dict[str, torch.Tensor]:
    tensors = {
        "weight": q.codes if q.scheme.format.kind == "integer" else q.codes.view(_F8),
        "weight_scale": _write_scale(q),
    }
    if q.zero_point is not None:
        tensors["weight_zero_point"] = q.zero_point.to(torch.int8).reshape(tensors["weight_scale"].shape)
    return tensors


def _plain_read(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    stored = tensors["weight"]
    shape = tuple(stored.shape)
    zero = None
    if scheme.zero_point == "integer":
        zero = tensors["weight_zero_point"].int().reshape(scale_shape(scheme.granularity, shape))
    return QTensor(
        stored.view(code_dtype(scheme.format)), _read_scale(tensors["weight_scale"], shape, scheme), zero, None, scheme
    )


def _mxfp4_specs(shape: tuple[int, ...], scheme: Scheme) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {
        "weight_packed": (torch.uint8, (shape[0], packed_width(shape[1], 4))),
        "weight_scale": _scale_spec(shape, scheme),
    }


def _mxfp4_write(q: QTensor) -> dict[str, torch.Tensor]:
    return {"weight_packed": pack(q.codes, 4), "weight_scale": _write_scale(q)}


def _mxfp4_read(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    shape = (tensors["weight_packed"].shape[0], tensors["weight_packed"].shape[1] * 2)
    codes = unpack(tensors["weight_packed"], 4, shape[1])
    return QTensor(codes, _read_scale(tensors["weight_scale"], shape, scheme), None, None, scheme)


def _nvfp4_specs(shape: tuple[int, ...], scheme: Scheme) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {
        "weight_packed": (torch.uint8, (shape[0], packed_width(shape[1], 4))),
        "weight_scale": (_F8, scale_shape(scheme.granularity, shape)),
        "weight_global_scale": (torch.float32, (1,)),
    }


def _nvfp4_write(q: QTensor) -> dict[str, torch.Tensor]:
    assert isinstance(q.scale, QTensor)
    return {
        "weight_packed": pack(q.codes, 4),
        "weight_scale": q.scale.codes.view(_F8),
        "weight_global_scale": 1 / q.scale.real_scale.reshape(1),
    }


def _nvfp4_read(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    assert isinstance(scheme.scale, Scheme)
    columns = tensors["weight_packed"].shape[1] * 2
    inner = QTensor(
        tensors["weight_scale"].view(torch.uint8),
        (1 / tensors["weight_global_scale"]).reshape(1, 1),
        None,
        None,
        scheme.scale,
    )
    return QTensor(unpack(tensors["weight_packed"], 4, columns), inner, None, None, scheme)


_PLAIN = _Storage(_plain_specs, _plain_write, _plain_read)
_STORAGE: Final[Mapping[str, _Storage]] = {
    "pack-quantized": _Storage(_packed_specs, _packed_write, _packed_read),
    "int-quantized": _PLAIN,
    "float-quantized": _PLAIN,
    "mxfp8-quantized": _PLAIN,
    "mxfp4-pack-quantized": _Storage(_mxfp4_specs, _mxfp4_write, _mxfp4_read),
    "nvfp4-pack-quantized": _Storage(_nvfp4_specs, _nvfp4_write, _nvfp4_read),
}


def _format_of(scheme: LayerScheme) -> str | None:
    """The package's format that stores this scheme, if there is one."""
    weights = scheme.weights
    if isinstance(weights.scale, Scheme):
        nested = weights.format == FORMATS["fp4_e2m1"] and weights.granularity == PerGroup(16)
        inner = Scheme(FORMATS["fp8_e4m3"], PerTensor())
        return "nvfp4-pack-quantized" if nested and weights.scale == inner and scheme.activations is None else None
    if weights.scale == "e8m0":
        if weights.granularity != PerGroup(32):
            return None
        return {"fp4_e2m1": "mxfp4-pack-quantized", "fp8_e4m3": "mxfp8-quantized"}.get(weights.format.name)
    if weights.format.name == "fp8_e4m3":
        return "float-quantized"
    if weights.format == integer(weights.format.bits) if 2 <= weights.format.bits <= 8 else False:
        return "pack-quantized" if scheme.activations is None else "int-quantized"
    return None


def _refuse(scheme: LayerScheme, name: str, shape: tuple[int, ...]) -> str | None:
    weights = scheme.weights
    if _format_of(scheme) is None:
        return f"compressed-tensors has no format for {scheme}"
    if weights.zero_point == "float":
        return "compressed-tensors stores integer zero points only"
    if len(shape) != 2:
        return f"compressed-tensors stores matrices, and this is a stack of shape {shape}"
    if not name.endswith(".weight"):
        return "compressed-tensors stores parameters named weight only"
    if not isinstance(weights.granularity, PerTensor | PerGroup | PerBlock) and weights.granularity != PerChannel():
        return f"compressed-tensors has no granularity {weights.granularity}"
    if not weights.symmetric and not isinstance(weights.granularity, PerGroup | PerChannel):
        return "compressed-tensors stores zero points of groups and channels only"
    activations = scheme.activations
    if activations is not None:
        known = isinstance(activations.granularity, PerTensor | PerToken | PerGroup)
        if not known or _back(activations, scheme.dynamic) != activations:
            return f"compressed-tensors cannot say that activations become {activations}"
    return None


def _back(scheme: Scheme, dynamic: bool) -> Scheme | None:
    """A scheme as it is read again from the config, None if it is not."""
    try:
        return _parse_args(_args(scheme, dynamic))
    except FileFormatError:
        return None


def _specs(placed: Placed) -> list[TensorSpec]:
    storage = _STORAGE[str(_format_of(placed.scheme))]
    prefix = placed.name.removesuffix("weight")
    return [
        (prefix + suffix, dtype, shape)
        for suffix, (dtype, shape) in storage.specs(placed.shape, placed.scheme.weights).items()
    ]


def _write(placed: Placed, q: QTensor) -> dict[str, torch.Tensor]:
    prefix = placed.name.removesuffix("weight")
    return {prefix + suffix: tensor for suffix, tensor in _STORAGE[str(_format_of(placed.scheme))].write(q).items()}


def _read(placed: Placed, read: Callable[[str], torch.Tensor]) -> QTensor:
    prefix = placed.name.removesuffix("weight")
    storage = _STORAGE[str(_format_of(placed.scheme))]
    suffixes = storage.specs(placed.shape, placed.scheme.weights)
    return storage.read({suffix: read(prefix + suffix) for suffix in suffixes}, placed.scheme.weights)


def _args(scheme: Scheme, dynamic: bool) -> dict[str, Any]:
    """One side of a config group: the fields of the package's QuantizationArgs."""
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
    return args


def _config(placed: list[Placed], kept: list[str], classes: Mapping[str, str]) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    schemes = list(dict.fromkeys(p.scheme for p in placed))
    modules = {scheme: [p.name.removesuffix(".weight") for p in placed if p.scheme == scheme] for scheme in schemes}
    found = sorted({classes[m] for names in modules.values() for m in names if m in classes} or {"Linear"})
    groups = {}
    for i, scheme in enumerate(schemes):
        groups[f"group_{i}"] = {
            # Fused experts are linears in a checkpoint though not in the model, hence the class name when all is uniform.
            "targets": sorted({"Linear", *found} if found != ["Conv1D"] else found)
            if len(schemes) == 1
            else [_target(m) for m in modules[scheme]],
            "weights": _args(scheme.weights, False),
            "input_activations": None if scheme.activations is None else _args(scheme.activations, scheme.dynamic),
            "output_activations": None,
            "format": _format_of(scheme),
        }
    formats = {g["format"] for g in groups.values()}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": kept,
        "kv_cache_scheme": None,
        "version": "0.20.0",
    }
    if _must_dequantize(placed, classes) and _one_scheme_each(placed):
        config["dequantize"] = True
    return config


# ── what transformers 5.23 does with it ───────────────────────────────────────────────────────────────────────────────


def _is_expert(module: str) -> bool:
    """One of many experts, which transformers fuses into one parameter; it knows them by this word."""
    return "experts" in module.split(".")


def _target(module: str) -> str:
    """The selector of a module. transformers looks for the scheme of the experts among the patterns."""
    return f"re:{re.escape(module)}$" if _is_expert(module) else module


def _must_dequantize(placed: list[Placed], classes: Mapping[str, str]) -> bool:
    """Whether transformers loads these weights only with `dequantize`, which turns them back while they are loaded.

    Left packed, it knows neither zero points nor modules other than nn.Linear, and makes bfloat16 of FP4 and MX weights
    whatever the model's type is. `dequantize` drops the rounding of activations, so schemes that have it go without.
    """
    for p in placed:
        format = _format_of(p.scheme)
        if classes.get(p.name.removesuffix(".weight")) == "Conv1D":
            return True
        if format == "pack-quantized" and not p.scheme.weights.symmetric:
            return True
        if format in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized") and not p.scheme.activations:
            return True
    return False


def _one_scheme_each(placed: list[Placed]) -> bool:
    """Whether the experts have one scheme and all else has one: with `dequantize`, transformers reads no others."""
    kinds = {(_is_expert(p.name), p.scheme) for p in placed}
    return len({expert for expert, _ in kinds}) == len(kinds)


def _reads_experts(scheme: LayerScheme) -> bool:
    """Whether transformers decodes fused experts of this scheme to the right numbers."""
    weights, format = scheme.weights, _format_of(scheme)
    if format == "float-quantized":
        return isinstance(weights.granularity, PerChannel | PerTensor)
    return format == "mxfp4-pack-quantized" or (format == "pack-quantized" and weights.symmetric)


def _notes(placed: list[Placed], classes: Mapping[str, str]) -> list[str]:
    """What transformers is known to read otherwise than it is meant. `arrondi.load` reads all of it."""
    notes = []
    unread = {str(p.scheme) for p in placed if _is_expert(p.name) and not _reads_experts(p.scheme)}
    notes += [f"transformers 5.23 cannot read experts stored as {s}; arrondi can." for s in sorted(unread)]
    if len({p.scheme for p in placed if _is_expert(p.name)}) > 1:
        notes.append(
            "transformers 5.23 reads all experts by one scheme, and these have several; arrondi reads each by its own."
        )
    if _must_dequantize(placed, classes) and not _one_scheme_each(placed):
        notes.append("transformers 5.23 cannot read this mix of schemes; arrondi can.")
    activations = [p for p in placed if p.scheme.activations is not None]
    if any(classes.get(p.name.removesuffix(".weight")) == "Conv1D" for p in activations):
        notes.append("transformers leaves the inputs of Conv1D layers unrounded; arrondi rounds them.")
    if any(p.scheme.weights.scale == "e8m0" for p in activations):
        notes.append(
            "transformers runs MX schemes with rounded activations in bfloat16 only: load with dtype=bfloat16."
        )
    return notes


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _parse_scheme(group: Mapping[str, Any]) -> LayerScheme:
    weights = _parse_args(group["weights"])
    activations = group.get("input_activations")
    return LayerScheme(
        weights,
        None if activations is None else _parse_args(activations),
        bool((activations or {}).get("dynamic", True)),
    )


def _parse_args(args: Mapping[str, Any]) -> Scheme:
    bits, kind, strategy = args["num_bits"], args["type"], args["strategy"]
    format = integer(bits) if kind == "int" else {4: FORMATS["fp4_e2m1"], 8: FORMATS["fp8_e4m3"]}.get(bits)
    if format is None:
        raise FileFormatError(f"compressed-tensors config: {bits}-bit {kind} is not known here.")
    found: dict[str, Callable[[], Granularity]] = {
        "tensor": PerTensor,
        "channel": PerChannel,
        "token": PerToken,
        "group": lambda: PerGroup(args["group_size"]),
        "tensor_group": lambda: PerGroup(args["group_size"]),
        "block": lambda: PerBlock(*args["block_structure"]),
    }
    if strategy not in found:
        raise FileFormatError(f"compressed-tensors config: strategy {strategy!r} is not known here.")
    scheme = Scheme(format, found[strategy](), "none" if args.get("symmetric", True) else "integer")
    if strategy == "tensor_group":
        return Scheme(format, scheme.granularity, scale=Scheme(FORMATS["fp8_e4m3"], PerTensor()))
    if args.get("scale_dtype") in ("torch.uint8", "uint8"):
        return Scheme(format, scheme.granularity, scale="e8m0")
    return scheme


def _find(
    config: Mapping[str, Any], names: Mapping[str, tuple[str, tuple[int, ...]]], read: Callable[[str], torch.Tensor]
) -> list[Placed]:
    """Every quantized weight of a checkpoint, found by its `weight_scale`.

    Raises:
        FileFormatError: a config that cannot be read, or codes packed by an old version in another order.
    """
    try:
        groups = [(list(g["targets"]), _parse_scheme(g)) for g in config["config_groups"].values()]
    except (KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(
            f"quantization_config of compressed-tensors cannot be read: {type(error).__name__} {error}."
        ) from error
    version = tuple(int(n) for n in re.findall(r"\d+", str(config.get("version", "0.18")))[:2])
    old = [s.weights.format.bits for _, s in groups if s.weights.format.bits in (3, 5, 6, 7)]
    if old and version < (0, 18):
        raise FileFormatError(
            f"This checkpoint holds {old[0]}-bit codes of compressed-tensors {config['version']}, whose packing changed in 0.18. Quantize it again."
        )
    placed = []
    for scale_name in (n for n in names if n.endswith(".weight_scale")):
        prefix = scale_name.removesuffix("weight_scale")
        scheme = _match(groups, prefix[:-1])
        dtype, _ = names[scale_name]
        storage = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(dtype)
        scheme = scheme.with_scale(storage) if storage else scheme  # type: ignore[arg-type]
        placed.append(Placed(prefix + "weight", _shape(prefix, scheme, names, read), scheme))
    return placed


def _match(groups: list[tuple[list[str], LayerScheme]], module: str) -> LayerScheme:
    """The group that names this module, else the first that names a class."""
    for targets, scheme in groups:
        if any(t == module or (t.startswith("re:") and re.match(t[3:], module)) for t in targets):
            return scheme
    for targets, scheme in groups:
        if any("." not in t and not t.startswith("re:") for t in targets):
            return scheme
    raise FileFormatError(
        f"quantization_config of compressed-tensors has no group for module {module!r}, which is stored quantized."
    )


def _shape(
    prefix: str,
    scheme: LayerScheme,
    names: Mapping[str, tuple[str, tuple[int, ...]]],
    read: Callable[[str], torch.Tensor],
) -> tuple[int, ...]:
    if prefix + "weight_shape" in names:
        return tuple(int(n) for n in read(prefix + "weight_shape"))
    if prefix + "weight" in names:
        return names[prefix + "weight"][1]
    if prefix + "weight_packed" in names:
        rows, width = names[prefix + "weight_packed"][1]
        return rows, width * 8 // scheme.weights.format.bits
    raise FileFormatError(f"{prefix}weight has a scale but no codes. Is a shard missing?")


LAYOUT: Final = Layout(
    "compressed-tensors", "transformers, vLLM, SGLang, arrondi", _refuse, _specs, _write, _read, _config, _find, _notes
)  # fmt: skip
