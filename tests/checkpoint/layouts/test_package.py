"""The compressed-tensors layout before its own package: numbers, names, types, configs, and the choice of a group."""

from __future__ import annotations

import itertools
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.utils.match import is_match, match_targets
from safetensors.torch import save_file
from transformers.utils.quantization_config import CompressedTensorsConfig

from arrondi.checkpoint import LAYOUTS, Checkpoint, LayerValues, Placed
from arrondi.checkpoint.layouts.compressed_tensors.matching import is_ignored, match
from arrondi.errors import FileFormatError
from arrondi.formats import PRESETS, parse_scheme
from arrondi.tensor.nearest import fake_quantize, quantize_tensor
from arrondi.tensor.qtensor import QTensor
from tests.checkpoint.copies import local_rounding, static_grid

LAYOUT = LAYOUTS["compressed-tensors"]

SCHEMES = [
    *(f"W{b}A16" for b in range(2, 9)), "W4A16_ASYM", "W3A16_ASYM", "W8A8", "W4A8", "W4AFP8", "FP8_DYNAMIC", "FP8", "FP8A16", "FP8_BLOCK", "NVFP4A16", "NVFP4",
    "MXFP4A16", "MXFP8A16", "w=fp6_e2m3/g32/e8m0", "w=int4/tensor", "w=int4/channel/asym", "w=int4/b64x64", "w=int4/b64x64/asym", "w=int8/tensor/asym",
    "w=int8/g64/asym,a=int8/token", "w=int8/channel,a=int8/tensor", "w=fp8/tensor,a=fp8/tensor", "W8A8_STATIC",
]  # fmt: skip
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BFLOAT16 = 2.0**-8
"""Largest relative error of a number rounded to bfloat16."""


def packages_config(config: dict[str, Any]) -> QuantizationConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return QuantizationConfig.model_validate(config)


def packages_scheme(config: dict[str, Any], group: str = "group_0") -> QuantizationScheme:
    known = packages_config(config).config_groups[group]
    assert isinstance(known, QuantizationScheme)
    return known


def compressor(scheme: QuantizationScheme) -> Any:
    return BaseCompressor.get_value_from_registry(getattr(scheme.format, "value", scheme.format))


def layer(scheme: str, stored: str = "float32", **facts: Any) -> tuple[Placed, LayerValues]:
    placed = Placed("layer.weight", (128, 256), parse_scheme(scheme).with_scale(stored), **facts)
    weight = torch.randn(placed.matrix_shape, generator=torch.Generator().manual_seed(0)) * 0.02
    return placed, LayerValues(quantize_tensor(weight, placed.scheme.weights), static_grid(placed.scheme, 3.0))


def local(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix("layer."): t for n, t in tensors.items()}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", SCHEMES)
def test_the_package_decompresses_to_our_numbers(name: str, stored: str) -> None:
    placed, values = layer(name, stored)
    q, known = values.weight, packages_scheme(LAYOUT.config([placed], []))
    found = compressor(known).decompress(local(LAYOUT.write(placed, values)), known)["weight"]
    if name.startswith("NVFP4"):
        # Theirs divides by the global scale where ours multiplies by its reciprocal: one last bit of float32 apart,
        # which at a tie shows in bfloat16.
        assert bool(((found.float() - q.dequantize()).abs() <= q.dequantize().abs() * BFLOAT16 * (1 + 1e-6)).all())
    else:
        assert torch.equal(found, q.dequantize(found.dtype))
    expected = "bfloat16" if name.startswith(("NVFP4", "MXFP4", "MXFP8", "w=fp6")) else stored
    assert found.dtype == STORED[expected]


@pytest.mark.parametrize(
    "scheme", ["W4A16", "w=int3/g32/asym", "w=int8/channel", "w=int4/channel/asym", "w=fp8/g64", "w=int8/tensor"]
)
def test_the_package_restores_transposed_weights_in_the_orientation_of_the_file(scheme: str) -> None:
    placed, values = layer(scheme, kind="Conv1D", transposed=True)
    known = packages_scheme(LAYOUT.config([placed], []))
    found = compressor(known).decompress(local(LAYOUT.write(placed, values)), known)["weight"]
    assert found.shape == placed.shape
    assert torch.equal(found, values.weight.dequantize().T)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_package_writes_the_names_and_types_that_we_write(name: str) -> None:
    """What its own code compresses has our names, types and shapes, and means our numbers: our grid is its grid."""
    placed, values = layer(name)
    ours = local(LAYOUT.write(placed, values))
    known = packages_scheme(LAYOUT.config([placed], []))
    back = compressor(known).decompress(ours, known)
    again = compressor(known).compress({n: t for n, t in back.items() if n != "weight_shape"}, known)
    assert {n: (t.dtype, t.shape) for n, t in again.items()} == {n: (t.dtype, t.shape) for n, t in ours.items()}
    assert torch.equal(
        compressor(known).decompress(again, known)["weight"], back["weight"]
    )  # zeros may have lost a sign


