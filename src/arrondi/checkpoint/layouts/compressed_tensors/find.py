"""The quantized layers that a config and the stored names describe.

Owns: `find`. A layer is found by the tensors that only quantization stores; the config says what they mean. A layer without a
group, a group's layer that is stored plain, and a tensor beside a layer that nothing consumes are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from arrondi.checkpoint.layouts.classes import module_classes
from arrondi.checkpoint.layouts.compressed_tensors.layer import specs
from arrondi.checkpoint.layouts.compressed_tensors.matching import is_ignored, match, names_match
from arrondi.checkpoint.layouts.compressed_tensors.reading import Config, Group, read_config
from arrondi.checkpoint.layouts.compressed_tensors.storage import format_of
from arrondi.checkpoint.layouts.compressed_tensors.transposed import original_form
from arrondi.checkpoint.layouts.layout import Names, Placed, Reader
from arrondi.errors import FileFormatError
from arrondi.formats import ActivationScheme, PerGroup
from arrondi.formats.scheme import ScaleType

_STORED_ONLY: Final = re.compile(
    r"(weight_(packed|scale|zero_point|global_scale|shape|g_idx)|(input|output)_(scale|zero_point|global_scale))$"
)
"""Last word of a tensor's name that only quantization gives."""
_SUSPICIOUS: Final = re.compile(
    r"weight|(weight|input|output|q|k|v|kv|prob)_.*|.*(scale|scales|scale_inv|zero_point|zeros|g_idx|perm)$"
)
_CACHE: Final = frozenset({"k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "kv_scale"})
_PLAIN: Final = frozenset({"F64", "F32", "BF16", "F16"})
_FLOATS: Final[Mapping[str, ScaleType]] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def find(config: Mapping[str, Any], names: Names, read: Reader) -> list[Placed]:
    """Every quantized layer of a checkpoint.

    Args:
        config: config.json.
        names: every stored tensor.
        read: gives a stored tensor; only `weight_shape` is read.

    Raises:
        FileFormatError: the config and the files contradict each other, or say what is not known here.
    """
    known = read_config(config["quantization_config"])
    prefixes = dict.fromkeys(n.rpartition(".")[0] for n in names if _STORED_ONLY.fullmatch(n.rpartition(".")[2]))
    paths = {prefix: known.modules.get(prefix, prefix) for prefix in prefixes}
    unused = sorted({*known.modules, *known.transposed} - set(prefixes))
    if unused:
        raise FileFormatError(f"{unused[0]!r} should be stored quantized, and is not.")
    classes = _classes(config, known, paths, names)
    placed = []
    for prefix, path in paths.items():
        group = match(path, classes.get(path, ()), known.groups)
        if group is None:
            raise FileFormatError(f"there is no group for module {path!r}, which is stored quantized.")
        if is_ignored(path, classes.get(path, ()), known.ignore):
            raise FileFormatError(f"module {path!r} is in ignore, but it is stored quantized.")
        found = _place(prefix, path, group, names, read, known.version)
        placed.append(original_form(found) if prefix in known.transposed else found)
        _check_groups(placed[-1])
    _check_plain(known, names, set(prefixes))
    _check_neighbours(placed, names)
    return placed


def _place(prefix: str, path: str, group: Group, names: Names, read: Reader, version: str) -> Placed:
    scheme = group.scheme
    bits = scheme.weights.format.bits
    if group.format == "pack-quantized" and bits in (3, 5, 6, 7) and _numbers(version) < (0, 18):
        raise FileFormatError(
            f"this checkpoint holds {bits}-bit codes of compressed-tensors {version}, whose packing changed in 0.18. Quantize it again."
        )
    stored = _FLOATS.get(names.get(f"{prefix}.weight_scale", ("", ()))[0])
    if stored is not None and scheme.weights.scale == "float32":
        scheme = scheme.with_scale(stored)
    scheme = replace(
        scheme,
        inputs=_with_stored_scale(scheme.inputs, f"{prefix}.input_scale", names),
        outputs=_with_stored_scale(scheme.outputs, f"{prefix}.output_scale", names),
    )
    shape = _shape(prefix, group, names, read)
    return Placed(
        f"{prefix}.weight",
        shape,
        scheme,
        module="" if path == prefix else path,
        indexed=group.indexed,
        storage="" if group.format == format_of(scheme) else group.format,
    )


def _check_groups(placed: Placed) -> None:
    """Refuse groups, of columns or of the inputs that they multiply, that do not divide the weight."""
    width, inputs = placed.matrix_shape[1], placed.scheme.inputs
    for one in (placed.scheme.weights, *([inputs.scheme] if inputs else [])):
        if isinstance(one.granularity, PerGroup) and width % one.granularity.size:
            raise FileFormatError(
                f"{placed.name} has {width} columns, which groups of {one.granularity.size} do not divide."
            )


def _with_stored_scale(side: ActivationScheme | None, name: str, names: Names) -> ActivationScheme | None:
    stored = _FLOATS.get(names.get(name, ("", ()))[0])
    if side is None or side.dynamic is not False or stored is None:
        return side
    return replace(side, scheme=replace(side.scheme, scale=stored))


def _shape(prefix: str, group: Group, names: Names, read: Reader) -> tuple[int, ...]:
    if group.format == "pack-quantized":
        return _packed_shape(prefix, names, read)
    name = f"{prefix}.weight_packed" if "pack" in group.format else f"{prefix}.weight"
    if name not in names:
        raise FileFormatError(f"{name} is missing, though {prefix} has scales of format {group.format!r}.")
    shape = names[name][1]
    if len(shape) != 2:
        raise FileFormatError(f"{name} has the shape {shape}, but quantized weights are matrices.")
    if "pack" not in group.format:
        return shape
    return shape[0], shape[1] * 8 // group.scheme.weights.format.bits


def _packed_shape(prefix: str, names: Names, read: Reader) -> tuple[int, ...]:
    name = f"{prefix}.weight_shape"
    if name not in names or f"{prefix}.weight_packed" not in names:
        missing = name if name not in names else f"{prefix}.weight_packed"
        raise FileFormatError(f"{missing} is missing, though {prefix} is stored in format 'pack-quantized'.")
    dtype, size = names[name]
    if size != (2,) or dtype not in ("I64", "I32"):
        raise FileFormatError(f"{name} should be two whole numbers, found {dtype} {size}.")
    shape = tuple(int(n) for n in read(name))
    if not all(0 < n < 2**31 for n in shape):
        raise FileFormatError(f"{name} says {list(shape)}, which is no shape of a weight.")
    return shape


def _classes(config: Mapping[str, Any], known: Config, paths: Mapping[str, str], names: Names) -> dict[str, list[str]]:
    """Class names of the modules that no name picks.

    Quantized weights are those of linear layers where all classes have one group; else transformers is asked.
    """
    loose = [p for p in paths.values() if not any(names_match(p, t) for t in known.groups)]
    words = [t for t in known.groups if t.isidentifier() and t not in paths.values() and f"{t}.weight" not in names]
    if "Linear" in words and len({known.groups[t] for t in words}) == 1:
        return {path: ["Linear"] for path in loose}
    if not words:
        return {}
    found = module_classes(config) if loose else {}
    missing = [p for p in loose if p not in found]
    if missing:
        raise FileFormatError(
            f"groups go by class ({', '.join(sorted(words))}), and the class of {missing[0]!r} is not known."
        )
    return found


def _check_plain(known: Config, names: Names, prefixes: set[str]) -> None:
    """Refuse a target that names a module whose weight is stored plain."""
    for target in known.groups:
        if target not in prefixes and f"{target}.weight" in names and not is_ignored(target, (), known.ignore):
            raise FileFormatError(f"{target!r} is a target, but {target}.weight is not stored quantized.")


def _check_neighbours(placed: list[Placed], names: Names) -> None:
    """Refuse a tensor beside a quantized weight that nothing consumes, and a bias of another length."""
    layers = {p.name.removesuffix(".weight"): p for p in placed}
    consumed = {name for p in placed for name, _, _ in specs(p)}
    for name, (dtype, shape) in names.items():
        prefix, _, leaf = name.rpartition(".")
        layer = layers.get(prefix)
        if leaf in _CACHE:
            raise FileFormatError(f"{name} is the scale of a rounded key/value cache, which is not read here.")
        whole = leaf == "weight" and dtype not in _PLAIN
        if layer is None and (whole or dtype == "I8" or dtype.startswith("F8_")):
            raise FileFormatError(f"{name} is stored as {dtype} without a scale. Is a tensor missing, or misnamed?")
        if layer is None or name in consumed:
            continue
        if leaf == "bias" and shape != (layer.matrix_shape[0],):
            raise FileFormatError(f"{name} has shape {shape}, but the weight has {layer.matrix_shape[0]} outputs.")
        if _SUSPICIOUS.fullmatch(leaf):
            raise FileFormatError(
                f"{name} is stored beside a quantized weight, and the config does not account for it."
            )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])
