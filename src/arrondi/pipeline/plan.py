"""The plan: a recipe resolved on a model, before anything is computed.

Owns: `Plan`, `PlannedTensor` and `make_plan`. Every stored tensor is in exactly one class — quantized, kept by rule, or kept
because it is impossible — with the reason. What cannot work as asked (a group size that does not divide, a selector that
matches nothing) is a `problem` with its fix; `quantize` refuses to start while there is one.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from arrondi.checkpoint import LAYOUTS, Layout, ModelFacts, Placed, ShardPlan, TensorSpec, readers_of
from arrondi.checkpoint.readers import TRANSFORMERS
from arrondi.errors import ArrondiError, SchemeError, unknown
from arrondi.formats import LayerScheme, PerBlock, PerGroup, Scheme
from arrondi.model import Skeleton, find_blocks
from arrondi.pipeline.recipe import Recipe, Rule, matches
from arrondi.rounding import get_method

Status = Literal["quantized", "kept by rule", "kept because impossible"]

_BASE_BYTES = 420 << 20
"""Resident set of Python with torch and transformers loaded."""
_FLOPS = 2.0e11
"""Rough rate of a small CPU, for the time estimate."""
_START_SECONDS = 3.0
"""Imports, headers, tokenizer."""
_SMALL_OUTPUT = 8
"""A linear with fewer outputs (a gate) is kept: nothing to gain, and runtimes expect it plain."""


@dataclass(frozen=True)
class PlannedTensor:
    """What becomes of one stored tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    status: Status
    reason: str
    module: str = ""
    rule: Rule | None = None
    scheme: LayerScheme | None = None
    block: int | None = None
    kind: str = "Linear"
    path: str = ""

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def placed(self) -> Placed:
        assert self.scheme is not None
        return Placed(self.name, self.shape, self.scheme, self.path, self.kind)


