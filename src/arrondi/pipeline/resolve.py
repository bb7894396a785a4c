"""What becomes of one tensor: the rules of a recipe, applied to what the model is.

Owns: `PlannedTensor` and `resolve`. Every tensor ends in one class (quantized, kept by rule, kept because impossible), with the
reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch

from arrondi.checkpoint import Layout, Placed
from arrondi.checkpoint.layouts.ggml import BLOCKS
from arrondi.formats import LayerScheme, PerBlock, PerChannel, PerGroup, PerTensor, Scheme
from arrondi.model import Site, Source, StoredTensor, deaf_parameters
from arrondi.nn import refuse_table
from arrondi.pipeline.mixing import Mixing
from arrondi.pipeline.recipe import Recipe, Rule, matches
from arrondi.pipeline.steps import get_step
from arrondi.rewrite.spread import refuse_block

Status = Literal["quantized", "kept by rule", "kept because impossible"]

_SCALES: Final[dict[torch.dtype, Literal["float16", "bfloat16"]]] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
"""The type of scales beside weights of a type; float32 beside all others."""
UNREACHED: Final = "text does not reach it"
"""How the reason begins for which towers of images and sound are kept."""
LOOKED_UP: Final = "it is looked up, not multiplied"
"""Why an embedding is rounded by a method that looks at no inputs."""
SMALL_OUTPUT = 8
"""A linear with fewer outputs (a gate) is kept: nothing to gain, and runtimes expect it plain."""
_NAME_TABLES: Final = (
    "Tables of embeddings that are tied to a head stay; name them in --targets, or give --embeddings, to quantize both"
)
_SMALLEST_GROUP = 16
"""Groups that stand in for one that does not fit have at least as many columns."""


@dataclass(frozen=True)
class PlannedTensor:
    """What becomes of one tensor of the file.

    Attributes:
        tensor: name, shape and sites.
        dtype: as stored in the source.
        status, reason: its class, and why.
        rule: the rule that quantizes it.
        scheme: what it becomes, after it was fitted to the shape.
        picked: numbers of the recipe's rewrites and repairs that pick it.
        storage: the layout's word for how it stores the scheme, of what is taken over as it is.
    """

    tensor: StoredTensor
    dtype: torch.dtype
    status: Status
    reason: str
    rule: Rule | None = None
    scheme: LayerScheme | None = None
    picked: frozenset[int] = frozenset()
    storage: str = ""

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.tensor.sites

    @property
    def shape(self) -> tuple[int, ...]:
        """As written without quantization."""
        return self.tensor.shape

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def block(self) -> int | None:
        """The unit that uses it."""
        return self.tensor.block

    @property
    def placed(self) -> Placed:
        """The layer as the output holds it."""
        assert self.scheme is not None
        placed = placed_of(self.tensor, self.scheme, self.rule)
        return replace(placed, storage=self.storage) if self.storage else placed


def placed_of(tensor: StoredTensor, scheme: LayerScheme, rule: Rule | None) -> Placed:
    """A tensor with its scheme, as layouts know it."""
    if not tensor.sites:  # no model builds it: it was quantized elsewhere, and is what it was
        return Placed(tensor.name, tensor.shape, scheme)
    first = tensor.sites[0]
    kind = first.classes[0] if first.param_index is None else "Linear"
    kind = "Embedding" if first.kind == "embedding" else kind
    indexed = rule is not None and rule.options.get("order") == "dynamic"
    same = rule is not None and bool(rule.blocks) and BLOCKS[rule.blocks].scheme == scheme.weights
    storage = rule.blocks if rule is not None and same else ""
    return Placed(tensor.name, tensor.shape, scheme, first.modules[0], kind, first.file_flipped, indexed, storage)


class Resolver:
    """Decides tensor by tensor and remembers which selectors were of use.

    Attributes:
        used: selectors that picked something.
        notes: sentences about schemes that were fitted to a shape, each with the layers that it concerns.
        ignore: selectors of what is left alone.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        layout: Layout,
        keep_misfits: bool,
        images: bool = False,
        largest: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.largest = largest or {}
        self.source, self.recipe, self.layout, self.keep_misfits = source, recipe, layout, keep_misfits
        self.mixing = Mixing(source)
        self.images = images
        self.used: set[str] = set()
        self.notes: dict[str, list[str]] = {}
        model = source.model
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        heads = tuple(n for n, m in model.named_modules() if head is not None and m is head)
        self.ignore = heads if recipe.ignore is None else recipe.ignore
        self.words = _words_of(model)
        self.deaf = deaf_parameters(model)

    def resolve(self, tensor: StoredTensor) -> PlannedTensor:
        dtype = self.source.dtype_of(tensor)
        plain = PlannedTensor(tensor, dtype, "kept by rule", "")
        if not tensor.params:
            return replace(plain, reason="not a parameter of the model")
        if not tensor.sites:
            buffer = all(p in self.source.names.buffers for p in tensor.params)
            return replace(plain, reason="a buffer" if buffer else "one-dimensional (norm or bias)")
        site = tensor.sites[0]
        names = [tensor.name, tensor.name.removesuffix(".weight"), *site.modules, *self._aliases(site)]
        rule, picked, named = self._rules(names, site.classes)
        ignored = [s for s in self.ignore if matches(s, names, site.classes)]
        if site.kind == "embedding":
            return self._table(plain, names, rule, ignored)
        self.used |= set(ignored)
        if rule is None:
            return replace(plain, reason=f"not a target ({site.classes[0]})", picked=picked)
        if rule.scheme is None:
            return replace(plain, reason="left alone by a rule", rule=rule, picked=picked)
        others = [a for a in self._aliases(site) if a != tensor.name]
        tied = f", tied to {others[0]}" if len(others) + 1 > 1 and len(self._aliases(site)) > 1 else ""
        if ignored:
            return replace(plain, reason=f"ignored by {ignored[0]!r}{tied}")
        if not site.reached and not named and not self.images:
            noise = any(p in self.deaf for p in tensor.params)
            how = "calibrated on noise" if noise else "blindly, or give --calibration-images"
            return replace(plain, reason=f"{UNREACHED}; name it in --targets to quantize it {how}")
        if site.unfit:
            return replace(plain, status="kept because impossible", reason=site.unfit)
        if site.shape[0] < SMALL_OUTPUT and site.kind != "convolution":  # whose outputs are channels of images
            return replace(plain, reason=f"only {site.shape[0]} outputs", picked=picked)
        return self._quantized(replace(plain, rule=rule, picked=picked))

    def _table(
        self, plain: PlannedTensor, names: Sequence[str], rule: Rule | None, ignored: Sequence[str]
    ) -> PlannedTensor:
        """A table of embeddings, which stays unless a rule picks it as one; a head that is tied to it shares its codes."""
        site = plain.sites[0]
        others = [a for a in self._aliases(site) if a != plain.name]
        tied = f", tied to {others[0]}" if others else ""
        self.used |= set(ignored)
        if rule is None:
            return replace(plain, reason=f"not a target ({site.classes[0]})")
        if rule.scheme is None:
            return replace(plain, reason="left alone by a rule", rule=rule)
        hits = [s for s in rule.targets if matches(s, names, site.classes)]
        # The default keeps the head; whoever asks for its table by name asks for both.
        if ignored and (self.recipe.ignore is not None or hits == ["Linear"]):
            return replace(plain, reason=f"ignored by {ignored[0]!r}{tied}")
        if hits == ["Linear"]:
            self.notes.setdefault(_NAME_TABLES, []).append(plain.name)
            return replace(plain, reason=f"an embedding is looked up, not multiplied{tied}")
        if self.words and not self.words & set(site.modules) and all(h in site.classes for h in hits):
            return replace(plain, reason="a table, but not of words; name it in --targets to quantize it")
        if site.unfit:
            return replace(plain, status="kept because impossible", reason=site.unfit, rule=rule)
        if site.shape[0] < SMALL_OUTPUT:
            return replace(plain, reason=f"only {site.shape[0]} rows")
        return self._quantized(replace(plain, rule=rule))

    def _quantized(self, plain: PlannedTensor) -> PlannedTensor:
        """The tensor in the rule's scheme, or in the nearest that its shape and the layout allow."""
        rule, site = plain.rule, plain.sites[0]
        assert rule is not None and rule.scheme is not None
        said: LayerScheme | None = rule.scheme
        if rule.mix:
            said = self.mixing.scheme(rule.mix, plain.tensor, site.matrix_shape[1], bool(get_step(rule.method).needs))
        if said is None:
            reason = f"no blocks of GGUF divide its {site.matrix_shape[1]} inputs"
            return replace(plain, status="kept because impossible", reason=reason)
        asked = replace(said, inputs=None) if site.kind == "embedding" else said
        asked = self.layout.fit(asked.with_scale(_SCALES.get(plain.dtype, "float32"), instead=("float32",)))
        wanted = self._spread(plain, asked)
        step = get_step(rule.method)
        reason = f"rule {self.recipe.rules.index(rule) + 1}"
        refusal = ""
        for scheme in [wanted] if self.keep_misfits else _nearest(wanted, site.matrix_shape[1]):
            if step.sizes is not None:
                known = [self.largest[s.name] for s in plain.sites if s.name in self.largest]
                largest = torch.stack(known) if known else None
                scheme = step.sizes(scheme, self._matrix(plain.tensor), rule.options, largest)
            refusal = (
                _unrounded(site, scheme)
                or step.refuse(site, scheme)
                or self.layout.refuse(placed_of(plain.tensor, scheme, rule))
                or ""
            )
            if not refusal and self.keep_misfits and _ragged(scheme.weights, site.matrix_shape):
                refusal = f"{scheme.weights} does not divide its shape {site.matrix_shape}"
            if not refusal:
                note = _unlike(wanted, scheme, site.matrix_shape)
                if note:
                    self.notes.setdefault(note, []).append(plain.name)
                    reason += f", {note}"
                return replace(plain, status="quantized", reason=reason, scheme=scheme)
        return replace(plain, status="kept because impossible", reason=refusal)

    def _matrix(self, tensor: StoredTensor) -> torch.Tensor:
        """The weight (m, n) as it is in the model; the matrices of a stack below each other."""
        instance = self.source.instance()
        instance.fill(tensor.params)
        whole = torch.cat([s.region(instance.parameter(s.param)) for s in tensor.sites])
        instance.drop(tensor.params)
        return whole.to(self.source.dtype_of(tensor))

    def _spread(self, plain: PlannedTensor, scheme: LayerScheme) -> LayerScheme:
        """The scheme with the transforms of inputs that rewrites ask for."""
        if scheme.inputs is None:
            return scheme
        rules = [self.recipe.rules[number] for number in sorted(plain.picked)]
        blocks = [get_step(r.method).spreads(self.source, plain.sites[0], **r.options) for r in rules]
        return replace(scheme, inputs=replace(scheme.inputs, spread=max(blocks, default=0) or scheme.inputs.spread))

    def _rules(self, names: Sequence[str], classes: Sequence[str]) -> tuple[Rule | None, frozenset[int], bool]:
        """The last round rule that picks this, the numbers of all rewrites and repairs that do, and whether the rule names it."""
        found, picked, named = None, set(), False
        for number, rule in enumerate(self.recipe.rules):
            hits = [s for s in rule.targets if matches(s, names, classes)]
            self.used |= set(hits)
            if hits and get_step(rule.method).kind == "round":
                found, named = rule, any(h != "Linear" for h in hits)
            elif hits:
                picked.add(number)
        return found, frozenset(picked), named

    def _aliases(self, site: Site) -> list[str]:
        return self.source.names.names_of(site.param)


