"""The text form of schemes: a preset's name, or `w=int4/g128/asym,a=int8/token`.

Owns: `parse_scheme` and `parse_activations`. The inverse is `str` of a scheme.
"""

from __future__ import annotations

import re
from typing import Any

from arrondi.arguments import said
from arrondi.errors import SchemeError, unknown
from arrondi.formats.format import Format, get_format
from arrondi.formats.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerRun, PerTensor, PerToken
from arrondi.formats.hints import unknown_scheme
from arrondi.formats.presets import ALIASES, PRESETS
from arrondi.formats.scheme import ActivationScheme, Dynamic, LayerScheme, Scheme

_EXAMPLE = "Example: w=int4/g128/asym,a=int8/token."
_SIZES = re.compile(r"g([0-9]{1,9})|b([0-9]{1,9})x([0-9]{1,9})|channel([0-9]{1,9})|run([0-9]{1,9})")
_STORED = re.compile(r"(s|o):(?:\((.*)\)|(float32|bfloat16|float16|e8m0))")
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
        dynamic, static, local                                           of a, o and kv: when the scales are known

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
    weights, when = _tensor(parts["w"], PerChannel(), text)
    if when is not True:
        raise SchemeError(f"Weights have no {parts['w'].rpartition('/')[2]!r} scales, got {text!r}. Say it of 'a'.")
    inputs, outputs, kv = (
        ActivationScheme(*_tensor(parts[key], PerToken(), text)) if key in parts else None for key in ("a", "o", "kv")
    )
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
    scheme, dynamic = _tensor(text.strip().lower(), PerToken(), text)
    if dynamic is not True:
        raise SchemeError(f"Scales of activations follow each input here, got {text!r}. Drop 'static' or 'local'.")
    return ActivationScheme(scheme)


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


def _tensor(text: str, granularity: Granularity, whole: str) -> tuple[Scheme, Dynamic]:
    head, *parts = (part.strip() for part in _split(text, "/"))
    dynamic: Dynamic = True
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
        elif part in _TIMES:
            dynamic = _TIMES[part]
        elif part in _WORDS:
            found |= _WORDS[part]
        else:
            known = [*_WORDS, *_TIMES, "g128", "b128x128", "s:(fp8/tensor)", "o:float16"]
            raise unknown(f"word in scheme {whole!r}:", part, known)
    return Scheme(**found), dynamic


def _granularity(group: str | None, rows: str | None, columns: str, axis: str | None, run: str) -> Granularity:
    if group:
        return PerGroup(int(group))
    if rows:
        return PerBlock(int(rows), int(columns))
    return PerChannel(int(axis)) if axis else PerRun(int(run))


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
    return "time" if part in _TIMES else next(iter(_WORDS.get(part, {part: None})))


def _nested(text: str, whole: str) -> Scheme:
    """The scheme of scales or offsets."""
    scheme, dynamic = _tensor(text, PerChannel(), whole)
    if dynamic is not True:
        raise SchemeError(f"'static' and 'local' are said of activations as a whole, got {whole!r}.")
    return scheme
