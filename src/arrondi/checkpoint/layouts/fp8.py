"""FP8 weights as DeepSeek, vLLM and transformers (quant_method fp8) store them.

Owns: `LAYOUT`. Of a weight P.weight (m outputs, n inputs):

    P.weight             float8_e4m3 (m, n)
    P.weight_scale_inv   float32 (⌈m/a⌉, ⌈n/b⌉)   what codes of a block of a × b are multiplied by (the name is an accident); one number
                                                  where there are no blocks
    P.activation_scale   float32, one number      the static scale of inputs; without it inputs are rounded in groups of b as they come

vLLM's own files call the two weight_scale and input_scale; a stack of experts X (E, m, n) has X_scale_inv (E, ⌈m/a⌉, ⌈n/b⌉). With `scale_fmt` ue8m0
scales are powers of two. `Placed.storage` holds what the scheme does not say: the names, axes and types of scales.

Source: transformers 5.24, `integrations/finegrained_fp8.py`; DeepSeek-V3, `inference/kernel.py`; vLLM, `quantization/fp8.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.beside import FLOATS, check_beside
from arrondi.checkpoint.layouts.checks import checked, checked_grid
from arrondi.checkpoint.layouts.claims import Claims
from arrondi.checkpoint.layouts.layout import LayerValues, Layout, ModelFacts, Names, Placed, Reader
from arrondi.errors import FileFormatError
from arrondi.formats import (
    FORMATS,
    ActivationScheme,
    LayerScheme,
    PerBlock,
    PerGroup,
    PerTensor,
    PerToken,
    Scheme,
    scale_shape,
)
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import STORED, Grid
from arrondi.tensor.storage import load_scale, store_scale

_F8: Final = FORMATS["fp8_e4m3"]
_SCALES: Final = ("weight_scale_inv", "weight_scale")
_INPUTS: Final = ("activation_scale", "input_scale")
_ENDINGS: Final = ("_scale_inv", ".weight_scale", *(f".{leaf}" for leaf in _INPUTS))
_POWERS: Final[Mapping[str, torch.dtype]] = {"U8": torch.uint8, "F8_E8M0": torch.float8_e8m0fnu}


@dataclass(frozen=True)
class _Form:
    """What `Placed.storage` says: the name of the scale after that of the module, its axes, how powers of two are stored; the same of inputs."""

    scale: str = ".weight_scale_inv"
    axes: int = 0
    powers: str = "U8"
    inputs: str = ".activation_scale"
    inputs_axes: int = 0

    @classmethod
    def of(cls, placed: Placed) -> _Form:
        if not placed.storage:
            return cls(scale=".weight_scale_inv" if placed.name.endswith(".weight") else "_scale_inv")
        scale, axes, powers, inputs, inputs_axes = placed.storage.split("/")
        return cls(scale, int(axes), powers, inputs, int(inputs_axes))

    def word(self, placed: Placed) -> str:
        """The text of it, "" for the usual one."""
        if self == _Form.of(replace(placed, storage="")):
            return ""
        return f"{self.scale}/{self.axes}/{self.powers}/{self.inputs}/{self.inputs_axes}"


def _refuse(placed: Placed) -> str | None:
    scheme, weights = placed.scheme, placed.scheme.weights
    if placed.kind != "Linear" or placed.transposed or not (placed.name.endswith(".weight") or placed.matrices > 1):
        return f"fp8 stores the weights of linear layers, and this is of kind {placed.kind} and shape {placed.shape}"
    if len(placed.shape) > 3 or placed.indexed:
        return "fp8 stores matrices and stacks of them, without scattered groups"
    if (weights.format, weights.zero_point, weights.apart) != (_F8, "none", None) or weights.scale != "float32":
        return f"fp8 stores fp8_e4m3 under float32 scales, not {weights}"
    if (scheme.outputs, scheme.kv) != (None, None):
        return "fp8 rounds no outputs or caches"
    match weights.granularity:
        case PerBlock(rows, columns):
            if placed.matrices > 1 and placed.shape[-2] % rows:
                return f"blocks of fp8 end with each matrix of a stack, and {rows} does not divide {placed.shape[-2]}"
            wanted = _inputs(columns, False)
        case PerTensor() if placed.matrices == 1:
            wanted = _static()
        case _:
            return f"fp8 has one scale a block, or a tensor, not {weights}"
    if scheme.inputs != wanted:
        return f"fp8 rounds the inputs of such weights by {wanted}, not by {scheme.inputs}"
    return None


def _inputs(columns: int, powers: bool) -> ActivationScheme:
    return ActivationScheme(Scheme(_F8, PerGroup(columns), scale="e8m0" if powers else "float32"))


def _static() -> ActivationScheme:
    return ActivationScheme(Scheme(_F8, PerTensor()), False)


def _together(placed: list[Placed]) -> str | None:
    if len({(p.scheme.weights.granularity, p.scheme.inputs) for p in placed}) > 1:
        return "An fp8 file has one block size, and inputs that are all static or all dynamic. Use one scheme for all layers."
    return None


def _specs(placed: Placed) -> list[TensorSpec]:
    path, weights, form = placed.name.removesuffix(".weight"), placed.scheme.weights, _Form.of(placed)
    stored = _POWERS[form.powers] if weights.scale == "e8m0" else STORED[str(weights.scale)]
    found: list[TensorSpec] = [
        (placed.name, torch.float8_e4m3fn, placed.shape),
        (path + form.scale, stored, _shape(placed)),
    ]
    if placed.scheme.inputs is not None and placed.scheme.inputs.dynamic is False:
        kind = STORED[str(placed.scheme.inputs.scheme.scale)]
        found.append((path + form.inputs, kind, (1,) * form.inputs_axes))
    return found


def _shape(placed: Placed) -> tuple[int, ...]:
    """The shape of the stored scales."""
    if isinstance(placed.scheme.weights.granularity, PerTensor):
        return (1,) * _Form.of(placed).axes
    rows, columns = scale_shape(placed.scheme.weights.granularity, placed.matrix_shape)
    return (placed.shape[0], rows // placed.shape[0], columns) if len(placed.shape) == 3 else (rows, columns)


def _write(placed: Placed, values: LayerValues) -> dict[str, torch.Tensor]:
    path, q, form = placed.name.removesuffix(".weight"), values.weight, _Form.of(placed)
    scale = store_scale(q.real_scale, str(q.scheme.scale))
    tensors = {
        placed.name: q.codes.view(torch.float8_e4m3fn).reshape(placed.shape),
        path + form.scale: scale.view(_POWERS[form.powers] if q.scheme.scale == "e8m0" else scale.dtype).reshape(
            _shape(placed)
        ),
    }
    if values.inputs is not None and placed.scheme.inputs is not None:
        stored = values.inputs.scale.to(STORED[str(placed.scheme.inputs.scheme.scale)])
        tensors[path + form.inputs] = stored.reshape((1,) * form.inputs_axes)
    return tensors


def _read(placed: Placed, read: Reader) -> LayerValues:
    path, weights, form = placed.name.removesuffix(".weight"), placed.scheme.weights, _Form.of(placed)
    stored = read(path + form.scale)
    scale = load_scale(stored.view(torch.uint8) if weights.scale == "e8m0" else stored)
    codes = read(placed.name).view(torch.uint8).reshape(placed.matrix_shape)
    q = QTensor(codes, scale.reshape(scale_shape(weights.granularity, placed.matrix_shape)), None, None, weights)
    grid = None
    if placed.scheme.inputs is not None and placed.scheme.inputs.dynamic is False:
        grid = Grid(read(path + form.inputs).float().reshape(1, 1), None, None)
        checked_grid(path + form.inputs, grid, placed.scheme.inputs.scheme.format)
    return LayerValues(checked(placed.name, q), grid)


def _config(placed: list[Placed], kept: list[str], facts: ModelFacts = ModelFacts()) -> dict[str, Any]:
    granularity, inputs = placed[0].scheme.weights.granularity, placed[0].scheme.inputs
    blocks = [granularity.rows, granularity.columns] if isinstance(granularity, PerBlock) else None
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "static" if inputs is not None and inputs.dynamic is False else "dynamic",
        "weight_block_size": blocks,
        "modules_to_not_convert": sorted(set(kept)),
    }


def _read_config(config: object) -> tuple[PerBlock | PerTensor, ActivationScheme]:
    """Check a `quantization_config` of quant_method fp8 and give the granularity of weights and what inputs become."""
    claims = Claims(config, "quantization_config")
    claims.only("quant_method", "fp8")
    claims.word("fmt", "e4m3", ["e4m3"])
    claims.word("expert_dtype", "fp8", ["fp8"])
    static = claims.word("activation_scheme", "dynamic", ["dynamic", "static"]) == "static"
    powers = claims.word("scale_fmt", "float", ["float", "ue8m0"]) == "ue8m0"
    claims.only("kv_cache_scheme")
    claims.only("modules_to_convert", [])
    claims.only("is_checkpoint_fp8_serialized", True)
    for key in ("modules_to_not_convert", "ignored_layers"):
        claims.words(key)  # the stored tensors say it
    size = claims.numbers("weight_block_size", [])
    claims.remarks(["dequantize"])
    claims.done()
    if size and (len(size) != 2 or not all(0 < n < 2**31 for n in size)):
        raise FileFormatError(f"quantization_config.weight_block_size should be two sizes, found {size}.")
    if size:
        return PerBlock(size[0], size[1]), _static() if static else _inputs(size[1], powers)
    return PerTensor(), _static() if static else ActivationScheme(Scheme(_F8, PerToken()))


def _find(config: Mapping[str, Any], names: Names, read: Reader) -> list[Placed]:
    granularity, inputs = _read_config(config["quantization_config"])
    placed = [
        _place(n, names, granularity, inputs)
        for n, (dtype, shape) in names.items()
        if dtype == "F8_E4M3" and len(shape) > 1
    ]
    consumed = [s for p in placed for s in _specs(p)]
    lost = {n for n in names if n.endswith(_ENDINGS)} - {name for name, _, _ in consumed}
    if lost:
        raise FileFormatError(
            f"{min(lost)} is stored, but no weight in fp8 has it. Is one stored in another type, or misnamed?"
        )
    check_beside(placed, consumed, names)
    return placed


def _place(name: str, names: Names, granularity: PerBlock | PerTensor, inputs: ActivationScheme) -> Placed:
    path, shape = name.removesuffix(".weight"), names[name][1]
    endings = [f".{leaf}" for leaf in _SCALES] if name.endswith(".weight") else ["_scale_inv"]
    scale = next((e for e in endings if path + e in names), None)
    if scale is None:
        raise FileFormatError(f"{path}{endings[0]} is missing, though {name} is stored in fp8.")
    if not 2 <= len(shape) <= 3 or not all(0 < n < 2**31 for n in shape):
        raise FileFormatError(f"{name} has the shape {shape}, but quantized weights are matrices or stacks of them.")
    if len(shape) == 3 and (isinstance(granularity, PerTensor) or shape[1] % granularity.rows):
        raise FileFormatError(f"{name}: its blocks do not end with each of its matrices, which is not read here.")
    kind, axes = names[path + scale][0], len(names[path + scale][1])
    if kind not in FLOATS and kind not in _POWERS:
        raise FileFormatError(f"{path}{scale} should hold floating-point numbers or powers of two, found {kind}.")
    weights = Scheme(_F8, granularity, scale="e8m0" if kind in _POWERS else FLOATS[kind])
    form = _Form(scale, axes if isinstance(granularity, PerTensor) else 0, kind if kind in _POWERS else "U8")
    if inputs.dynamic is False:
        own = next((f".{leaf}" for leaf in _INPUTS if f"{path}.{leaf}" in names), None)
        if own is None:
            raise FileFormatError(f"{path}.{_INPUTS[0]} is missing, though activation_scheme is static.")
        stored, extent = names[path + own]
        if stored not in FLOATS or extent not in ((), (1,)):
            raise FileFormatError(f"{path}{own} should be one floating-point number, found {stored} {extent}.")
        inputs = replace(inputs, scheme=replace(inputs.scheme, scale=FLOATS[stored]))
        form = replace(form, inputs=own, inputs_axes=len(extent))
    placed = Placed(name, shape, LayerScheme(weights, inputs))
    return replace(placed, storage=form.word(placed))


LAYOUT: Final = Layout(
    "fp8", _refuse, _specs, _write, _read, _config, _find, lambda scheme: scheme.with_scale("float32"), _together
)