def _words_of(model: Any) -> set[str]:
    """Paths of the table that token ids are looked up in, where the model says which it is."""
    if not hasattr(model, "get_input_embeddings"):
        return set()
    try:
        words = model.get_input_embeddings()
    except NotImplementedError:
        return set()
    return {name for name, module in model.named_modules(remove_duplicate=False) if module is words}


def _unrounded(site: Site, scheme: LayerScheme) -> str | None:
    """Why inputs cannot be rounded so by what stands in for the layer, None if they can."""
    if site.kind == "embedding":
        return refuse_table(scheme.weights)
    if scheme.inputs is None:
        return None
    if site.kind == "recurrent":
        return "inputs of recurrent cells are not rounded"
    if site.kind == "convolution" and not isinstance(scheme.inputs.scheme.granularity, PerTensor):
        return f"inputs of convolutions are rounded with one scale for a tensor, not by {scheme.inputs}"
    if scheme.inputs.spread and (site.kind == "convolution" or not site.rounds_inputs):
        return "inputs of convolutions and of fused experts are not spread"
    if scheme.inputs.spread:
        return refuse_block(site.shape[1], scheme.inputs.spread)
    return None


def _unlike(wanted: LayerScheme, scheme: LayerScheme, shape: tuple[int, int]) -> str:
    """What there is to know of a weight whose shape the wanted groups do not divide."""
    if scheme.weights.granularity != wanted.weights.granularity:
        return f"{wanted.weights} does not divide {shape[1]} inputs; {scheme.weights} instead"
    match scheme.weights.granularity:
        case PerGroup(size) if shape[1] % size and shape[1] > size:
            return f"{wanted.weights} does not divide {shape[1]} inputs; the last group of a row has {shape[1] % size}"
        case PerBlock(rows, columns) if _ragged(scheme.weights, shape):
            return f"{wanted.weights} does not divide {shape[0]} × {shape[1]}; the last blocks are smaller than {rows} × {columns}"
    return ""


def _ragged(scheme: Scheme, shape: tuple[int, int]) -> bool:
    match scheme.granularity:
        case PerGroup(size):
            return shape[1] % size != 0
        case PerBlock(rows, columns):
            return shape[0] % rows != 0 or shape[1] % columns != 0
    return False


def _nearest(wanted: LayerScheme, columns: int) -> list[LayerScheme]:
    """The scheme itself, then the same with other groups that divide the columns, the nearest size first."""
    granularity = wanted.weights.granularity
    fixed = wanted.weights.scale == "e8m0" or isinstance(wanted.weights.scale, Scheme)
    if not isinstance(granularity, PerGroup) or columns % granularity.size == 0 or fixed:
        return [wanted]
    sizes = [g for g in range(_SMALLEST_GROUP, columns + 1) if columns % g == 0] or [columns]

    def distance(g: int) -> tuple[bool, float]:
        # The compiled kernels know groups of 16 and multiples of 32, and one group a row.
        return not (g == columns or g == 16 or g % 32 == 0), abs(math.log(g / granularity.size))

    groups = [PerChannel() if g == columns else PerGroup(g) for g in sorted(sizes, key=distance)]
    return [wanted, *(replace(wanted, weights=replace(wanted.weights, granularity=g)) for g in groups)]
