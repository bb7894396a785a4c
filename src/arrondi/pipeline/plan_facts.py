"""What layouts and readers must know of a model, given what will be quantized: `facts_of`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from arrondi.checkpoint import Layout, ModelFacts
from arrondi.model import Site, Source
from arrondi.pipeline.resolve import PlannedTensor


def facts_of(source: Source, tensors: Sequence[PlannedTensor], layout: Layout) -> ModelFacts:
    """The facts of a resolved recipe."""
    bare = [t for t in tensors if t.status == "quantized" and not _keeps_its_name(layout, t)]
    modules = [m for t in bare for s in t.sites for m in s.modules]
    names = {t.name for t in tensors if t.status == "quantized"}
    packed = [m for t in tensors if t.status == "quantized" for s in t.sites for m in s.modules]
    joined = [len(names & {*g.sources}) / len(g.sources) for g in source.names.groups if g.joins_weights]
    return ModelFacts(
        dtype=_dtype(source.config),
        fused_experts=any(s.param_index is not None for s in source.sites),
        whole=not source.starts_without(modules),
        splits=bool(source.names.split),
        split_plain=any(not any(re.search(f"{p}$", f"{m}.weight") for m in packed) for p in source.names.split),
        plain=0.0 in joined,
        parted=any(0 < share < 1 for share in joined),
        joined=frozenset(
            m for t in tensors if t.status == "quantized" for s in t.sites if is_joined(source, t, s) for m in s.modules
        ),
        reshaped=frozenset(m for s in source.sites if s.param in source.facts.reshaped for m in s.modules),
    )


def is_joined(source: Source, tensor: PlannedTensor, site: Site) -> bool:
    """Whether a matrix becomes a part of a parameter that is one matrix."""
    group = source.names.group(site.param)
    return site.param_index is None and group is not None and len(group.sources) > 1 and not tensor.tensor.converted


def _keeps_its_name(layout: Layout, planned: PlannedTensor) -> bool:
    """Whether a reader that keeps weights packed finds codes under the weight's own name, so that its module has a `weight`."""
    return any(name == planned.name for name, _, _ in layout.specs(planned.placed))


def _dtype(config: dict[str, Any]) -> str:
    """The element type that config.json names."""
    named = config.get("dtype") or config.get("torch_dtype")
    return named if isinstance(named, str) else "float32"
