"""A `quantization_config`, read strictly: every key is consumed or refused.

Owns: `read_config`, which gives the schemes by target, the ignores, and nothing that was not checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from arrondi.checkpoint.layouts.compressed_tensors.args import Args, read_args
from arrondi.checkpoint.layouts.compressed_tensors.storage import STORAGE, inferred_format
from arrondi.errors import FileFormatError
from arrondi.formats import ActivationScheme, LayerScheme, PerBlock, PerChannel, Scheme

_KEYS: Final = frozenset({
    "quant_method", "format", "quantization_status", "config_groups", "ignore", "kv_cache_scheme", "version", "global_compression_ratio",
    "sparsity_config", "transform_config", "moe_sparsity_config", "dequantize", "run_compressed", "use_optimized_inference",
    "arrondi",
})  # fmt: skip
_GROUP_KEYS: Final = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
_MIXED: Final = "mixed-precision"
_POWERS: Final = frozenset({"mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"})


@dataclass(frozen=True)
class Group:
    """What one config group says of its modules.

    Attributes:
        scheme: of the layer; plain scales are "float32" until the files say their type.
        format: the package's word for the storage.
        indexed: a group index is stored.
    """

    scheme: LayerScheme
    format: str
    indexed: bool


@dataclass(frozen=True)
class Config:
    """A checked config.

    Attributes:
        groups: target → group.
        ignore: modules that are left alone.
        modules: stored name → module path, where the two differ (written by arrondi).
        transposed: stored names of weights that are (in, out) (written by arrondi).
        version: of the package.
    """

    groups: Mapping[str, Group]
    ignore: list[str]
    modules: Mapping[str, str]
    transposed: list[str]
    version: str


def read_config(config: Mapping[str, Any]) -> Config:
    """Check a `quantization_config` and give what it says.

    Raises:
        FileFormatError: a key that is not known, or a value that cannot be.
    """
    unknown = sorted(str(k) for k in config.keys() - _KEYS)
    if unknown:
        raise FileFormatError(f"quantization_config has the key {unknown[0]!r}, which is not known here.")
    status = config.get("quantization_status")
    if status not in ("compressed", "frozen"):
        raise FileFormatError(
            f"quantization_status should be 'compressed', found {status!r}. The weights are not packed."
        )
    _check_left_out(config)
    for key in ("dequantize", "run_compressed", "use_optimized_inference"):
        if not isinstance(config.get(key, False), bool):
            raise FileFormatError(f"{key} should be true or false, found {config[key]!r}.")
    if config.get("format", "") is None:
        raise FileFormatError("format is null, which compressed-tensors refuses. Name it, or leave the key out.")
    version = config.get("version", "0.18")
    if not isinstance(version, str) or not re.match(r"\d{1,6}\.\d{1,6}(?!\d)", version):
        raise FileFormatError(f"version should be a version of compressed-tensors, found {str(version)[:60]!r}.")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise FileFormatError(f"config_groups should be an object with a group, found {type(groups).__name__}.")
    found: dict[str, Group] = {}
    for name, group in groups.items():
        found |= _read_group(group, f"config_groups.{name}", config.get("format"))
    ignore = config.get("ignore")
    return Config(found, _words([] if ignore is None else ignore, "ignore"), *_own(config), version)


def _read_group(group: object, where: str, top_format: object) -> dict[str, Group]:
    if not isinstance(group, Mapping):
        raise FileFormatError(
            f"{where} should be an object, found {type(group).__name__}. Presets by name are not read here."
        )
    unknown = sorted(str(k) for k in group.keys() - _GROUP_KEYS)
    if unknown:
        raise FileFormatError(f"{where} has the key {unknown[0]!r}, which is not known here.")
    targets = _words(group.get("targets"), f"{where}.targets")
    if group.get("weights") is None:
        raise FileFormatError(f"{where} rounds no weights, and activations alone are not read here.")
    named = _format(group.get("format"), top_format, where)
    weights = read_args(group["weights"], f"{where}.weights", named in _POWERS)
    if weights.dynamic is not False:
        raise FileFormatError(f"{where}.weights: stored weights cannot have dynamic scales.")
    if weights.strategy == "token":
        raise FileFormatError(f"{where}.weights: strategy 'token' is for activations.")
    inputs, outputs = (
        _read_side(group.get(f"{s}_activations"), f"{where}.{s}_activations") for s in ("input", "output")
    )
    scheme = LayerScheme(weights.scheme, inputs, outputs)
    format = named or inferred_format(scheme)
    if format is None or not STORAGE[format].takes(scheme.weights):
        raise FileFormatError(f"{where}: format {format!r} does not store {scheme.weights}.")
    if weights.indexed and format != "pack-quantized":
        raise FileFormatError(f"{where}: actorder 'group' is known for format 'pack-quantized' only, got {format!r}.")
    return dict.fromkeys(targets, Group(scheme, format, weights.indexed))


def _format(own: object, top: object, where: str) -> str | None:
    """The group's own format, else the file's, None if neither names one."""
    for value, place in ((own, f"{where}.format"), (top, "format")):
        mixed = value == _MIXED and place == "format"
        if value is not None and not mixed and (not isinstance(value, str) or value not in STORAGE):
            raise FileFormatError(f"{place} {value!r} is not read here. Known: {', '.join(STORAGE)}.")
    if own is not None and top not in (None, _MIXED, own):
        raise FileFormatError(f"{where}.format {own!r} contradicts the file's format {top!r}.")
    chosen = own if own is not None else None if top == _MIXED else top
    return None if chosen is None else str(chosen)


def _read_side(args: object, where: str) -> ActivationScheme | None:
    if args is None:
        return None
    found = read_args(args, where)
    scheme, dynamic = found.scheme, found.dynamic
    if found.indexed or (isinstance(args, Mapping) and args.get("actorder") not in (None, False)):
        raise FileFormatError(f"{where}: activations have no actorder.")
    if isinstance(scheme.granularity, PerChannel | PerBlock):
        raise FileFormatError(f"{where}: strategy {found.strategy!r} is for weights.")
    if isinstance(scheme.scale, Scheme) != (dynamic == "local"):
        raise FileFormatError(f"{where}: strategy {found.strategy!r} with dynamic {dynamic!r} is not known here.")
    if dynamic is False and found.strategy != "tensor":
        raise FileFormatError(f"{where}: static scales are known for strategy 'tensor' only, got {found.strategy!r}.")
    if isinstance(args, Mapping):
        _check_dynamic_types(args, found, where)
    return ActivationScheme(scheme, dynamic)


def _check_dynamic_types(args: Mapping[str, Any], found: Args, where: str) -> None:
    """Refuse types in which the package would round scales and zero points that are found at run time, and nothing here does."""
    scale, zero = args.get("scale_dtype"), args.get("zp_dtype")
    if found.dynamic is True and scale in ("torch.bfloat16", "torch.float16"):
        raise FileFormatError(f"{where}: dynamic scales in {scale} are not computed here. Give the original model.")
    if found.dynamic is True and not found.scheme.symmetric and zero not in (None, "torch.int8"):
        raise FileFormatError(f"{where}: dynamic zero points in {zero} are not computed here. Give the original model.")


def _check_left_out(config: Mapping[str, Any]) -> None:
    """What the package knows and this program does not: it may only be there to say that it is not used."""
    if config.get("kv_cache_scheme") is not None:
        raise FileFormatError("kv_cache_scheme is set: a rounded key/value cache is not read here.")
    sparsity = config.get("sparsity_config")
    if sparsity not in (None, {}) and not (isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"):
        raise FileFormatError("sparsity_config is set: sparse weights are not read here.")
    transform = config.get("transform_config")
    if transform not in (None, {}, {"config_groups": {}}):
        raise FileFormatError("transform_config is set: rotated weights are not read here.")
    if config.get("moe_sparsity_config") is not None:
        raise FileFormatError("moe_sparsity_config is set: pruned experts are not read here.")
    ratio = config.get("global_compression_ratio")
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float)):
        raise FileFormatError(f"global_compression_ratio should be a number, found {ratio!r}.")


def _own(config: Mapping[str, Any]) -> tuple[Mapping[str, str], list[str]]:
    """What arrondi itself added: module paths by stored name, and the stored names of transposed weights."""
    own = config.get("arrondi", {})
    if not isinstance(own, Mapping) or own.keys() - {"module_names", "transposed"}:
        raise FileFormatError("the key 'arrondi' of quantization_config is of a later release. Update arrondi.")
    names = own.get("module_names", {})
    if not isinstance(names, Mapping) or not all(isinstance(v, str) and v for v in names.values()):
        raise FileFormatError("module_names should map stored names to module paths.")
    return names, _words(own.get("transposed", []), "transposed")


def _words(value: object, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise FileFormatError(f"{where} should be a list of words, found {type(value).__name__}.")
    for word in value:
        if word.startswith("re:"):
            try:
                re.compile(word[3:])
            except (re.error, RecursionError, OverflowError) as error:
                raise FileFormatError(f"{where}: {word!r} is no pattern (error: {error}).") from error
    return value
