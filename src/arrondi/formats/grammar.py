"""The text form of schemes: a preset's name, or `w=int4/g128/asym,a=int8/token`.

Owns: `parse_scheme` and `parse_activations`. The inverse is `str` of a scheme.
"""

from __future__ import annotations

import re
from typing import Any, cast

from arrondi.arguments import said
from arrondi.errors import SchemeError, unknown
from arrondi.formats.format import Format, get_format
from arrondi.formats.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerFlat,
    PerGroup,
    PerRun,
    PerTensor,
    PerToken,
)
from arrondi.formats.hints import unknown_scheme
from arrondi.formats.presets import ALIASES, PRESETS
from arrondi.formats.scheme import ActivationScheme, Apart, Dynamic, LayerScheme, Scheme, Table, TableType, Turned

_EXAMPLE = "Example: w=int4/g128/asym,a=int8/token."
_SIZES = re.compile(r"g([0-9]{1,9})|b([0-9]{1,9})x([0-9]{1,9})|channel([0-9]{1,9})|run([0-9]{1,9})|flat([0-9]{1,9})")
_SPREAD = re.compile(r"h([1-9][0-9]{0,8})")
_STORED = re.compile(r"(s|o):(?:\((.*)\)|(float32|bfloat16|float16|e8m0))")
_TABLE = re.compile(r"t:(int8|float16|bfloat16|float32)(?::([0-9]{1,9}|all))?")
_APART = re.compile(r"(columns|elements):([0-9]{1,10})(?::(float32|bfloat16|float16))?")
_TURNED = re.compile(r"rht([0-9]{1,7})(?::([0-9]{1,10}|sides))?")
_OUTLIERS = re.compile(r"outliers:([0-9]{1,9}(?:\.[0-9]{1,17})?(?:e[+-]?[0-9]{1,3})?)")
_WORDS: dict[str, dict[str, Any]] = {
    "channel": {"granularity": PerChannel()}, "tensor": {"granularity": PerTensor()}, "token": {"granularity": PerToken()},
    "sym": {"zero_point": "none"}, "asym": {"zero_point": "integer"}, "offset": {"zero_point": "float"},
    "float32": {"scale": "float32"}, "bfloat16": {"scale": "bfloat16"}, "float16": {"scale": "float16"}, "e8m0": {"scale": "e8m0"},
    "signed": {"signed": True}, "unsigned": {"signed": False},
}  # fmt: skip
_TIMES: dict[str, Dynamic] = {"dynamic": True, "static": False, "local": "local"}


def parse_scheme(text: str) -> LayerScheme:
    """A preset's name, in any case, or the compact grammar.

    The grammar is `w=FORMAT/PART/…` for weights and optionally, after commas, `a=…` for inputs, `o=…` for outputs and
    `kv=…` for the key/value cache. A part is

        g128, b128x128, channel (channel1: of axis 1), tensor, token     granularity
        run256                                                           the same: elements that follow each other in memory
        sym, asym, offset                                                zero point
        float32, bfloat16, float16, e8m0 or s:(SCHEME)                   storage of the scales
        o:float16 or o:(SCHEME)                                          storage of the offsets
        signed, unsigned                                                 whether scales may be negative
        t:int8, t:float16:16, t:float32:all                              tables of lut2 … lut8: stored type, rows that share one
        columns:8:float16, elements:1234                                 how many are kept apart, and their stored type
        rht128, rht128:7, rht128:sides                                   both sides turned by signs (of that seed, or stored) and Hadamard matrices
        dynamic, static, local                                           of a, o and kv: when the scales are known
        outliers:6                                                       of a: features that reach it are not rounded
        h4096                                                            of a: Hadamard transforms of 4096 channels come first

    >>> str(parse_scheme("w4a16")), str(parse_scheme("w=int3/g64/asym,a=int8/token/dynamic"))
    ('w=int4/g128', 'w=int3/g64/asym,a=int8/token')

    Raises:
        SchemeError: neither a preset nor the grammar; the message names the nearest preset.
    """
    if not isinstance(text, str):
        raise SchemeError(f"A scheme is said by a word such as 'W4A16', got {said(text)}. {_EXAMPLE}")
    name = text.strip().upper().replace("-", "_")
    name = ALIASES.get(name, name)
    if name in PRESETS:
        return PRESETS[name]
    if "=" not in text.partition(",")[0]:
        raise unknown_scheme(text)
    items = [_item(item, text) for item in _split(text, ",")]
    parts = dict(items)
    if "w" not in parts or parts.keys() - {"w", "a", "o", "kv"} or len(parts) < len(items):
        raise SchemeError(f"A scheme has 'w=…' and optionally 'a=…', 'o=…' and 'kv=…', got {text!r}. {_EXAMPLE}")
    weights, when, spread = _tensor(parts["w"], PerChannel(), text)
    if when is not True or spread:
        raise SchemeError(f"Weights have no {parts['w'].rpartition('/')[2]!r} scales, got {text!r}. Say it of 'a'.")
    inputs, outputs, kv = (_activations(parts[key], text) if key in parts else None for key in ("a", "o", "kv"))
    if (outputs and outputs.spread) or (kv and kv.spread):
        raise SchemeError(f"Only inputs go through Hadamard transforms, got {text!r}. Say it of 'a'.")
    return LayerScheme(weights, inputs, outputs, kv)


