"""The layout of AutoAWQ ("gemm"), which transformers (with gptqmodel), vLLM and SGLang read.

Owns: `LAYOUT`. Of a weight P.weight (m outputs, n inputs, G groups), codes of 4 bits:

    P.qweight   int32 (n, m/8)   codes + 8 of eight outputs, in the order 0, 2, 4, 6, 1, 3, 5, 7, the first in the lowest bits
    P.qzeros    int32 (G, m/8)   zero points + 8, in the same order
    P.scales    float16 (G, m)

A file has one scheme: symmetric weights (`zero_point` false) have the zero point 8 in every place.

Source: gptqmodel 7.7, `quantization/awq/utils/packing_utils.py`; transformers 5.24, `integrations/awq.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.beside import check_beside, groups_of, placed_under, shape_of
from arrondi.checkpoint.layouts.checks import checked
from arrondi.checkpoint.layouts.claims import Claims
from arrondi.checkpoint.layouts.integers import AUTOROUND, refuse_all_but, said, scheme_of, symmetric_or_not
from arrondi.checkpoint.layouts.layout import LayerValues, Layout, ModelFacts, Names, Placed, Reader
from arrondi.checkpoint.layouts.words import interleaved, pack_across, straightened, unpack_across
from arrondi.errors import FileFormatError
from arrondi.formats import Scheme, scale_shape
from arrondi.tensor.ranges.grid import STORED
from arrondi.tensor.storage import load_scale

BITS: Final = 4
LEAVES: Final = ("qweight", "qzeros", "scales")
_A_WORD: Final = 8
_HOW: Final = (
    "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "ipex_config", "meta", "pack_dtype", "damp_percent",
    "true_sequential", "act_group_aware", "tokenizer", "dataset", "batch_size", "pad_token_id", "max_input_length", "cache_block_outputs",
    "model_seqlen", "modules_in_block_to_quantize", "block_name_to_quantize", "module_name_preceding_first_block",
)  # fmt: skip
"""Keys that say how codes were found or how a runtime multiplies them."""


def _refuse(placed: Placed) -> str | None:
    return refuse_all_but(placed, "awq", (BITS,))


def _together(placed: list[Placed]) -> str | None:
    if len({said(p.scheme.weights) for p in placed}) > 1:
        some = ", ".join(sorted({str(p.scheme.weights) for p in placed}))
        return (
            f"An awq file has one scheme for all layers, and these would have several: {some}. Choose one --group-size that divides all "
            "inputs, or give --keep-misfits."
        )
    return None


def specs(placed: Placed) -> list[TensorSpec]:
    """The tensors that a layer becomes."""
    path, (rows, columns) = placed.name.removesuffix(".weight"), placed.matrix_shape
    groups = scale_shape(placed.scheme.weights.granularity, (rows, columns))[1]
    return [
        (f"{path}.qweight", torch.int32, (columns, rows // _A_WORD)),
        (f"{path}.qzeros", torch.int32, (groups, rows // _A_WORD)),
        (f"{path}.scales", STORED[str(placed.scheme.weights.scale)], (groups, rows)),
    ]


def write(placed: Placed, values: LayerValues) -> dict[str, torch.Tensor]:
    """Those tensors with their numbers."""
    path, q = placed.name.removesuffix(".weight"), values.weight
    low = q.scheme.format.qmin
    zero = torch.zeros_like(q.real_scale, dtype=torch.int32) if q.zero_point is None else q.zero_point
    return {
        f"{path}.qweight": pack_across(interleaved(q.codes.T), BITS, low),
        f"{path}.qzeros": pack_across(interleaved((zero - low).to(torch.uint8).T), BITS),
        f"{path}.scales": q.real_scale.to(STORED[str(q.scheme.scale)]).T.contiguous(),
    }


def read_layer(placed: Placed, read: Reader) -> LayerValues:
    """The numbers of a layer, checked."""
    path, scheme, rows = placed.name.removesuffix(".weight"), placed.scheme.weights, placed.matrix_shape[0]
    low = scheme.format.qmin
    parts = {leaf: read(f"{path}.{leaf}") for leaf in LEAVES}
    codes = straightened(unpack_across(f"{path}.qweight", parts["qweight"], BITS, rows, low)).T.contiguous()
    zero = straightened(unpack_across(f"{path}.qzeros", parts["qzeros"], BITS, rows)).T.int() + low
    scale = load_scale(parts["scales"].T.contiguous())
    return LayerValues(checked(placed.name, symmetric_or_not(path, codes, scale, zero, scheme)))


def _config(placed: list[Placed], kept: list[str], facts: ModelFacts = ModelFacts()) -> dict[str, Any]:
    bits, size, symmetric = said(placed[0].scheme.weights)
    return {
        "quant_method": "awq",
        "bits": bits,
        "group_size": size,
        "zero_point": not symmetric,
        "version": "gemm",
        "modules_to_not_convert": sorted(set(kept)) or None,
    }


def _read_config(config: object) -> Scheme:
    """Check a `quantization_config` of quant_method awq and give the scheme of its layers."""
    claims = Claims(config, "quantization_config")
    claims.only("quant_method", "awq")
    claims.only("method", "awq")
    for key in ("version", "format", "checkpoint_format"):
        claims.word(key, "gemm", ["gemm"])  # the others have another order of codes
    bits = claims.number("bits", claims.number("w_bit", BITS, [BITS]), [BITS])
    size = claims.number("group_size", claims.number("q_group_size", 128, least=-1), least=-1)
    asymmetric = claims.flag("zero_point", True)
    symmetric = claims.flag("sym", not asymmetric)
    for key in ("desc_act", "lm_head", "rotation", "activation", "adapter", "dynamic"):
        claims.only(key, False, {})
    claims.words("modules_to_not_convert")  # the stored tensors say it
    claims.word("data_type", "int", ["int"])
    claims.remarks((*_HOW, *AUTOROUND))
    claims.done()
    return scheme_of(bits, size or -1, symmetric and not asymmetric)


def _find(config: Mapping[str, Any], names: Names, read: Reader) -> list[Placed]:
    scheme = _read_config(config["quantization_config"])
    placed = []
    for path in groups_of(names, LEAVES, LEAVES):
        columns, rows = shape_of(names, f"{path}.qweight", 2)[0], shape_of(names, f"{path}.scales", 2)[1]
        if rows % _A_WORD:
            raise FileFormatError(f"{path}.scales has {rows} outputs, which words of {_A_WORD} codes do not hold.")
        placed.append(placed_under(path, (rows, columns), scheme, names))
    check_beside(placed, [s for p in placed for s in specs(p)], names)
    return placed


LAYOUT: Final = Layout(
    "awq", _refuse, specs, write, read_layer, _config, _find, lambda scheme: scheme.with_scale("float16"), _together
)
