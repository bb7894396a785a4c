"""The `quantization_config` of the compressed-tensors layout, both ways, and what transformers is known to do with it.

Owns: which of the package's formats stores a scheme (`format_of`), the config that is written (`config`), the notes for people
(`notes_of`), and the quantized weights that a config and the stored names describe (`find`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from arrondi.checkpoint.layouts.layout import Placed
from arrondi.errors import FileFormatError
from arrondi.formats import (
    FORMATS,
    ActivationScheme,
    Dynamic,
    Granularity,
    LayerScheme,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Scheme,
    integer,
)


def format_of(scheme: LayerScheme) -> str | None:
    """The package's format that stores this scheme, if there is one."""
    weights = scheme.weights
    if isinstance(weights.scale, Scheme):
        nested = weights.format == FORMATS["fp4_e2m1"] and weights.granularity == PerGroup(16)
        inner = Scheme(FORMATS["fp8_e4m3"], PerTensor())
        return "nvfp4-pack-quantized" if nested and weights.scale == inner and scheme.inputs is None else None
    if weights.scale == "e8m0":
        if weights.granularity != PerGroup(32):
            return None
        return {"fp4_e2m1": "mxfp4-pack-quantized", "fp8_e4m3": "mxfp8-quantized"}.get(weights.format.name)
    if weights.format.name == "fp8_e4m3":
        return "float-quantized"
    if weights.format in (FORMATS[f"int{bits}"] for bits in range(2, 9)):
        return "pack-quantized" if scheme.inputs is None else "int-quantized"
    return None


def args_of(scheme: Scheme, dynamic: Dynamic) -> dict[str, Any]:
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


def config(placed: list[Placed], kept: list[str], classes: Mapping[str, str], whole: bool = False) -> dict[str, Any]:
    """The `quantization_config` of config.json. `whole`: the model's class can be built only around whole weights."""
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
            "weights": args_of(scheme.weights, False),
            "input_activations": None
            if scheme.inputs is None
            else args_of(scheme.inputs.scheme, scheme.inputs.dynamic),
            "output_activations": None,
            "format": format_of(scheme),
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
    if (whole or _must_dequantize(placed, classes)) and _one_scheme_each(placed):
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
        format = format_of(p.scheme)
        if classes.get(p.name.removesuffix(".weight")) == "Conv1D":
            return True
        if format == "pack-quantized" and not p.scheme.weights.symmetric:
            return True
        if format in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized") and not p.scheme.inputs:
            return True
    return False


def _one_scheme_each(placed: list[Placed]) -> bool:
    """Whether the experts have one scheme and all else has one: with `dequantize`, transformers reads no others."""
    kinds = {(_is_expert(p.name), p.scheme) for p in placed}
    return len({expert for expert, _ in kinds}) == len(kinds)


def _reads_experts(scheme: LayerScheme) -> bool:
    """Whether transformers decodes fused experts of this scheme to the right numbers."""
    weights, format = scheme.weights, format_of(scheme)
    if format == "float-quantized":
        return isinstance(weights.granularity, PerChannel | PerTensor)
    return format == "mxfp4-pack-quantized" or (format == "pack-quantized" and weights.symmetric)


def notes_of(placed: list[Placed], classes: Mapping[str, str], whole: bool = False) -> list[str]:
    """What transformers is known to read otherwise than it is meant. `arrondi.load` reads all of it."""
    notes = []
    unread = {str(p.scheme) for p in placed if _is_expert(p.name) and not _reads_experts(p.scheme)}
    notes += [f"transformers 5.23 cannot read experts stored as {s}; arrondi can." for s in sorted(unread)]
    if len({p.scheme for p in placed if _is_expert(p.name)}) > 1:
        notes.append(
            "transformers 5.23 reads all experts by one scheme, and these have several; arrondi reads each by its own."
        )
    if (whole or _must_dequantize(placed, classes)) and not _one_scheme_each(placed):
        notes.append("transformers 5.23 cannot read this mix of schemes; arrondi can.")
    activations = [p for p in placed if p.scheme.inputs is not None]
    if any(classes.get(p.name.removesuffix(".weight")) == "Conv1D" for p in activations):
        notes.append("transformers leaves the inputs of Conv1D layers unrounded; arrondi rounds them.")
    elif whole and activations:
        notes.append("transformers 5.23 leaves the inputs of this model's layers unrounded; arrondi rounds them.")
    elif any(p.scheme.weights.scale == "e8m0" for p in activations):
        notes.append(
            "transformers runs MX schemes with rounded activations in bfloat16 only: load with dtype=bfloat16."
        )
    return notes


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _parse_scheme(group: Mapping[str, Any]) -> LayerScheme:
    weights = parse_args(group["weights"])
    activations = group.get("input_activations")
    if activations is None:
        return LayerScheme(weights)
    return LayerScheme(weights, ActivationScheme(parse_args(activations), activations.get("dynamic", True)))


def parse_args(args: Mapping[str, Any]) -> Scheme:
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


def find(
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