@dataclass(frozen=True)
class Plan:
    """A resolved recipe.

    Attributes:
        tensors: every stored tensor, in the order of the files.
        layout: how quantized tensors will be stored.
        problems: sentences that say what cannot work and what to do; empty when the plan can run.
        classes: class name of every quantized module.
        kept_modules: modules with a matrix that stays as it is, for `ignore`.
        notes: things to know that stop nothing.
        whole: transformers can build the model's class only around whole weights, not around packed ones.
    """

    tensors: list[PlannedTensor]
    layout: Layout
    problems: list[str]
    classes: Mapping[str, str]
    kept_modules: list[str]
    notes: list[str] = field(default_factory=list)
    whole: bool = False

    @property
    def quantized(self) -> list[PlannedTensor]:
        return [t for t in self.tensors if t.status == "quantized"]

    def config(self) -> dict[str, Any]:
        """The `quantization_config` of the output."""
        return self.layout.config([t.placed for t in self.quantized], self.kept_modules, ModelFacts(whole=self.whole))

    def specs(self, tensor: PlannedTensor) -> list[TensorSpec]:
        """The tensors that are written for one stored tensor."""
        if tensor.status == "quantized":
            return self.layout.specs(tensor.placed)
        return [(tensor.name, tensor.dtype, tensor.shape)]

    def nbytes(self, tensor: PlannedTensor) -> int:
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.specs(tensor))

    def shards(self, shard_bytes: int) -> ShardPlan:
        return ShardPlan.split([spec for t in self.tensors for spec in self.specs(t)], shard_bytes)

    @property
    def output_bytes(self) -> int:
        return sum(self.nbytes(t) for t in self.tensors)

    def estimate(self, tokens: int, eval_tokens: int) -> tuple[int, float]:
        """Peak memory in bytes and rough seconds for so many calibration and evaluation tokens."""
        largest = max((t.weights for t in self.quantized), default=0)
        matrices = sum(t.weights for t in self.quantized)
        methods = [(t.weights, get_method(t.rule.method)) for t in self.quantized if t.rule]
        seconds = _START_SECONDS + sum(weights * m.seconds_per_gigaweight for weights, m in methods) / 1e9
        if not tokens and not eval_tokens:
            return _BASE_BYTES + 10 * largest, seconds  # as stored, codes, packed, and chunks of float32
        blocks: dict[int, int] = {}
        for t in self.tensors:
            if t.block is not None:
                blocks[t.block] = blocks.get(t.block, 0) + t.weights
        outer = sum(t.weights for t in self.tensors if t.block is None)
        width = max((t.shape[-1] for t in self.quantized), default=0)
        hidden = min((t.shape[-1] for t in self.quantized), default=0)
        activations = 4 * hidden * (tokens + 2 * eval_tokens)
        # A moment and its factor; then weights that share an input, as float32, as rows and restored.
        solving = 10 * width**2 + 26 * largest if any(m.needs_moment for _, m in methods) else 0
        seconds += 2 * matrices * (3.4 * tokens + 2 * eval_tokens) / _FLOPS
        return _BASE_BYTES + activations + max(4 * outer, 4 * max(blocks.values(), default=0) + solving), seconds

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        total = sum(t.weights for t in self.tensors)
        quantized = sum(t.weights for t in self.quantized)
        bits = 8 * sum(self.nbytes(t) for t in self.quantized)
        return {
            "layout": self.layout.name,
            "readers": [v.reader for v in readers_of([t.placed for t in self.quantized], self.layout) if v.ok],
            "parameters": total,
            "output_bytes": self.output_bytes,
            "bits_per_weight": round(bits / quantized, 4) if quantized else None,
            "model_bits_per_weight": round(8 * self.output_bytes / max(total, 1), 4),
            "counts": {
                s: sum(t.status == s for t in self.tensors)
                for s in ("quantized", "kept by rule", "kept because impossible")
            },
            "problems": self.problems,
            "notes": self.notes,
            "tensors": [
                {
                    "name": t.name,
                    "shape": list(t.shape),
                    "status": t.status,
                    "reason": t.reason,
                    "scheme": str(t.scheme) if t.scheme else None,
                    "method": t.rule.method if t.rule else None,
                    "bytes": self.nbytes(t),
                    "bits_per_weight": round(8 * self.nbytes(t) / max(t.weights, 1), 4),
                }
                for t in self.tensors
            ],
        }


def make_plan(skeleton: Skeleton, recipe: Recipe, *, layout: str | None = None, keep_misfits: bool = False) -> Plan:
    """Resolve a recipe on a model.

    Args:
        skeleton: the model.
        recipe: the user's rules.
        layout: a name of `LAYOUTS`; None takes the most widely read one that can hold everything.
        keep_misfits: weights whose shape does not fit are kept instead of being a problem.
    """
    if layout is not None and layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    resolver = _Resolver(skeleton, recipe, keep_misfits)
    tensors = [resolver.resolve(name, shape) for name, shape in skeleton.checkpoint.names.items()]
    problems = [*resolver.problems, *resolver.unmatched()]
    chosen = LAYOUTS[layout] if layout else _choose_layout(tensors)
    for t in tensors:
        refusal = chosen.refuse(t.placed) if t.status == "quantized" and t.scheme else None
        if refusal:
            problems.append(f"{t.name}: {refusal}. Use --layout arrondi, or another scheme.")
            break
    if any(r.options.get("order") == "dynamic" for r in recipe.rules):
        problems.append(
            "Act-order with dynamic groups needs a group index, which no layout here stores. Use --option order=static."
        )
    if not any(t.status == "quantized" for t in tensors) and not problems:
        problems.append(
            "Nothing would be quantized: the model has no linear layer that the rules pick. Check --targets and --ignore."
        )
    notes = [f"{n} is missing in the checkpoint and is taken as zero." for n in skeleton.missing]
    whole = not skeleton.starts_without(resolver.classes)
    placed = [t.placed for t in tensors if t.status == "quantized"]
    notes += [
        v.sentence for v in readers_of(placed, chosen, ModelFacts(whole=whole)) if not v.ok and v.reader == TRANSFORMERS
    ]
    return Plan(tensors, chosen, problems, resolver.classes, resolver.kept_modules(tensors), notes, whole)