def parse_activations(text: str) -> ActivationScheme:
    """The scheme of inputs alone, without `a=`; the scales follow each input.

    >>> parse_activations("int8/g128").scheme.granularity
    PerGroup(size=128)

    Raises:
        SchemeError: not in the grammar of `parse_scheme`, or it asks for static scales.
    """
    if not text.strip() or "," in text or "=" in text:
        raise SchemeError(f"Activations are written as FORMAT/PART/…, got {text!r}. Example: int8/g128.")
    scheme, dynamic, spread = _tensor(text.strip().lower(), PerToken(), text)
    if dynamic is not True or spread:
        raise SchemeError(
            f"Scales of activations follow each input here, got {text!r}. Drop {text.rpartition('/')[2]!r}."
        )
    return ActivationScheme(scheme)


def _activations(part: str, text: str) -> ActivationScheme:
    """The scheme of inputs, outputs or a cache."""
    kept = [match for word in _split(part, "/") if (match := _OUTLIERS.fullmatch(word.strip()))]
    rest = "/".join(word for word in _split(part, "/") if not _OUTLIERS.fullmatch(word.strip()))
    if len(kept) > 1:
        raise SchemeError(f"'outliers' is said twice in scheme {text!r}. Leave one out.")
    return ActivationScheme(*_tensor(rest, PerToken(), text), float(kept[0][1]) if kept else None)


def _item(item: str, text: str) -> tuple[str, str]:
    key, _, value = item.strip().partition("=")
    if not value.strip():
        raise SchemeError(f"Cannot read {item.strip()!r} in scheme {text!r}. {_EXAMPLE}")
    return key.strip().lower(), value.strip().lower()


def _split(text: str, mark: str) -> list[str]:
    """The pieces between marks that no parenthesis encloses."""
    pieces, depth = [""], 0
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == mark and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return pieces


def _tensor(text: str, granularity: Granularity, whole: str) -> tuple[Scheme, Dynamic, int]:
    head, *parts = (part.strip() for part in _split(text, "/"))
    dynamic: Dynamic = True
    spread = 0
    found: dict[str, Any] = {"format": _format(head, whole), "granularity": granularity}
    said: dict[str, str] = {}
    for part in parts:
        kind = _kind(part)
        if kind in said:
            raise SchemeError(f"{said[kind]!r} and {part!r} contradict each other in scheme {whole!r}. Leave one out.")
        said[kind] = part
        if match := _SIZES.fullmatch(part):
            found["granularity"] = _granularity(*match.groups())
        elif match := _STORED.fullmatch(part):
            key = {"s": "scale", "o": "offset"}[match[1]]
            found[key] = match[3] or _nested(match[2], whole)
        elif match := _TABLE.fullmatch(part):
            rows = 1 if match[2] is None else 0 if match[2] == "all" else int(match[2])
            found["table"] = Table(rows, cast(TableType, match[1]))
        elif match := _APART.fullmatch(part):
            found["apart"] = Apart(cast(Any, match[1]), int(match[2]), cast(Any, match[3] or "float32"))
        elif match := _TURNED.fullmatch(part):
            found["turned"] = Turned(int(match[1]), None if match[2] == "sides" else int(match[2] or 0))
        elif match := _SPREAD.fullmatch(part):
            spread = int(match[1])
        elif part in _TIMES:
            dynamic = _TIMES[part]
        elif part in _WORDS:
            found |= _WORDS[part]
        else:
            known = [*_WORDS, *_TIMES, "g128", "b128x128", "s:(fp8/tensor)", "o:float16", "rht128"]
            raise unknown(f"word in scheme {whole!r}:", part, known)
    return Scheme(**found), dynamic, spread


def _granularity(
    group: str | None, rows: str | None, columns: str, axis: str | None, run: str | None, flat: str
) -> Granularity:
    if group:
        return PerGroup(int(group))
    if rows:
        return PerBlock(int(rows), int(columns))
    if run:
        return PerRun(int(run))
    return PerChannel(int(axis)) if axis else PerFlat(int(flat))


def _format(head: str, whole: str) -> Format:
    try:
        return get_format(head)
    except SchemeError:
        preset = PRESETS.get(head.upper())
        if preset is None:
            raise
        raise SchemeError(
            f"{head.upper()} is a scheme, not a number format, got {whole!r}. Write {head.upper()} alone, or {preset}."
        ) from None


def _kind(part: str) -> str:
    """What a part of the grammar is about; two parts about one thing contradict each other."""
    if _SIZES.fullmatch(part):
        return "granularity"
    if match := _STORED.fullmatch(part):
        return {"s": "scale", "o": "offset"}[match[1]]
    if _TABLE.fullmatch(part) or _APART.fullmatch(part):
        return "table" if part.startswith("t:") else "apart"
    if _SPREAD.fullmatch(part) or _TURNED.fullmatch(part):
        return "spread" if part.startswith("h") else "turned"
    return "time" if part in _TIMES else next(iter(_WORDS.get(part, {part: None})))


def _nested(text: str, whole: str) -> Scheme:
    """The scheme of scales or offsets."""
    scheme, dynamic, spread = _tensor(text, PerChannel(), whole)
    if dynamic is not True or spread:
        raise SchemeError(f"'static' and 'local' are said of activations as a whole, got {whole!r}.")
    return scheme
