"""What the contract is tried on: architecture × spelling of names × scheme, all of it or a choice.

The choice takes every architecture once, one of each large kind twice, and every pair of spelling and scheme about equally often.
"""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from arrondi.formats import parse_scheme
from arrondi.pipeline import Recipe, Rule
from tests.zoo import ZOO, class_of

OTHER_INPUTS = ("t5", "whisper", "vit", "clip", "dinov2-swiglu")
"""They do not run on token ids alone, so they have files of their own."""
ONE_SPELLING = ("qwen2.5-vl", "minimax-m3", "qianfan-ocr")
"""transformers itself does not find the tensors of the others by names with more or less in front."""

TWICE = ("llama", "gpt2", "bert", "mixtral")

SCHEMES = {
    "weights": ("w=int4/g32",),
    "dynamic": ("w=int8/channel,a=int8/token",),
    "static": ("w=int8/channel,a=int8/tensor/static",),
    "turned": ("w=tcq3-l8/channel/float16/rht128",),
    "mixed": ("w=int4/g32", "w=int8/channel,a=int8/token"),
}
"""Name → scheme of all layers, and the scheme of those that `_SECOND` matches."""
_SECOND = r"re:.*(\.1\.|(q|v|o|out|down|c)_proj$|query$|w2$|fc2$)"

SPELLINGS = ("usual", "other")
"""Names as transformers writes them; and without the prefix of the model inside, or with it where transformers writes none."""


@dataclass(frozen=True)
class Case:
    """One combination."""

    model: str
    spelling: str
    scheme: str

    def __str__(self) -> str:
        return f"{self.model}-{self.spelling}-{self.scheme}"

    @property
    def recipe(self) -> Recipe:
        """Its rules; rounding to nearest, because the contract is about what is written and not about how it is chosen."""
        first, *second = SCHEMES[self.scheme]
        rules = [Rule(parse_scheme(first)), *(Rule(parse_scheme(s), targets=(_SECOND,)) for s in second)]
        return Recipe(tuple(rules))

    @property
    def rounds_inputs(self) -> bool:
        """Whether some inputs are rounded."""
        return self.scheme not in ("weights", "turned")


def spellings_of(model: str) -> tuple[str, ...]:
    """The spellings that transformers reads."""
    return SPELLINGS[:1] if model in ONE_SPELLING else SPELLINGS


def all_cases() -> list[Case]:
    """The full product."""
    names = [n for n in ZOO if n not in OTHER_INPUTS]
    return [Case(n, s, scheme) for n in names for s in spellings_of(n) for scheme in SCHEMES]


def chosen_cases() -> list[Case]:
    """A choice from it: one walk over the pairs of spelling and scheme goes on from architecture to architecture."""
    pairs = itertools.cycle((SPELLINGS[(i + j) % 2], scheme) for j in range(2) for i, scheme in enumerate(SCHEMES))
    found = []
    for name in dict.fromkeys(case.model for case in all_cases()):
        for _ in range(2 if name in TWICE else 1):
            spelling, scheme = next(pairs)
            found.append(Case(name, spelling if spelling in spellings_of(name) else "usual", scheme))
    return found


def respelled(source: Path, out: Path, model: str) -> Path:
    """A copy of a model whose tensors have the other names."""
    shutil.copytree(source, out)
    prefix = f"{class_of(model).base_model_prefix}."
    tensors: dict[str, Any] = load_file(out / "model.safetensors")
    has = any(name.startswith(prefix) for name in tensors)
    renamed = {n.removeprefix(prefix) if has else prefix + n: t for n, t in tensors.items()}
    save_file(renamed, out / "model.safetensors", {"format": "pt"})
    return out
