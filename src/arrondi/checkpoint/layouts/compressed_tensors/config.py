"""The `quantization_config` that is written, and what cannot be said in it.

Owns: `config` and `refuse`. Targets and ignores name modules of the model. One scheme for all is said by class names, several by
the path of every module, so that a module is matched exactly if its weight is stored in few bits; `ignore` lists every module
with a matrix that is kept, also those that no reader builds.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Final

from arrondi.checkpoint.layouts.compressed_tensors.args import NESTED, args_of, read_args
from arrondi.checkpoint.layouts.compressed_tensors.layer import storage_name
from arrondi.checkpoint.layouts.compressed_tensors.storage import format_of
from arrondi.checkpoint.layouts.compressed_tensors.transposed import stored_form, stored_forms
from arrondi.checkpoint.layouts.layout import ModelFacts, Placed
from arrondi.errors import FileFormatError
from arrondi.formats import ActivationScheme, LayerScheme, PerBlock, PerGroup, PerTensor, PerToken, Scheme

VERSION: Final = "0.20.0"
"""The package that the files are written for."""


def refuse(placed: Placed) -> str | None:
    """Why a layer cannot be stored, as the end of a sentence; None if it can."""
    scheme, weights = placed.scheme, placed.scheme.weights
    if placed.kind in ("Conv1d", "Conv2d", "Conv3d"):
        return "compressed-tensors stores the weights of linear layers, and this is a convolution"
    if placed.kind == "Embedding":
        return "compressed-tensors stores the weights of linear layers, and this is a table that is looked up"
    if len(placed.shape) != 2:
        return f"compressed-tensors stores matrices, and this is a stack of shape {placed.shape}"
    if not placed.name.endswith(".weight"):
        return "compressed-tensors stores parameters named weight only"
    if placed.indexed:
        return "compressed-tensors gave up scattered groups (a group index) in its version 0.20"
    if weights.apart is not None:
        return "compressed-tensors keeps no columns or elements apart"
    if weights.zero_point == "float":
        return "compressed-tensors stores integer zero points only"
    if weights.table is not None:  # also before its groups are turned: tables do not go with blocks
        return f"compressed-tensors has no format for {scheme}"
    if placed.transposed and (isinstance(weights.scale, Scheme) or weights.scale == "e8m0"):
        return "compressed-tensors has no blocks of the inputs of a transposed weight in NVFP4 or MX"
    if format_of(stored_form(placed).scheme) is None:
        return f"compressed-tensors has no format for {scheme}"
    ragged = _ragged(placed)
    if ragged:
        return ragged
    if scheme.kv is not None:
        return "compressed-tensors does not round the key/value cache of single layers"
    for side in (scheme.inputs, scheme.outputs):
        if side is not None and not _sayable(side):
            return f"compressed-tensors cannot say that activations become {side}"
    return None


def _ragged(placed: Placed) -> str | None:
    """Why groups or blocks do not fit a layer's shape; the package has no shorter last ones."""
    rows, columns = placed.matrix_shape
    match placed.scheme.weights.granularity:
        case PerGroup(size) if columns % size and not placed.transposed:
            return f"compressed-tensors has no shorter last group: {size} does not divide {columns}"
        case PerBlock(high, wide) if rows % high or columns % wide:
            return f"compressed-tensors has no smaller last block: {high} × {wide} does not divide {rows} × {columns}"
    inputs = placed.scheme.inputs
    if (
        inputs is not None
        and isinstance(inputs.scheme.granularity, PerGroup)
        and columns % inputs.scheme.granularity.size
    ):
        return f"compressed-tensors has no shorter last group: {inputs.scheme.granularity.size} does not divide {columns} inputs"
    return None


