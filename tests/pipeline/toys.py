"""Two steps that no user has: one rewrite, one repair. They show that a step is a row of the table and a function; see `test_steps`.

As a script it makes the same call again and again in forked processes, and ends each at another moment, as `killer` does:

    python -m tests.pipeline.toys MODEL WORK KILLS    →  one JSON document
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from arrondi.formats import LayerScheme
from arrondi.model import Site, Source
from arrondi.pipeline import Recipe, Rule, TextOptions, quantize_model, steps
from arrondi.pipeline.step import Added, Declared, Step
from arrondi.pipeline.work import Work
from tests.pipeline.killer import TAIL, Killer

NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
"""Of a Llama: the part of a block → the norm whose output its first projections read."""


def norm_of(site: Site) -> str:
    block, part, _, _ = site.tensor.rsplit(".", 3)
    return f"{block}.{NORMS[part]}.weight"


def reads_a_norm(site: Site, scheme: LayerScheme | None) -> str | None:
    reads = site.tensor.endswith(
        ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
    )
    return None if reads else "it reads no norm"


def fold(work: Work, sites: Sequence[Site], *, strength: float = 0.5) -> None:
    """Multiply columns by s and divide the norm that feeds them by s, so that large inputs become small.

    s are powers of two: nothing is lost, and sums that differ in their last bit give the same s.
    """
    inputs = work.statistics(sites, {"absmax"})[sites[0].name].absmax
    assert inputs is not None
    weights = torch.stack([work.weight(site).abs().amax(0) for site in sites]).amax(0)
    scale = inputs.clamp(min=1e-5) ** strength / weights.clamp(min=1e-5) ** (1 - strength)
    scale = scale.log2().round().exp2()
    work.change(norm_of(sites[0]), work.tensor(norm_of(sites[0])) / scale)
    for site in sites:
        work.weight(site).mul_(scale)


def norms_change(source: Source, sites: Sequence[Site], *, strength: float = 0.5) -> Declared:
    return Declared(changed=tuple(dict.fromkeys(map(norm_of, sites))))


def correct_means(work: Work, sites: Sequence[Site]) -> None:
    """Give a layer the bias that makes the mean of its output what it was: (W - Ŵ)·mean(x)."""
    (site,) = sites
    lost = work.before[site.name] - work.weight(site)
    seen = work.seen.get(site.name)
    bias = lost @ seen.mean if seen is not None else torch.zeros(len(lost))
    work.add(site.tensor.removesuffix(".weight") + ".bias", bias)


def biases_come(source: Source, sites: Sequence[Site]) -> Declared:
    added = tuple(Added.beside(s, "bias", source.stored_dtype(s.tensor), (s.shape[0],)) for s in sites)
    return Declared(added=added, config={"attention_bias": True, "mlp_bias": True})


TOYS: Mapping[str, Step] = {
    "fold": Step("fold", "rewrite", apply=fold, needs=frozenset({"absmax"}), scope="reads", refuse=reads_a_norm, declare=norms_change),
    "means": Step("means", "repair", apply=correct_means, needs=frozenset({"mean"}), declare=biases_come),
}  # fmt: skip


@contextmanager
def toys_known(*more: Step) -> Iterator[None]:
    """Inside, recipes may name the toys."""
    with pytest.MonkeyPatch.context() as patch:
        known = {**steps.STEPS, **TOYS, **{s.name: s for s in more}}
        patch.setattr(steps, "STEPS", MappingProxyType(known))
        yield


def recipe(scheme: str = "w=int4/g32", method: str = "rtn", **options: Any) -> Recipe:
    """Both toys around a method."""
    rounding = Recipe.simple(scheme, method, options={"range": "absmax"}).rules
    return Recipe((Rule(None, "fold", options=options), *rounding, Rule(None, "means")))


def data(count: int, length: int, seed: int) -> torch.Tensor:
    """Token ids (count, length)."""
    return torch.randint(0, 2048, (count, length), generator=torch.Generator().manual_seed(seed))


def call(model: Path, out: Path, method: str = "gptq") -> dict[str, Any]:
    """What is killed: calibrated and measured, several files."""
    texts = TextOptions(data(3, 24, 1), samples=3, eval_text=data(2, 24, 2))
    return quantize_model(model, out, recipe(method=method), texts, shard_bytes=100_000)


def main(model: str, work: str, kills: str) -> None:
    torch.set_num_threads(1)
    with toys_known():
        killer = Killer(lambda out: call(Path(model), out), Path(work))
        spread = torch.linspace(1, killer.total - TAIL, int(kills)).round().int().tolist()
        once = [killer.killed(killer.work / f"killed at {m}", [m]) for m in dict.fromkeys(spread)]
        often = killer.killed(killer.work / "killed often", list(range(7, killer.total, 40)))
    print(json.dumps({"total": killer.total, "once": once, "often": often}))


if __name__ == "__main__":
    main(*sys.argv[1:])