def _choose_layout(tensors: list[PlannedTensor]) -> Layout:
    wanted = [t for t in tensors if t.status == "quantized"]
    for layout in LAYOUTS.values():
        if all(layout.refuse(t.placed) is None for t in wanted if t.scheme):
            return layout
    return next(iter(LAYOUTS.values()))


class _Resolver:
    """Decides tensor by tensor and remembers which selectors were of use."""

    def __init__(self, skeleton: Skeleton, recipe: Recipe, keep_misfits: bool) -> None:
        self.skeleton, self.recipe, self.keep_misfits = skeleton, recipe, keep_misfits
        self.model = skeleton.model
        self.problems: list[str] = []
        self.classes: dict[str, str] = {}
        self.names: set[str] = set()
        self.used: set[str] = set()
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        heads = tuple(n for n, m in self.model.named_modules() if head is not None and m is head)
        self.ignore = heads if recipe.ignore is None else recipe.ignore
        try:
            self.prefix = find_blocks(self.model) + "."
        except SchemeError:
            self.prefix = ""

    def resolve(self, name: str, shape: tuple[int, ...]) -> PlannedTensor:
        entry = self.skeleton.checkpoint.folder.entries[name]
        plain = PlannedTensor(name, shape, entry.torch_dtype, "kept by rule", "")
        params = self.skeleton.params_of.get(name)
        if not params:
            return _with(plain, reason="not a parameter of the model")
        aliases = [a for p in params if p in self.skeleton.empty for a in self.skeleton.names_of(p)]
        if not aliases:
            return _with(plain, reason="a buffer")
        modules = {a.rpartition(".")[0]: self.model.get_submodule(a.rpartition(".")[0]) for a in aliases}
        block = self._block_of(aliases)
        own = name.removesuffix(".weight")
        names = [name, own, *modules, *aliases]
        fused = len(self.skeleton.empty[params[0]].shape) == 3
        classes = {c.__name__ for m in modules.values() for c in type(m).__mro__ if c is not torch.nn.Module}
        product = len(shape) >= 2 and (fused or bool(classes & {"Linear", "Conv1D"}))
        if product:
            classes.add("Linear")
        self.names |= {own, *modules}
        plain = _with(plain, module=own, block=block)
        if len(shape) < 2:
            return _with(plain, reason="one-dimensional (norm or bias)")
        rule = self._rule(names, classes)
        ignored = [s for s in self.ignore if matches(s, names, classes)]
        self.used |= set(ignored)
        if rule is None:
            kind = type(next(iter(modules.values()))).__name__
            return _with(plain, reason=f"not a target ({kind})")
        if rule.scheme is None:
            return _with(plain, reason="left alone by a rule", rule=rule)
        others = [a for a in aliases if a != name]
        tied = f", tied to {others[0]}" if len(aliases) > 1 else ""
        if ignored:
            return _with(plain, reason=f"ignored by {ignored[0]!r}{tied}")
        if any("Embedding" in c for c in classes):
            return _with(
                plain, status="kept because impossible", reason=f"an embedding is looked up, not multiplied{tied}"
            )
        if not product:
            return _with(
                plain, status="kept because impossible", reason=f"not a matrix product ({'/'.join(sorted(classes))})"
            )
        if shape[-2] < _SMALL_OUTPUT:
            return _with(plain, reason=f"only {shape[-2]} outputs")
        scale = {torch.float16: "float16", torch.bfloat16: "bfloat16"}.get(entry.torch_dtype, "float32")
        scheme = rule.scheme.with_scale(scale)  # type: ignore[arg-type]
        misfit = _misfit(scheme.weights, shape, name)
        if misfit:
            if self.keep_misfits:
                return _with(plain, status="kept because impossible", reason=misfit.partition(". ")[0])
            self.problems.append(misfit)
        for module_name, module in modules.items():
            self.classes[module_name] = "Conv1D" if type(module).__name__ == "Conv1D" else "Linear"
            self.classes[own] = self.classes[module_name]
        return _with(
            plain,
            status="quantized",
            reason=f"rule {self.recipe.rules.index(rule) + 1}",
            rule=rule,
            scheme=scheme,
            kind=self.classes[own],
            path="" if fused or own in modules else next(iter(modules)),
        )

    def _rule(self, names: list[str], classes: set[str]) -> Rule | None:
        found = None
        for rule in self.recipe.rules:
            hits = [s for s in rule.targets if matches(s, names, classes)]
            self.used |= set(hits)
            if hits:
                found = rule
        return found

    def _block_of(self, aliases: list[str]) -> int | None:
        inside = [a for a in aliases if self.prefix and a.startswith(self.prefix)]
        return min(int(a.removeprefix(self.prefix).partition(".")[0]) for a in inside) if inside else None

    def unmatched(self) -> list[str]:
        """A sentence for every selector of the user that picked nothing."""
        asked = [("--targets", s) for r in self.recipe.rules for s in r.targets if s != "Linear"]
        asked += [("--ignore", s) for s in self.recipe.ignore or ()]
        all_names = self.names | {n for n, _ in self.model.named_modules()}
        sentences = []
        for option, selector in asked:
            if selector in self.used or (
                option == "--ignore"
                and any(matches(selector, [n], [type(m).__name__]) for n, m in self.model.named_modules())
            ):
                continue
            near = difflib.get_close_matches(selector.removeprefix("re:"), all_names, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            sentences.append(
                f"{option} {selector!r} matches nothing in this model.{hint} `arrondi plan` lists the names."
            )
        return sentences

    def kept_modules(self, tensors: list[PlannedTensor]) -> list[str]:
        """Modules with a matrix that is multiplied but stays plain."""
        quantized = {m for t in tensors if t.status == "quantized" for m in (t.module,)} | set(self.classes)
        kept = []
        for name, module in self.model.named_modules():
            weight = module._parameters.get("weight")
            if weight is None or weight.ndim != 2 or name in quantized or "Embedding" in type(module).__name__:
                continue
            kept.append(name)
        return kept


def _with(tensor: PlannedTensor, **changes: Any) -> PlannedTensor:
    return replace(tensor, **changes)


def _misfit(scheme: Scheme, shape: tuple[int, ...], name: str) -> str | None:
    """Why the scheme's tiles do not divide this shape, with the fix."""
    match scheme.granularity:
        case PerGroup(size) if shape[-1] % size:
            fixed = scheme.scale == "e8m0" or isinstance(scheme.scale, Scheme)
            fits = [g for g in (256, 128, 64, 32, 16, 8) if shape[-1] % g == 0]
            advice = (
                f"Use --group-size {fits[0]}"
                if fits and not fixed
                else "Use --group-size -1 (one group a row)"
                if not fixed
                else "Use another scheme"
            )
            return f"{name}: group_size {size} does not divide its last axis of {shape[-1]}. {advice}, or keep such layers as they are with --keep-misfits."
        case PerBlock(rows, columns) if shape[-1] % columns or shape[-2] % rows:
            return f"{name}: blocks of {rows} × {columns} do not divide its shape {tuple(shape)}. Use another scheme, or --keep-misfits."
    return None


def check(plan: Plan) -> None:
    """Refuse to start while the plan has a problem.

    Raises:
        SchemeError: the first problem, and how many more there are.
    """
    if plan.problems:
        more = f" ({len(plan.problems) - 1} more like it; `arrondi plan` lists all.)" if len(plan.problems) > 1 else ""
        error: ArrondiError = SchemeError(plan.problems[0] + more)
        raise error
