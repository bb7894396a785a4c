"""ModelOpt's description of a quantized model: `quantization_config` of config.json, or hf_quant_config.json beside it.

Owns: `config` (what is written), `read_config` (what is read, `Said`) and `of_file` (what hf_quant_config.json says, in the words of config.json).

Source: modelopt 0.47, `torch/export/convert_hf_config.py` and `get_quant_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from arrondi.checkpoint.layouts.claims import Claims
from arrondi.checkpoint.layouts.layout import ModelFacts, Placed
from arrondi.checkpoint.layouts.modelopt.kinds import KINDS, Kind, kind_of
from arrondi.errors import FileFormatError
from arrondi.formats import PerGroup

_MIXED: Final = "mixed_precision"


@dataclass(frozen=True)
class Said:
    """What a config says of a layer.

    Attributes:
        kind: its algorithm.
        size: of groups; 0: it does not say.
    """

    kind: Kind
    size: int


def read_config(config: object) -> tuple[Said | None, Mapping[str, Said]]:
    """Check a `quantization_config`; what it says of all layers, or of each by its path.

    Raises:
        FileFormatError: a key that is not known, or a value that cannot be.
    """
    where = "quantization_config"
    claims = Claims(config, where)
    claims.only("quant_method", "modelopt")
    claims.words("ignore")  # the stored tensors say it
    claims.only("kv_cache_scheme")
    groups, layers = claims.table("config_groups"), claims.table("quantized_layers")
    word = claims.word("quant_algo", None, [*KINDS, _MIXED])
    said = None if word == _MIXED else _said(word, claims, where)
    claims.remarks(["producer"])
    claims.done()
    if (said is None) is not bool(layers):
        raise FileFormatError(
            f"{where} says quant_algo {word!r} and {len(layers)} quantized_layers, which do not go together."
        )
    for name, group in groups.items():
        _check_group(group, f"{where}.config_groups.{name}", said)
    each = {}
    for path, facts in layers.items():
        own = Claims(facts, f"{where}.quantized_layers.{path}")
        each[path] = _said(own.word("quant_algo", None, KINDS), own, f"{where}.quantized_layers.{path}")
        own.done()
    return said, each


def _said(word: str, claims: Claims, where: str) -> Said:
    size = claims.number("group_size", 0)
    claims.only("has_zero_point", False)
    claims.remarks(["pre_quant_scale"])  # the stored tensors say it
    own = KINDS[word].scheme.weights.granularity
    if size and KINDS[word].sized(size).weights.granularity != PerGroup(size):
        raise FileFormatError(f"{where}.group_size is {size}, but {KINDS[word].word} has {own}.")
    return Said(KINDS[word], size)


def _check_group(group: object, where: str, said: Said | None) -> None:
    """The same said once more, in words of compressed-tensors: how many bits, and in what groups."""
    claims = Claims(group, where)
    weights = Claims(claims.table("weights"), f"{where}.weights")
    bits, size = weights.number("num_bits", None), weights.number("group_size", 0)
    claims.remarks(["input_activations", "targets", "has_zero_point", "pre_quant_scale"])
    weights.remarks(["dynamic", "type", "strategy"])
    claims.done()
    weights.done()
    if said is None:
        return
    own = said.kind.sized(size or said.size or 1).weights
    if bits != own.format.bits or (size and own.granularity != PerGroup(size)):
        raise FileFormatError(f"{where} says {bits} bits in groups of {size}, and quant_algo is {said.kind.word}.")


def of_file(told: Mapping[str, Any]) -> dict[str, Any]:
    """What hf_quant_config.json says, under the keys of config.json.

    Raises:
        FileFormatError: it is no description of ModelOpt's.
    """
    claims = Claims(told, "it")
    claims.remarks(["producer"])
    said = dict(claims.table("quantization"))
    claims.done()
    ignore, cache = said.pop("exclude_modules", None), said.pop("kv_cache_quant_algo", None)
    return {"quant_method": "modelopt", **said, "ignore": ignore, "kv_cache_scheme": cache}


def config(placed: list[Placed], kept: list[str], facts: ModelFacts = ModelFacts()) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    rows = {p.name.removesuffix(".weight"): _row(p) for p in placed}
    first = next(iter(rows.values()))
    same = all(row == first for row in rows.values())
    said = first if same else {"quant_algo": _MIXED.upper(), "quantized_layers": rows}
    return {"quant_method": "modelopt", "ignore": sorted(set(kept)), **said}


def _row(placed: Placed) -> dict[str, Any]:
    kind, granularity = kind_of(placed.scheme), placed.scheme.weights.granularity
    assert kind is not None
    row: dict[str, Any] = {"quant_algo": kind.word}
    if kind.grouped and isinstance(granularity, PerGroup):
        row["group_size"] = granularity.size
    if kind.word == "W4A16_AWQ":
        row |= {"has_zero_point": False, "pre_quant_scale": False}
    return row
