"""What the keys and values of attention become while a text grows: schemes of caches and the kinds that have a name.

Owns: `CacheScheme`, the table `KV_KINDS` and `parse_kv`. The text form, `str` of a scheme, is the grammar of tensors for keys and
for values, and two words: `k=uint2/b32x1/offset,v=uint2/g32/offset,window=128`; or `k=pca2,v=pca2,window=128,first=4` (see `arrondi.formats.spectral`).

Keys have the same few large channels in every token, values have none (Liu et al. 2024, arXiv:2402.02750). So few-bit keys share a
scale along the tokens (`b32x1`: 32 tokens of one channel), or are spread over the head by a Hadamard transform first (`rotate`),
and values share one along the channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, NamedTuple

from arrondi.arguments import check_fields
from arrondi.errors import SchemeError, unknown
from arrondi.formats.format import FORMATS
from arrondi.formats.grammar import parse_scheme
from arrondi.formats.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from arrondi.formats.scheme import PLAIN, ActivationScheme, Scheme
from arrondi.formats.spectral import SpectralCache, spectral_bits

BLOCK: Final = 32
"""Tokens whose codes lie together in memory."""
_BITS: Final = (2, 4, 8)
_STEP: Final = 16
"""Tokens of a block are a multiple of this."""
_EXAMPLE: Final = "Example: k=uint2/b32x1/offset,v=uint2/g32/offset,window=128."


@dataclass(frozen=True)
class CacheScheme:
    """What one layer's keys and values become.

    Attributes:
        keys: integers of 2, 4 or 8 bits; per token (`token`), per group of a token's channels (`g32`), per group of tokens of one
            channel (`b32x1`), or one stored scale (`tensor/static`).
        values: the same without groups of tokens.
        window: the newest tokens that stay as they are. Keys of groups of tokens are rounded `window` tokens at a time, when so
            many have come together; everything else is rounded token by token when it leaves the window.
        rotated: keys are multiplied by an orthonormal Hadamard matrix before they are rounded, and by its inverse when read.
    """

    keys: ActivationScheme
    values: ActivationScheme
    window: int = 0
    rotated: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        for name, part in (("keys", self.keys), ("values", self.values)):
            _check(name, part)
        if self.window < 0:
            raise SchemeError(f"The window of a cache holds 0 or more tokens, got window={self.window}.")
        group = self.key_tokens
        if group and (self.window < group or self.window % group):
            raise SchemeError(
                f"Keys of {group} tokens under one scale wait until they are complete, so the window must be a multiple of {group}, got window={self.window}. Use window={max(group, self.window // group * group)}."
            )

    @property
    def key_tokens(self) -> int:
        """Tokens of one channel that share a scale; 0 where keys are rounded token by token."""
        granularity = self.keys.scheme.granularity
        return granularity.rows if isinstance(granularity, PerBlock) else 0

    @property
    def static(self) -> bool:
        """Whether scales must be known before the text is."""
        return self.keys.dynamic is False or self.values.dynamic is False

    def refuse_width(self, width: int) -> str | None:
        """Why heads of this width cannot be rounded so, in one sentence; None if they can."""
        for name, part in (("Keys", self.keys), ("Values", self.values)):
            granularity = part.scheme.granularity
            size = granularity.size if isinstance(granularity, PerGroup) else 1
            if width % size:
                return f"{name} in groups of {size} channels need heads that are a multiple of {size} wide, and these have {width}. Use int8, or smaller groups: {self._narrower(width)}."
            if width % (8 // part.scheme.format.bits):
                return f"{name} of {part.scheme.format.bits} bits fill bytes only in heads that are a multiple of {8 // part.scheme.format.bits} wide, and these have {width}. Use int8."
        return None

    def _narrower(self, width: int) -> CacheScheme:
        """The same with the largest groups that heads of this width have."""

        def fitting(part: ActivationScheme) -> ActivationScheme:
            granularity = part.scheme.granularity
            if not isinstance(granularity, PerGroup):
                return part
            size = next(s for s in range(min(granularity.size, width), 0, -1) if width % s == 0)
            return replace(part, scheme=replace(part.scheme, granularity=PerGroup(size)))

        return replace(self, keys=fitting(self.keys), values=fitting(self.values))

    def __str__(self) -> str:
        parts = [f"k={self.keys}", f"v={self.values}"]
        parts += [f"window={self.window}"] if self.window else []
        parts += ["rotate"] if self.rotated else []
        return ",".join(parts)


def _check(name: str, part: ActivationScheme) -> None:
    scheme = part.scheme
    if (
        scheme.format.kind != "integer"
        or scheme.format.bits not in _BITS
        or scheme.format.levels != 2**scheme.format.bits
    ):
        raise SchemeError(
            f"The {name} of a cache are integers of 2, 4 or 8 bits, got {scheme.format}. Use uint2, uint4 or int8."
        )
    if (
        scheme.scale not in PLAIN
        or scheme.offset not in PLAIN
        or (scheme.zero_point == "float" and scheme.scale != scheme.offset)
    ):
        raise SchemeError(
            f"Scales and offsets of a cache are stored as float32, bfloat16 or float16, both in the same, got {scheme}. Example: uint4/g32/offset/float16/o:float16."
        )
    if scheme.zero_point == "integer":
        raise SchemeError(
            f"The {name} of a cache have no whole zero point, got {scheme}. Use 'offset' instead of 'asym'."
        )
    match scheme.granularity:
        case PerToken() | PerGroup():
            pass
        case PerTensor() if part.dynamic is False and scheme.symmetric:
            return
        case PerBlock(rows, 1) if name == "keys" and rows % _STEP == 0:
            pass
        case _:
            tokens = ", 'b32x1' (a multiple of 16 tokens)" if name == "keys" else ""
            raise SchemeError(
                f"The {name} of a cache share scales by 'token', 'g32'{tokens} or, symmetric and stored, 'tensor/static', got {part}."
            )
    if part.dynamic is not True:
        raise SchemeError(
            f"Stored scales of a cache are one for all {name}, got {part}. Use 'tensor/static', or drop '{str(part).rpartition('/')[2]}'."
        )


AnyCache = CacheScheme | SpectralCache
"""What keys and values may become."""


class Kind(NamedTuple):
    """A cache that has a name; `scheme` is None where nothing is rounded."""

    scheme: AnyCache | None
    source: str
    about: str


def _part(bits: int, granularity: PerToken | PerGroup | PerBlock) -> ActivationScheme:
    if bits == 8:
        return ActivationScheme(Scheme(FORMATS["int8"], granularity, scale="float16"))
    return ActivationScheme(Scheme(FORMATS[f"uint{bits}"], granularity, "float", "float16", "float16"))


_STATIC: Final = ActivationScheme(Scheme(FORMATS["int8"], PerTensor()), dynamic=False)
_TOKENS, _CHANNELS = PerBlock(32, 1), PerGroup(32)
_PCA: Final = "after KVQuant, Hooper et al. 2024, arXiv:2401.18079"
_KIVI: Final = "Liu et al. 2024, arXiv:2402.02750"

KV_KINDS: Final[Mapping[str, Kind]] = MappingProxyType({
    "full": Kind(None, "", "as the model computes them"),
    "int8": Kind(CacheScheme(_part(8, PerToken()), _part(8, PerToken())), "Jacob et al. 2018, arXiv:1712.05877", "a scale for each token and head"),
    "int4": Kind(CacheScheme(_part(4, _CHANNELS), _part(4, _CHANNELS)), "Sheng et al. 2023, arXiv:2303.06865", "groups of 32 channels of each token and head"),
    "int4-rotated": Kind(CacheScheme(_part(4, _CHANNELS), _part(4, _CHANNELS), rotated=True), "Ashkboos et al. 2024, arXiv:2404.00456", "the same, keys after a Hadamard transform"),
    "kivi4": Kind(CacheScheme(_part(4, _TOKENS), _part(4, _CHANNELS), window=128), _KIVI, "keys by channel over 32 tokens, values by token; the newest 128 tokens stay"),
    "kivi2": Kind(CacheScheme(_part(2, _TOKENS), _part(2, _CHANNELS), window=128), _KIVI, "the same in 2 bits"),
    "kivi-k4v2": Kind(CacheScheme(_part(4, _TOKENS), _part(2, _CHANNELS), window=128), _KIVI, "keys in 4 bits, values, which bear more, in 2"),
    "int8-static": Kind(CacheScheme(_STATIC, _STATIC), "LightSeq, Wang et al. 2022, arXiv:2110.05722", "one clip value of each layer for keys and for values, from calibration"),
    "pca2": Kind(SpectralCache(2, 2), _PCA, "2 bits along principal directions from calibration, keys without their rotary embedding; 4 first and 128 newest tokens stay"),
    "pca3": Kind(SpectralCache(3, 3), _PCA, "the same in 3 bits"),
})  # fmt: skip
"""Every cache that has a name."""

_RANGE: Final = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")


def parse_kv(text: str) -> tuple[AnyCache | None, dict[int, AnyCache | None]]:
    """A kind's name or the grammar, and after semicolons other kinds for some layers.

    >>> default, layers = parse_kv("kivi2;0-1,5=int8;7=full")
    >>> str(default), sorted(layers), layers[7]
    ('k=uint2/b32x1/offset/float16/o:float16,v=uint2/g32/offset/float16/o:float16,window=128', [0, 1, 5, 7], None)

    Returns:
        the scheme of all layers, None for keys and values as they are, and the schemes of single ones.

    Raises:
        SchemeError: neither; the message has the nearest name.
    """
    if not isinstance(text, str):
        raise SchemeError(
            f"The key/value cache is named by a word such as 'int8', got {type(text).__name__}. {_EXAMPLE}"
        )
    head, *rest = text.split(";")
    layers: dict[int, AnyCache | None] = {}
    for item in rest:
        named, _, kind = item.partition("=")
        for word in named.split(","):
            match = _RANGE.fullmatch(word.strip())
            if match is None or not kind.strip():
                raise SchemeError(
                    f"Cannot read {item.strip()!r} of the cache {text!r}. Example: kivi2;0-1,5=int8;7=full."
                )
            first = int(match[1])
            layers |= dict.fromkeys(range(first, int(match[2] or first) + 1), _one(kind))
    return _one(head), layers


def _one(text: str) -> AnyCache | None:
    word = text.strip().lower()
    if word == "none":
        return None
    if word in KV_KINDS:
        return KV_KINDS[word].scheme
    if "=" not in word:
        raise unknown("kind of key/value cache", text.strip(), KV_KINDS)
    found: dict[str, str] = {}
    for item in word.split(","):
        key, sign, value = (part.strip() for part in item.partition("="))
        if (
            key in found
            or key not in ("k", "v", "window", "rotate", "first")
            or bool(sign and value) == (key == "rotate")
        ):
            raise SchemeError(f"Cannot read {item.strip()!r} of the cache {text!r}. {_EXAMPLE}")
        found[key] = value
    window, first = found.get("window", "0"), found.get("first", "0")
    if not {"k", "v"} <= found.keys() or not window.isdecimal():
        raise SchemeError(
            f"A cache has 'k=…' for keys, 'v=…' for values and optionally 'window=…' and 'rotate', got {text!r}. {_EXAMPLE}"
        )
    bits = [spectral_bits(found[key]) for key in ("k", "v")]
    if bits[0] is not None and bits[1] is not None and first.isdecimal() and "rotate" not in found:
        return SpectralCache(bits[0], bits[1], int(window), int(first))
    if bits != [None, None] or "first" in found:
        raise SchemeError(
            f"Directions are found for keys and values together, got {text!r}. Example: k=pca2,v=pca2,window=128,first=4."
        )
    keys, values = (_tensor(found[key]) for key in ("k", "v"))
    return CacheScheme(keys, values, int(window), "rotate" in found)


def _tensor(text: str) -> ActivationScheme:
    """A tensor in the grammar of schemes; offsets are stored as scales are unless something else is said."""
    found = parse_scheme(f"w=int8,kv={text}").kv
    assert found is not None
    scheme = found.scheme
    if scheme.zero_point == "float" and "o:" not in text and scheme.scale in ("bfloat16", "float16"):
        found = replace(found, scheme=replace(scheme, offset=scheme.scale))
    return found


def as_cache(kv: ActivationScheme) -> CacheScheme:
    """The cache that a layer's scheme means by `kv=…`: keys and values alike.

    Raises:
        SchemeError: values cannot be rounded so.
    """
    if isinstance(kv.scheme.granularity, PerChannel):
        kv = replace(kv, scheme=replace(kv.scheme, granularity=PerToken()))
    return CacheScheme(kv, kv)


AnyKind = str | CacheScheme | SpectralCache | ActivationScheme
"""Whatever says what keys and values become."""


def schemes_of(kind: AnyKind) -> tuple[AnyCache | None, dict[int, AnyCache | None]]:
    """The scheme of all layers, and those of single ones; see `parse_kv`."""
    if isinstance(kind, CacheScheme | SpectralCache):
        return kind, {}
    return (as_cache(kind), {}) if isinstance(kind, ActivationScheme) else parse_kv(kind)