def config(placed: list[Placed], kept: list[str], facts: ModelFacts = ModelFacts()) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        placed: the layers that are stored in few bits.
        kept: paths of all modules with a matrix that is stored as it is.
        facts: what decides how transformers has to load the model.
    """
    families: dict[tuple[str, LayerScheme, bool], list[Placed]] = {}
    for p in stored_forms(placed):
        families.setdefault((storage_name(p), p.scheme, p.indexed), []).append(p)
    groups = {}
    for i, ((format, scheme, indexed), members) in enumerate(families.items()):
        groups[f"group_{i}"] = {
            # Fused experts are linears in a checkpoint though not in the model, hence the class name when all is uniform.
            "targets": sorted({"Linear", *(p.kind for p in members)})
            if len(families) == 1
            else sorted(map(_target, members)),
            "weights": args_of(scheme.weights, False, indexed),
            "input_activations": _side(scheme.inputs),
            "output_activations": _side(scheme.outputs),
            "format": format,
        }
    formats = sorted({format for format, _, _ in families})
    document: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(dict.fromkeys(kept), key=_natural),
        "kv_cache_scheme": None,
        "version": VERSION,
    }
    own = own_facts(placed)
    if own:
        document["arrondi"] = own
    if (facts.whole or any(must_dequantize(p) for p in placed)) and one_scheme_each(placed):
        document["dequantize"] = True
    return document


def own_facts(placed: list[Placed]) -> dict[str, Any]:
    """What `arrondi` reads back and the config of the package cannot say: other module paths, weights stored as (in, out)."""
    stored = {p.name.removesuffix(".weight"): p for p in placed}
    names = {name: p.module for name, p in stored.items() if p.path != name}
    turned = [name for name, p in stored.items() if p.transposed]
    return ({"module_names": names} if names else {}) | ({"transposed": turned} if turned else {})


def is_expert(path: str) -> bool:
    """One of many experts, which transformers fuses into one parameter; it knows them by this word."""
    return "experts" in path.split(".")


def must_dequantize(placed: Placed) -> bool:
    """Whether transformers loads such a weight only with `dequantize`, which turns it back while it is loaded.

    Left packed, it knows neither zero points nor modules other than nn.Linear, and makes bfloat16 of FP4 and MX weights whatever
    the model's type is. `dequantize` drops the rounding of activations, so schemes that have it go without.
    """
    scheme, format = placed.scheme, storage_name(stored_form(placed))
    if placed.kind == "Conv1D":
        return True
    if format == "pack-quantized" and not scheme.weights.symmetric:
        return True
    small = format in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized")
    return small and scheme.inputs is None


def one_scheme_each(placed: list[Placed]) -> bool:
    """Whether the experts have one scheme and all else has one: with `dequantize`, transformers reads no others."""
    kinds = {(is_expert(p.path), p.scheme, p.storage) for p in stored_forms(placed)}
    return len({expert for expert, _, _ in kinds}) == len(kinds)


def _target(placed: Placed) -> str:
    """The selector of one module. transformers looks for the scheme of the experts among the patterns."""
    return f"re:{re.escape(placed.path)}$" if is_expert(placed.path) else placed.path


def _side(activations: ActivationScheme | None) -> dict[str, Any] | None:
    return None if activations is None else args_of(activations.scheme, activations.dynamic)


def _sayable(activations: ActivationScheme) -> bool:
    """Whether the package computes these activations from what the config says."""
    scheme = activations.scheme
    if activations.outliers is not None:
        return False
    if activations.spread or not isinstance(scheme.granularity, PerTensor | PerToken | PerGroup):
        return False
    if activations.dynamic == "local":
        return scheme.scale == NESTED and scheme.granularity == PerGroup(16) and scheme.format.name == "fp4_e2m1"
    if isinstance(scheme.scale, Scheme):
        return False
    try:
        back = read_args(args_of(scheme, activations.dynamic), "activations").scheme
    except FileFormatError:
        return False
    static = activations.dynamic is False and scheme.scale != "e8m0"  # the file decides the type of a stored scale
    return back == (replace(scheme, scale="float32") if static else scheme)


def _natural(path: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
