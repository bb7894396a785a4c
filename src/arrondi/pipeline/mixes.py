"""Mixes of block types: which type each tensor of a GGUF file gets under a name such as Q4_K_M.

Owns: the table `MIXES`, `mix_of` and `base_scheme`, and `type_in_mix`, a pure function of a tensor's name in GGUF and a few facts. Values of attention, the
second matrix of the MLP and the head get more bits, in some layers only; all else gets the type that gives the mix its name.

Source: the choices of llama.cpp's quantizer (MIT), so that files of one name have one size whoever made them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from arrondi.checkpoint.layouts.ggml import BLOCKS
from arrondi.errors import unknown
from arrondi.formats import LayerScheme


@dataclass(frozen=True)
class Facts:
    """What the choice looks at beside the name.

    Attributes:
        columns: of the matrix.
        layer, layers: which of how many tensors with the same role it is.
        tied: the table of words is the head, too.
        gqa: query heads for each head of keys and values.
        experts: of a layer; 0 without.
        stacked: it is a stack of experts.
        importance: something is known of its inputs.
        falcon: the architecture is Falcon, which has rules of its own.
        seventy: it is Llama's of 80 layers.
    """

    columns: int
    layer: int = 0
    layers: int = 1
    tied: bool = False
    gqa: int = 1
    experts: int = 0
    stacked: bool = False
    importance: bool = False
    falcon: bool = False
    seventy: bool = False

    @property
    def early(self) -> bool:
        """In the first eighth."""
        return self.layer < self.layers // 8

    @property
    def chosen(self) -> bool:
        """In the first or the last eighth, or every third between."""
        late = self.layer >= 7 * self.layers // 8
        return self.early or late or (self.layer - self.layers // 8) % 3 == 2


Choice = Callable[[Facts], str]


def _always(kind: str) -> Choice:
    return lambda facts: kind


def _where(test: Callable[[Facts], bool], kind: str, other: str = "") -> Choice:
    return lambda facts: kind if test(facts) else other


@dataclass(frozen=True)
class Mix:
    """A mix; "" stands for its base.

    Attributes:
        base: the type of all that nothing else is said of.
        values, down, output: of the values of attention (or queries, keys and values in one), the MLP's second matrix, attention's output.
        table: of the table of words, where it is no head.
        of_eight: of attention's output in models with eight experts.
        stacks: of stacks of experts.
    """

    base: str
    values: Choice = _always("")
    down: Choice = _always("")
    output: Choice = _always("")
    table: str = ""
    of_eight: str = ""
    stacks: str = ""


_CHOSEN_6: Final = _where(lambda f: f.chosen, "Q6_K")
_WIDE_5: Final = _where(lambda f: f.gqa >= 4, "Q5_K")
_BLIND_5: Final = _where(lambda f: f.early and not f.importance, "Q5_K")


def _down_of_3_m(f: Facts) -> str:
    if f.layer < f.layers // 16:
        return "Q5_K"
    return "Q4_K" if f.chosen or not f.falcon else ""


def _down_of_4_m(f: Facts) -> str:
    if not f.falcon:
        return "Q6_K" if f.chosen else ""
    return "Q6_K" if f.layer < f.layers // 16 else "Q5_K" if f.chosen else ""


MIXES: Final[Mapping[str, Mix]] = MappingProxyType({
    "Q2_K": Mix("Q2_K", _where(lambda f: f.gqa >= 4, "Q4_K", "Q3_K"), _always("Q3_K"), _where(lambda f: not f.falcon, "Q3_K"), of_eight="Q5_K"),
    "Q2_K_S": Mix("Q2_K", _where(lambda f: f.gqa >= 4, "Q4_K"), _where(lambda f: f.early, "Q4_K")),
    "Q3_K_S": Mix("Q3_K", of_eight="Q5_K"),
    "Q3_K_M": Mix(
        "Q3_K", _where(lambda f: f.layer < 2, "Q5_K", "Q4_K"), _down_of_3_m, _where(lambda f: not f.falcon, "Q4_K"), of_eight="Q5_K"
    ),
    "Q3_K_L": Mix("Q3_K", _always("Q5_K"), *2 * (_where(lambda f: f.falcon, "Q4_K", "Q5_K"),)),
    "Q4_0": Mix("Q4_0", down=_where(lambda f: f.early and f.importance, "Q4_1")),
    "Q4_1": Mix("Q4_1"),
    "Q4_K_S": Mix(
        "Q4_K", _where(lambda f: f.layer < 4, "Q5_K"), _where(lambda f: f.early and not f.falcon, "Q5_K"), of_eight="Q5_K"
    ),
    "Q4_K_M": Mix("Q4_K", _CHOSEN_6, _down_of_4_m, of_eight="Q5_K"),
    "Q5_0": Mix("Q5_0", down=_where(lambda f: f.early and f.importance, "Q5_1")),
    "Q5_1": Mix("Q5_1"),
    "Q5_K_S": Mix("Q5_K"),
    "Q5_K_M": Mix("Q5_K", _CHOSEN_6, _CHOSEN_6),
    "Q6_K": Mix("Q6_K"),
    "Q8_0": Mix("Q8_0"),
    "IQ4_NL": Mix("IQ4_NL", _WIDE_5, _BLIND_5, of_eight="Q5_K"),
    "IQ4_XS": Mix("IQ4_XS", _WIDE_5, _BLIND_5, of_eight="Q5_K"),
    "TQ2_0": Mix("TQ2_0", table="Q4_K"),
    "TQ1_0": Mix("TQ1_0", table="Q4_K"),
    "MXFP4_MOE": Mix("Q8_0", stacks="MXFP4"),
})  # fmt: skip
"""Every mix of types that are written here. Where a type has the same name, the mix is `mix:NAME`."""

_ALONE: Final = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL", "TQ2_0": "Q4_0", "TQ1_0": "Q4_0"}  # fmt: skip
"""What stands in for a type of blocks of 256 in rows that they do not divide."""

_ROLES: Final = (
    ("head", r"output\.weight"), ("table", r"(per_layer_)?token_embd\.weight"), ("values", r".*attn_(qkv|kv_b|v)\.weight"),
    ("keys", r".*attn_k\.weight"), ("output", r".*attn_output\.weight"), ("down", r".*ffn_down.*"),
)  # fmt: skip


def mix_of(word: object) -> str:
    """The mix that a word names, in any case; "" if it names none, or a type.

    >>> mix_of("q4-k-m"), mix_of("mix:Q2_K"), mix_of("Q2_K")
    ('Q4_K_M', 'Q2_K', '')

    Raises:
        SchemeError: `mix:` and no mix behind it.
    """
    if not isinstance(word, str):
        return ""
    front, _, name = word.strip().upper().replace("-", "_").rpartition(":")
    if front == "MIX" and name not in MIXES:
        raise unknown("mix", name, MIXES)
    return name if name in MIXES and (front == "MIX" or (not front and name not in BLOCKS)) else ""


def base_scheme(mix: str) -> LayerScheme:
    """The scheme of the type that gives a mix its name."""
    scheme = BLOCKS[MIXES[mix].base].scheme
    assert scheme is not None
    return LayerScheme(scheme)


def blocks_of(word: object, mix: str) -> str:
    """The type of blocks that a word or a mix asks for where its scheme does not tell: there are two types of three values; else ""."""
    name = MIXES[mix].base if mix else word.strip().upper().replace("-", "_") if isinstance(word, str) else ""
    return name if name in BLOCKS and BLOCKS[name].trits else ""


def check_names(mix: str, blocks: str) -> None:
    """Refuse a mix or a type of blocks that there is not; "" stands for none.

    Raises:
        SchemeError: it is unknown.
    """
    if mix and mix not in MIXES:
        raise unknown("mix", mix, MIXES)
    if blocks and blocks not in BLOCKS:
        raise unknown("type of blocks", blocks, BLOCKS)


def role_of(name: str) -> str:
    """What a tensor of that name in GGUF is for: a role of which mixes say something, or ""."""
    return next((role for role, pattern in _ROLES if re.fullmatch(pattern, name)), "")


def type_in_mix(mix: str, name: str, facts: Facts) -> str | None:
    """The type of a tensor.

    Args:
        mix: a name of `MIXES`.
        name: of the tensor in GGUF.
        facts: of it.

    Returns:
        a type whose blocks divide its rows; None where 32 columns do not, and the tensor stays.
    """
    found = _wanted(MIXES[mix], role_of(name), facts) or MIXES[mix].base
    if facts.columns % BLOCKS[found].elements:
        found = _ALONE.get(found, found)
    return None if facts.columns % BLOCKS[found].elements else found


def _wanted(mix: Mix, role: str, f: Facts) -> str:
    if role == "head" or (role == "table" and f.tied):
        eight = mix.base == "Q8_0" or f.falcon or f.columns % BLOCKS[mix.base].elements
        return "Q8_0" if eight else "Q6_K"
    if f.stacked and mix.stacks:
        return mix.stacks
    if role == "table":
        return mix.table
    if role == "values":
        found = mix.values(f) or mix.base
        if f.seventy and found in ("Q3_K", "Q4_K"):
            found = "Q5_K"
        return "Q8_0" if f.experts == 8 else found
    if role == "keys":
        return "Q8_0" if f.experts == 8 else ""
    if role == "down":
        return mix.down(f)
    if role == "output":
        return mix.of_eight if f.experts == 8 and not f.falcon else mix.output(f)
    return ""
