"""The layout of AutoRound (quant_method auto-round), which transformers (with auto-round), vLLM and SGLang read.

Owns: `LAYOUT`. Its `packing_format` borrows the tensors of others, without an index of groups:

    auto_round:auto_gptq    GPTQ's, zero points less one
    auto_round              GPTQ's, zero points as they are (auto_round:gptqmodel: with the index)
    auto_round:auto_awq     AWQ's

and `extra_config` says by path or pattern what is different in some layers. `Placed.storage` is the packing where it is not the usual one,
which is the first for symmetric schemes and the second for others.

Source: auto-round 0.16, `export/export_to_autoround/export.py`, `inference/convert_model.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch

from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts import awq
from arrondi.checkpoint.layouts.beside import check_beside, groups_of, placed_under, shape_of
from arrondi.checkpoint.layouts.claims import Claims, compiled
from arrondi.checkpoint.layouts.classes import conv1d_paths, is_conv1d
from arrondi.checkpoint.layouts.gptq import storage as gptq
from arrondi.checkpoint.layouts.integers import AUTOROUND, WIDTHS, refuse_all_but, said, scheme_of
from arrondi.checkpoint.layouts.layout import LayerValues, Layout, ModelFacts, Names, Placed, Reader
from arrondi.errors import FileFormatError
from arrondi.formats import Scheme

NAMES: Final = ("auto-round", "intel/auto-round")
_SYMMETRIC: Final = "auto_round:auto_gptq"
_RAW: Final = "auto_round"
_INDEXED: Final = "auto_round:gptqmodel"
_AWQ: Final = "auto_round:auto_awq"
_READ: Final = range(2, 9)
"""Bits of a code that it packs."""


def _packing(placed: Placed) -> str:
    return placed.storage or (_SYMMETRIC if placed.scheme.weights.symmetric else _RAW)


def _borrowed(placed: Placed) -> Placed:
    """The same layer as the layout knows it whose tensors it has."""
    return replace(placed, storage="gptq" if _packing(placed) == _SYMMETRIC else "gptq_v2")


def _refuse(placed: Placed) -> str | None:
    return refuse_all_but(placed, "auto-round", WIDTHS) or (
        "auto-round has no scattered groups" if placed.indexed else None
    )


def _specs(placed: Placed) -> list[TensorSpec]:
    if _packing(placed) == _AWQ:
        return awq.specs(placed)
    return gptq.specs(_borrowed(placed), _packing(placed) == _INDEXED)


def _write(placed: Placed, values: LayerValues) -> dict[str, torch.Tensor]:
    if _packing(placed) == _AWQ:
        return awq.write(placed, values)
    return gptq.write(_borrowed(placed), values, _packing(placed) == _INDEXED)


def _read(placed: Placed, read: Reader) -> LayerValues:
    if _packing(placed) == _AWQ:
        return awq.read_layer(placed, read)
    return gptq.read_layer(_borrowed(placed), read, _packing(placed) == _INDEXED)


def _together(placed: list[Placed]) -> str | None:
    if len(set(map(_packing, placed))) > 1:
        return "An auto-round file has one packing, and symmetric and asymmetric layers would need two. Make all symmetric, or all asymmetric."
    return None


def _config(placed: list[Placed], kept: list[str], facts: ModelFacts = ModelFacts()) -> dict[str, Any]:
    schemes = [said(p.scheme.weights) for p in placed]
    base = Counter(schemes).most_common(1)[0][0]
    extra: dict[str, Any] = {k: {"bits": 16, "data_type": "float"} for k in sorted(set(kept))}
    extra |= {p.path: _words(s) for p, s in zip(placed, schemes, strict=True) if s != base}
    document = {"quant_method": NAMES[0], **_words(base), "data_type": "int", "packing_format": _packing(placed[0])}
    blocks = _blocks(placed)
    if blocks:
        document["block_name_to_quantize"] = blocks
    return document | ({"extra_config": extra} if extra else {})


def _blocks(placed: list[Placed]) -> str:
    """Paths of the lists of blocks that hold quantized layers, with commas between them."""
    found = {m[1] for p in placed if (m := re.match(r"(.*?)\.\d+\.", p.path)) is not None}
    return ",".join(sorted(found))


def _words(scheme: tuple[int, int, bool]) -> dict[str, Any]:
    return dict(zip(("bits", "group_size", "sym"), scheme, strict=True))


class _Rules:
    """What a config says of its layers."""

    def __init__(self, config: object) -> None:
        claims = Claims(config, "quantization_config")
        claims.word("quant_method", None, NAMES)
        packing = claims.word("packing_format", None, [_SYMMETRIC, _RAW, _INDEXED, _AWQ, "auto_round:exllamav2"])
        self.packing = _RAW if packing == "auto_round:exllamav2" else packing
        base = _read_layer(claims, None)
        if base is None:
            raise FileFormatError("quantization_config says 16 bits, so nothing is quantized.")
        self.base: Scheme = base
        claims.only("backend", "auto", "auto_round", self.packing, packing)
        extra = claims.table("extra_config")
        claims.remarks(
            (*AUTOROUND, "block_name_to_quantize", "quant_block_list", "damp_percent", "true_sequential", "desc_act")
        )
        claims.only("modules_to_not_convert", [])
        claims.done()
        self.exact: dict[str, Scheme | None] = {}
        self.patterns: list[tuple[re.Pattern[str], Scheme | None]] = []
        for name, change in extra.items():
            where = f"quantization_config.extra_config.{name[:60]}"
            own = Claims(change, where)
            scheme = _read_layer(own, self.base)
            own.done()
            self.exact[name] = scheme
            self.patterns.append((compiled(name, where), scheme))

    def scheme_of(self, path: str) -> Scheme | None:
        """The scheme of a module, None if it is said not to be quantized: by its own name, else by the first pattern."""
        if path in self.exact:
            return self.exact[path]
        return next((s for pattern, s in self.patterns if pattern.search(path)), self.base)


def _read_layer(claims: Claims, base: Scheme | None) -> Scheme | None:
    bits, size, symmetric = (None, 128, True) if base is None else said(base)
    bits = claims.number("bits", bits, [*_READ, 16, 32])
    size = claims.number("group_size", size, least=-1) or -1
    symmetric = claims.flag("sym", symmetric)
    kind = claims.word("data_type", "int", ["int", "float"])
    claims.only("act_bits", 16, 32)
    claims.remarks(("act_group_size", "act_sym", "act_data_type", "act_dynamic"))  # of inputs that are not rounded
    for key in ("super_bits", "super_group_size", "rotation_config"):
        claims.only(key)
    if bits >= 16:
        return None
    if kind != "int":
        raise FileFormatError(f"data_type is {kind!r} with {bits} bits, which is not read here.")
    return scheme_of(bits, size, symmetric)


def _find(config: Mapping[str, Any], names: Names, read: Reader) -> list[Placed]:
    known, turned = _Rules(config["quantization_config"]), conv1d_paths(config)
    leaves = ("qweight", "qzeros", "scales") + (("g_idx",) if known.packing == _INDEXED else ())
    placed = []
    for path in groups_of(names, leaves, leaves):
        scheme = known.scheme_of(path)
        if scheme is None:
            raise FileFormatError(f"extra_config says that {path} is not quantized, but it is stored so.")
        packed, rows = shape_of(names, f"{path}.qweight", 2), shape_of(names, f"{path}.scales", 2)[1]
        across = known.packing == _AWQ
        if across and (scheme.format.bits != awq.BITS or rows % 8):
            raise FileFormatError(
                f"{path}: AWQ's words hold eight outputs of 4 bits, not {rows} of {scheme.format.bits}."
            )
        columns = packed[0] if across else packed[0] * 32 // scheme.format.bits
        found = placed_under(path, (rows, columns), scheme, names, is_conv1d(path, turned) and not across)
        usual = _packing(found)
        placed.append(replace(found, storage="" if usual == known.packing else known.packing))
    check_beside(placed, [s for p in placed for s in _specs(p)], names)
    return placed


LAYOUT: Final = Layout(
    NAMES[0], _refuse, _specs, _write, _read, _config, _find, lambda scheme: scheme.with_scale("float16"), _together
)
