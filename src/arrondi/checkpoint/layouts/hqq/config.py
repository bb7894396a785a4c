"""The `quantization_config` of HQQ, as transformers writes and reads it.

Owns: `config` (what is written) and `read_config`, which gives the size of groups by the tag of a module. The stored layers describe
themselves, so it is held to be well formed and else not needed.

Source: transformers 5.24, `HqqConfig` and `integrations/hqq.py`; hqq 0.2.8, `core/quantize.py` (`hqq_base_quant_config`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from arrondi.checkpoint.layouts.claims import Claims
from arrondi.checkpoint.layouts.hqq.storage import facts_of
from arrondi.checkpoint.layouts.layout import ModelFacts, Placed
from arrondi.errors import FileFormatError
from arrondi.formats import PerGroup

_PARTS: Final = frozenset({"weight_quant_params", "scale_quant_params", "zero_quant_params", "offload_meta"})
_BITS: Final = (8, 6, 5, 4, 3, 2, 1.58, 1)


def tag_of(path: str) -> str:
    """The part of a module's path by which configs name it in every block: no numbers, no "model", no "layers"."""
    return ".".join(word for word in path.split(".") if word not in ("model", "layers") and not word.isnumeric())


def config(placed: list[Placed], kept: list[str], facts: ModelFacts = ModelFacts()) -> dict[str, Any]:
    """The `quantization_config` of config.json: one entry for all, or one by the tag of the modules where they differ."""
    entries = [_entry(p) for p in placed]
    base = entries[_commonest([str(e) for e in entries])]
    tags: dict[str, dict[str, Any]] = {}
    for p, entry in zip(placed, entries, strict=True):
        tags.setdefault(tag_of(p.path), entry)
    return {
        "quant_method": "hqq",
        "quant_config": base if all(entry == base for entry in entries) else tags,
        "skip_modules": sorted({tag_of(k) for k in kept} - set(tags)),
    }


def _entry(placed: Placed) -> dict[str, Any]:
    facts = facts_of(placed)
    size = facts.group_size if isinstance(placed.scheme.weights.granularity, PerGroup) else None
    return {
        "weight_quant_params": {
            "nbits": facts.nbits if facts.nbits % 1 else int(facts.nbits),
            "channel_wise": True,
            "group_size": size,
            "optimize": bool(facts.optimize),
            "round_zero": bool(facts.round_zero),
            "axis": facts.axis,
            "view_as_float": bool(facts.view_as_float),
        },
        "scale_quant_params": None,
        "zero_quant_params": None,
        "offload_meta": False,
    }


def _commonest(words: list[str]) -> int:
    return words.index(Counter(words).most_common(1)[0][0])


def read_config(config: object) -> dict[str, int | None]:
    """Check a `quantization_config` of HQQ: the size of groups by tag, "" for all; None: whole rows.

    Raises:
        FileFormatError: a key that is not known, or a value that cannot be.
    """
    if config is None:
        return {}
    claims = Claims(config, "quantization_config")
    claims.only("quant_method", "hqq")
    claims.words("skip_modules")  # the stored tensors say it
    said = claims.table("quant_config")
    claims.done()
    entries = {"": said} if _PARTS & said.keys() else said
    return {str(tag): _size(entry, tag) for tag, entry in entries.items() if entry is not None}


def _size(entry: object, tag: str) -> int | None:
    where = f"quantization_config.quant_config{f'.{tag[:60]}' if tag else ''}"
    claims = Claims(entry, where)
    params = Claims(claims.table("weight_quant_params"), f"{where}.weight_quant_params")
    for key in ("scale_quant_params", "zero_quant_params"):
        claims.only(key)
    claims.flag("offload_meta", False)
    claims.done()
    if params.real("nbits", 4.0) not in _BITS:
        raise FileFormatError(f"{where}.weight_quant_params.nbits should be one of {', '.join(map(str, _BITS))}.")
    params.number("axis", 1, [0, 1])
    params.only("channel_wise", True)
    for key in ("optimize", "round_zero", "view_as_float"):
        params.flag(key, False)
    size = params.number("group_size", 0)
    params.done()
    return size or None


def is_channel(path: str, sizes: Mapping[str, int | None]) -> bool:
    """Whether a config means whole rows by the groups of a layer, which are so long."""
    return sizes.get(tag_of(path), sizes.get("")) is None
