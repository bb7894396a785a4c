"""Recipes: the user's rules, and the selectors in them.

Owns: `Rule`, `Recipe` and `matches`. A rule says which weights become what by which method, or which are rewritten or repaired how.
Of several rules that round a weight the last one wins; rewrites and repairs are all done, in their order. Selectors follow compressed-tensors: a class name, an exact module or tensor name, or `re:` and a pattern matched from the start.
`Linear` stands for every weight that multiplies activations: linears, Conv1D, fused experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from arrondi.arguments import check_fields, said
from arrondi.errors import FileFormatError, SchemeError
from arrondi.formats import FORMATS, LayerScheme, Scheme
from arrondi.formats.kv import as_cache, parse_kv
from arrondi.pipeline.mixes import base_scheme, blocks_of, check_names, mix_of
from arrondi.pipeline.steps import check_fallback, check_scheme, check_step, get_step, step_of_kind
from arrondi.tensor.checks import layer_scheme_of


@dataclass(frozen=True)
class Rule:
    """What is done to weights that match `targets`.

    Attributes:
        scheme: what a round step makes of them, as a value or a word; None leaves them alone. Rewrites and repairs have none. A
            method that makes something else of it (a learned codebook of as many bits) says so here.
        method: name of a step; "" is the usual one of the scheme, see `usual_method`.
        targets: selectors.
        options: of the step.
        fallback: round step where nothing is known of a weight's inputs; "" is the method's own choice.
        mix: a name of `arrondi.pipeline.mixes.MIXES`, by which every weight gets a type of its own; a word for the scheme may name one.
            The scheme is that of its base.
        blocks: a type of GGUF's blocks of which another has the same scheme; "": the scheme tells.
    """

    scheme: LayerScheme | None
    method: str = ""
    targets: tuple[str, ...] = ("Linear",)
    options: Mapping[str, Any] = field(default_factory=dict)
    fallback: str = ""
    mix: str = ""
    blocks: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", _selectors(self.targets))
        word = self.scheme
        if mix := mix_of(word):
            object.__setattr__(self, "mix", mix)
            object.__setattr__(self, "scheme", base_scheme(mix))
        if self.scheme is not None:
            object.__setattr__(self, "scheme", layer_scheme_of(self.scheme))
        check_fields(self)
        check_names(self.mix, self.blocks)
        if not self.blocks:
            object.__setattr__(self, "blocks", blocks_of(word, self.mix))
        if not self.method:
            object.__setattr__(self, "method", usual_method(self.scheme))
        check_step(self.method, self.options)
        if self.fallback:
            check_fallback(self.method, self.fallback)
        if self.scheme is None:
            return
        step = get_step(self.method)
        if step.kind != "round":
            raise SchemeError(
                f"{self.method} is a {step.kind} and rounds nothing, so it takes no scheme. Name it as a {step.kind}, beside a method that rounds."
            )
        if self.scheme.outputs is not None:
            raise SchemeError(f"Scheme {self.scheme} rounds outputs, which is not done yet. Drop 'o'.")
        check_scheme(self.method, self.scheme, self.options)
        object.__setattr__(self, "scheme", replace(self.scheme, weights=step.makes(self.scheme.weights, self.options)))
        if self.fallback:
            check_scheme(self.fallback, self.scheme, {})


@dataclass(frozen=True)
class Recipe:
    """Rules in order, and what stays as it is whatever the rules say. `ignore=None` means the output head.

    With `all_experts`, experts that few calibration tokens reach are calibrated on all tokens of their block.
    `kv` is what keys and values become while the model runs (`arrondi.KV_KINDS`); the `kv=…` of a rule's scheme says the same.
    Rewrites and repairs that come with a method, and that no rule names, are put before and after its rule.
    """

    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] | None = None
    all_experts: bool = False
    kv: str | None = None

    def __post_init__(self) -> None:
        rules = self.rules if isinstance(self.rules, list | tuple) else (self.rules,)
        strange = [r for r in rules if not isinstance(r, Rule)]
        if strange:
            raise SchemeError(
                f"A recipe is made of rules, got {said(strange[0])}. Each says a scheme and which weights get it."
            )
        if not isinstance(self.kv, str | None):
            raise SchemeError(f"kv is a word such as int8, got {said(self.kv)}.")
        said_of_kv = {str(as_cache(r.scheme.kv)) for r in rules if r.scheme is not None and r.scheme.kv is not None}
        said_of_kv |= set() if self.kv is None else {self.kv}
        if len(said_of_kv) > 1:
            raise SchemeError(
                f"Keys and values become one thing, and the recipe says {' and '.join(sorted(said_of_kv))}. Say it once; layers of another kind follow a semicolon: 'kivi2;0-1=int8'."
            )
        plain = [r if r.scheme is None else replace(r, scheme=replace(r.scheme, kv=None)) for r in rules]
        object.__setattr__(self, "rules", _completed(plain))
        for kind in said_of_kv:
            parse_kv(kind)
            object.__setattr__(self, "kv", None if kind.strip().lower() in ("none", "full") else kind)
        if self.ignore is not None:
            object.__setattr__(self, "ignore", _selectors(self.ignore))
        check_fields(self)

    @classmethod
    def simple(
        cls,
        scheme: str | Scheme | LayerScheme,
        method: str | None = None,
        *,
        group_size: int | None = None,
        targets: Iterable[str] = ("Linear",),
        ignore: Iterable[str] | None = None,
        options: Mapping[str, Any] | None = None,
        rewrites: Iterable[str] = (),
        repairs: Iterable[str] = (),
        all_experts: bool = False,
        embeddings: str | None = None,
    ) -> Recipe:
        """One rule that rounds, as the command line gives it, and what is done before and after it.

        Args:
            scheme: a word, a scheme of weights, or one of a layer; or a mix of types such as Q4_K_M.
            method: name of a round step; None: the usual one of the scheme, see `usual_method`.
            group_size: another than the scheme's; -1 is a whole row.
            targets, ignore: selectors.
            options: of the method; of another step under `STEP.OPTION`.
            rewrites, repairs: names of steps.
            all_experts: see the class.
            embeddings: what the table of words becomes: `int8/row`, `int4/g64`; None: it stays, but of a mix, which says so of it and
                of the head. A head that is tied to it has the
                same codes, which are then chosen by gptq if the method looks at second moments; all else is rounded to nearest.
        """
        if not isinstance(method, str | None):
            raise SchemeError(f"The method is a word, got {said(method)}.")
        layer = _layer_scheme(scheme, group_size)
        step = get_step(usual_method(None if mix_of(layer) else layer_scheme_of(layer)) if method is None else method)
        picked, own = _selectors(targets), _by_step(options or {})
        rounding = Rule(layer, step.name, picked, {**own.pop("", {}), **own.pop(step.name, {})})
        before = [step_of_kind("rewrite", name) for name in _selectors(rewrites)]
        after = [step_of_kind("repair", name) for name in _selectors(repairs)]
        twice = next((name for name in (*before, *after) if (*before, *after).count(name) > 1), None)
        if twice is not None:
            raise SchemeError(f"The {get_step(twice).kind} {twice} is named twice. Leave one out.")
        before += [name for name in step.before if name not in before]
        after = [name for name in step.after if name not in after] + after
        rules = [
            *(Rule(None, name, picked, own.pop(name, {})) for name in before),
            rounding,
            *(Rule(None, name, picked, own.pop(name, {})) for name in after),
        ]
        if embeddings is not None:
            rules.append(_of_tables(table_scheme(embeddings), step.needs))
        elif mix_of(scheme):
            rules.append(_of_tables(scheme, step.needs))
            ignore = () if ignore is None else ignore
        if own:
            stray = next(iter(own))
            raise SchemeError(
                f"Option {stray}.{next(iter(own[stray]))} is of the step {get_step(stray).name}, which is not part of this recipe. Leave it out."
            )
        return cls(tuple(rules), None if ignore is None else _selectors(ignore), all_experts)

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """A recipe file: JSON with `rules` (each with scheme, method, targets, group_size, options, fallback) and `ignore`.

        Rules whose method rewrites or repairs have no scheme.

        Raises:
            FileFormatError: not there, not JSON, a key that is unknown, missing or there twice.
            SchemeError: a scheme, method or option that does not exist.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
            _known(document, {"rules", "ignore", "all_experts", "kv"}, "the recipe")
            rules = tuple(_rule(entry, i + 1) for i, entry in enumerate(document["rules"]))
            if not rules:
                raise ValueError("it has no rule")
            everywhere = document.get("all_experts", False)
            if not isinstance(everywhere, bool):
                raise TypeError(f"all_experts is {everywhere!r}, not true or false")
            kv = document.get("kv")
            if not isinstance(kv, str | None):
                raise TypeError(f"kv is {kv!r}, not a word")
            ignore = None if document.get("ignore") is None else _words(document["ignore"])
        except SchemeError:
            raise
        except KeyError as error:
            raise FileFormatError(f"{path}: not a recipe (it lacks {error}). Example: {_EXAMPLE}") from error
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            raise FileFormatError(f"{path}: {reason}. Give a recipe file as JSON. Example: {_EXAMPLE}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise FileFormatError(f"{path}: not a recipe ({error}). Example: {_EXAMPLE}") from error
        return cls(rules, ignore, everywhere, kv)

    def with_kv(self, kv: str) -> Recipe:
        """The same, with what keys and values become.

        Raises:
            SchemeError: there is no such kind, or the recipe says another.
        """
        if self.kv is not None and parse_kv(self.kv) != parse_kv(kv):
            raise SchemeError(f"The recipe says kv={self.kv}, and --kv says {kv}. Leave one of them out.")
        return replace(self, kv=kv)

    def to_dict(self) -> dict[str, Any]:
        """What `report.json` and the run's key record."""
        return {
            "rules": [
                {
                    "scheme": None if r.scheme is None else str(r.scheme),
                    "method": r.method,
                    "targets": list(r.targets),
                    "options": dict(r.options),
                    **({"fallback": r.fallback} if r.fallback else {}),
                    **({"mix": r.mix} if r.mix else {}),
                    **({"blocks": r.blocks} if r.blocks else {}),
                }
                for r in self.rules
            ],
            "ignore": None if self.ignore is None else list(self.ignore),
            **({"all_experts": True} if self.all_experts else {}),
            **({"kv": self.kv} if self.kv else {}),
        }


_EXAMPLE = '{"rules": [{"scheme": "W4A16", "method": "gptq"}, {"scheme": "W8A16", "targets": ["re:.*down_proj"]}]}'


def _completed(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules, with those that come with a method and that nobody named."""
    named = {rule.method for rule in rules}
    found: list[Rule] = []
    for rule in rules:
        step = get_step(rule.method)
        found += [Rule(None, name, rule.targets) for name in step.before if name not in named and rule.scheme]
        found.append(rule)
        found += [Rule(None, name, rule.targets) for name in step.after if name not in named and rule.scheme]
    return tuple(found)


def _by_step(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Step → its options; those without a step under "".

    Raises:
        SchemeError: there is no such step.
    """
    found: dict[str, dict[str, Any]] = {}
    for option, value in options.items():
        step, _, name = str(option).rpartition(".")
        found.setdefault(get_step(step).name if step else "", {})[name] = value
    return found


def _layer_scheme(scheme: str | Scheme | LayerScheme, group_size: int | None = None) -> Any:
    """A layer's scheme from a word or a value, with another group size if there is one; a word that says more than its scheme as it is."""
    if mix := mix_of(scheme):
        if group_size is not None:
            raise SchemeError(f"The block sizes of {mix} are those of its types. Drop --group-size.")
        return scheme
    if blocks_of(scheme, "") and group_size is None:
        return scheme
    layer = layer_scheme_of(scheme)
    return layer if group_size is None else layer.with_group_size(group_size)


def _of_tables(scheme: Any, needs: Iterable[str]) -> Rule:
    """The rule for tables beside a method with these needs."""
    looks = any("moment" in need for need in needs)
    try:
        return Rule(scheme, "gptq" if looks else "rtn", ("Embedding",))
    except SchemeError:  # gptq does not make it
        return Rule(scheme, "rtn", ("Embedding",))


def usual_method(scheme: LayerScheme | None) -> str:
    """The method where none is named: rtn, or for a trellis the search with what calibration there is, which without any is the same."""
    trellis = None if scheme is None else scheme.weights.format.trellis
    return "rtn" if trellis is None else "trellis" if trellis.ring == "rows" else "trellis-yaqa"


def table_scheme(text: str) -> LayerScheme:
    """A scheme of weights from its word, its grammar, or `int8/row`."""
    words = text.strip().lower().split("/")
    short = "=" not in text and words[0] in FORMATS
    return layer_scheme_of("w=" + "/".join("channel" if w == "row" else w for w in words) if short else text)


def _rule(entry: Any, number: int) -> Rule:
    """One rule of a recipe file."""
    _known(entry, {"scheme", "method", "targets", "group_size", "options", "fallback"}, f"rule {number}")
    method, options, fallback = entry.get("method", ""), entry.get("options", {}), entry.get("fallback", "")
    if not isinstance(method, str) or not isinstance(options, dict) or not isinstance(fallback, str):
        raise TypeError(
            f"rule {number} has the method {method!r}, the options {options!r} and the fallback {fallback!r}"
        )
    targets = _words(entry.get("targets", "Linear"))
    if method and get_step(method).kind != "round":
        if entry.keys() & {"scheme", "group_size"}:
            raise ValueError(f"rule {number} has a scheme or a group_size, and {method} rounds nothing")
        return Rule(None, method.lower(), targets, options, fallback)
    scheme, group_size = entry["scheme"], entry.get("group_size")
    if scheme is None and entry.keys() & {"method", "group_size", "options", "fallback"}:
        raise ValueError(f"rule {number} leaves weights alone and has {sorted(entry.keys() - {'scheme', 'targets'})}")
    if not isinstance(scheme, (str, type(None))):
        raise TypeError(f"the scheme of rule {number} is {scheme!r}, not a word")
    if group_size is not None and type(group_size) is not int:
        raise TypeError(f"the group_size of rule {number} is {group_size!r}, not a whole number")
    layer = None if scheme is None else _layer_scheme(scheme, group_size)
    return Rule(layer, method.lower(), targets, options, fallback.lower())


def _known(entry: Any, keys: set[str], what: str) -> None:
    if not isinstance(entry, dict):
        raise TypeError(f"{what} is {type(entry).__name__}, not an object")
    if strange := sorted(entry.keys() - keys):
        raise ValueError(f"{what} has the unknown key {strange[0]!r}; known: {', '.join(sorted(keys))}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are there once each; Python's reader would drop all but the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _selectors(selectors: Any) -> tuple[str, ...]:
    try:
        return _words(selectors)
    except TypeError:
        raise SchemeError(f"Targets and ignores are words or lists of them, got {said(selectors)}.") from None


def _words(selectors: Any) -> tuple[str, ...]:
    """One selector or a list of them."""
    found = (selectors,) if isinstance(selectors, str) else tuple(selectors)
    if not all(isinstance(s, str) for s in found):
        raise TypeError(f"selectors are words, got {selectors!r}")
    return found


def matches(selector: str, names: Iterable[str], classes: Iterable[str]) -> bool:
    """Whether a selector picks something with these names (module, tensor, …) and class names.

    Raises:
        SchemeError: a pattern that is no regular expression.
    """
    if selector.startswith("re:"):
        try:
            pattern = re.compile(selector[3:])
        except re.error as error:
            raise SchemeError(
                f"Selector {selector!r} is not a regular expression: {error}. Escape dots and brackets with a backslash."
            ) from error
        return any(pattern.match(name) for name in names)
    return selector in classes or selector in names