@pytest.mark.parametrize("name", SCHEMES)
def test_the_config_is_accepted_by_the_package_and_by_transformers(name: str) -> None:
    placed, _ = layer(name)
    config = LAYOUT.config([placed], ["lm_head"])
    known = packages_scheme(config)
    assert known.weights is not None
    assert known.weights.num_bits == placed.scheme.weights.format.bits
    assert known.weights.symmetric == placed.scheme.weights.symmetric
    assert (known.input_activations is None) == (placed.scheme.inputs is None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert CompressedTensorsConfig(**config).quantization_config.ignore == ["lm_head"]


PACKAGES = {
    "W4A16": "W4A16", "W4A16_ASYM": "W4A16_ASYM", "W8A8": "W8A8", "INT8": "W8A8", "FP8": "FP8", "FP8_DYNAMIC": "FP8_DYNAMIC", "FP8_BLOCK": "FP8_BLOCK",
    "NVFP4": "NVFP4", "NVFP4A16": "NVFP4A16", "MXFP4": "MXFP4", "MXFP4A16": "MXFP4A16", "MXFP8": "MXFP8", "W8A16": "W8A16",
}  # fmt: skip
"""Presets of the package, with our name of the same thing."""


@pytest.mark.parametrize("preset", PACKAGES)
def test_a_file_of_the_package_is_read_to_its_numbers(preset: str, tmp_path: Path) -> None:
    """Weights compressed by its own code under its own preset, scales and zero points found here in the plainest way."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    generator = torch.Generator().manual_seed(4)
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, torch.Tensor] = {}
    for name, shape in (("a", (128, 256)), ("b", (256, 128))):
        weight = torch.randn(shape, generator=generator)
        state = {"weight": weight, **packages_grid(weight, scheme)}
        packed = compressor_of(scheme).compress(dict(state), scheme)
        numbers[name] = compressor_of(scheme).decompress(packed, scheme)["weight"]
        inputs = scheme.input_activations
        if inputs is not None and inputs.dynamic is False:
            packed["input_scale"] = torch.tensor([0.02])
        if inputs is not None and inputs.dynamic == "local":
            packed["input_global_scale"] = torch.tensor([400.0])
        tensors |= {f"{name}.{n}": t for n, t in packed.items()}
    config = json.loads(QuantizationConfig(config_groups={"group_0": scheme}, format=format_of(scheme), quantization_status="compressed").model_dump_json())  # fmt: skip
    folder = written(tmp_path, config, tensors)
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.placed) == {"a.weight", "b.weight"}
    for name, theirs in numbers.items():
        ours = checkpoint.dense(f"{name}.weight")
        bound = BFLOAT16 if theirs.dtype == torch.bfloat16 else 1e-6
        assert bool(((ours - theirs.float()).abs() <= ours.abs() * bound).all())
    found = checkpoint.placed["a.weight"].scheme
    assert found == PRESETS[PACKAGES[preset]]
    values = checkpoint.layer("a.weight")
    if scheme.input_activations is not None and scheme.input_activations.dynamic is not True:
        assert values.inputs is not None and isinstance(values.inputs.scale, torch.Tensor)
        assert float(values.inputs.scale) == pytest.approx(0.02 if preset == "FP8" else 1 / 400)


def packages_grid(weight: torch.Tensor, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    """Scales and zero points of a weight by the package's own formula, over ranges taken here."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = scheme.weights
    assert args is not None
    tiles = weight
    if args.strategy in ("group", "tensor_group"):
        tiles = weight.unflatten(-1, (-1, args.group_size))
        low, high = tiles.amin(-1), tiles.amax(-1)
    elif args.strategy == "block":
        rows, columns = args.block_structure
        blocks = weight.reshape(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    elif args.strategy == "channel":
        low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    else:
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    outer = generate_gparam(weight.min(), weight.max()) if args.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(low, high, args, global_scale=outer)
    found = {"weight_scale": scale} | ({"weight_global_scale": outer} if outer is not None else {})
    return found if args.symmetric else found | {"weight_zero_point": zero}


def compressor_of(scheme: QuantizationScheme) -> Any:
    return BaseCompressor.get_value_from_registry(format_of(scheme))


def format_of(scheme: QuantizationScheme) -> str:
    from compressed_tensors.compressors.format import infer_module_format

    return str(infer_module_format(torch.nn.Linear, scheme).value)


def written(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    return folder


def test_scattered_groups_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """`actorder: group`: column j has the scale of group g_idx[j]. The package read that before 0.20; here it is a loop."""
    placed, values = layer("w=int4/g32/asym")
    index = torch.randperm(256, generator=torch.Generator().manual_seed(6)) // 32
    tensors = LAYOUT.write(placed, values) | {"layer.weight_g_idx": index.int()}
    config = LAYOUT.config([placed], [])
    with pytest.raises(FileFormatError, match="weight_g_idx"):
        Checkpoint.open(written(tmp_path, config, tensors))
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    config["version"] = "0.9.2"
    checkpoint = Checkpoint.open(written(tmp_path, config, tensors))
    q = values.weight
    assert isinstance(q.scale, torch.Tensor) and q.zero_point is not None
    wanted = torch.stack(
        [(q.codes[:, j].float() - q.zero_point[:, index[j]]) * q.scale[:, index[j]] for j in range(256)], dim=1
    )
    found = checkpoint.read("layer.weight")
    assert isinstance(found, QTensor) and found.group_index is not None
    assert torch.equal(checkpoint.dense("layer.weight"), wanted)


@pytest.mark.parametrize(
    "text", ["int8/token", "int8/token/asym", "int8/tensor", "int8/g32", "fp8/token", "fp8/tensor", "fp8/g128", "int8/tensor/static", "int8/tensor/asym/static", "fp8/tensor/static"]
)  # fmt: skip
def test_activations_are_rounded_as_the_package_rounds_them(text: str) -> None:
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as packages_fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    placed, values = layer(f"w=int8/channel,a={text}")
    inputs = placed.scheme.inputs
    known = packages_scheme(LAYOUT.config([placed], [])).input_activations
    assert inputs is not None and known is not None
    x = torch.randn(2, 40, 256, generator=torch.Generator().manual_seed(1))
    x[0, 3] = 0
    x[1, 5, 7] = 40.0
    if inputs.dynamic is False:
        stored = local(LAYOUT.write(placed, values))
        scale, zero = stored["input_scale"], stored.get("input_zero_point")
    else:
        scale, zero = compute_dynamic_scales_and_zp(x, known, module=None)
    found = packages_fake_quantize(x, scale, zero, known)
    # The package adds the zero point before it rounds, so a tie may fall to the other side: one code, seldom.
    apart = (fake_quantize(x, inputs.scheme, values.inputs) - found).abs() > 1e-5 * found.abs()
    assert float(apart.float().mean()) <= (0.005 if "asym" in text else 0)


def test_the_reference_of_local_inputs_is_the_packages_rounding() -> None:
    """`tests.checkpoint.copies.local_rounding` is a reference elsewhere; here it meets the package."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as packages_fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    placed, values = layer("NVFP4")
    known = packages_scheme(LAYOUT.config([placed], [])).input_activations
    outer = local(LAYOUT.write(placed, values))["input_global_scale"]
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(1))
    scale, zero = compute_dynamic_scales_and_zp(x, known, module=None, global_scale=outer)
    found = packages_fake_quantize(x, scale, zero, known, global_scale=outer)
    assert placed.scheme.inputs is not None
    assert torch.allclose(local_rounding(x, placed.scheme.inputs.scheme, values.inputs), found, rtol=1e-6, atol=0)


# ── which group a module has ──────────────────────────────────────────────────────────────────────────────────────────

PATHS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head", "model.embed_tokens"]
TARGETS = [
    *PATHS, "Linear", "Embedding", "Module", "NonDynamicallyQuantizableLinear", "re:.*proj$", "re:model.*0.*", "re:.*", "re:lm", "re:^mlp", "q_proj",
    "re:.*[qk]_proj", "re:.*layers\\.1\\..*", "Lin",
]  # fmt: skip


def test_the_group_of_a_module_is_the_packages_choice() -> None:
    rng = random.Random(0)
    modules = [
        torch.nn.Linear(1, 1),
        torch.nn.Embedding(1, 1),
        torch.nn.modules.linear.NonDynamicallyQuantizableLinear(1, 1),
    ]
    chosen = set()
    for _ in range(3000):
        groups = {target: i for i in range(rng.randint(1, 4)) for target in rng.sample(TARGETS, rng.randint(1, 3))}
        path, module = rng.choice(PATHS), rng.choice(modules)
        classes = [c.__name__ for c in type(module).__mro__]
        matched = match_targets(path, module, groups)
        wanted = groups[matched[0]] if matched else None
        assert match(path, classes, groups) == wanted, (path, groups)
        ignore = rng.sample(TARGETS, rng.randint(0, 2))
        assert is_ignored(path, classes, ignore) == is_match(path, module, ignore)
        chosen.add(None if not matched else matched[0])
    assert len(chosen) > 8, "the cases are too much alike"


@pytest.mark.parametrize("schemes", [["W4A16"], ["W4A16", "W8A8"]], ids=["one", "two"])
def test_a_module_is_matched_exactly_if_its_weight_is_packed(schemes: list[str]) -> None:
    """Under the package's own matcher: quantized, kept, stored but not built, an expert, an embedding."""
    names = [
        f"model.layers.{i}.mlp.{p}" for i, p in itertools.product(range(3), ("up", "experts.0.w1", "experts.11.w2"))
    ]
    placed = [
        Placed(f"{n}.weight", (128, 128), parse_scheme(schemes[i % len(schemes)])) for i, n in enumerate(names[:6])
    ]
    kept = [*names[6:], "lm_head", "model.layers.61.eh_proj"]
    config = packages_config(LAYOUT.config(placed, kept))
    targets = [t for g in config.config_groups.values() if isinstance(g, QuantizationScheme) for t in g.targets]
    for name in [*names, *kept]:
        packed = any(p.path == name for p in placed)
        assert is_match(name, torch.nn.Linear(1, 1), targets, config.ignore or ()) == packed, name
    assert not is_match("model.embed_tokens", torch.nn.Embedding(1, 1), targets, config.ignore or ())
