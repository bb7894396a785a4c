"""Models that want other inputs than token ids tell by shapes alone how their weights are used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from arrondi.model import OnDisk

RESHAPED = {
    "vit": {"pooler.dense.weight"},
    "clip": {"text_projection.weight", "visual_projection.weight"},
    "whisper": set[str](),
    "t5": set[str](),
    "llama": set[str](),
}
"""Linear layers that read one row for every window."""


@pytest.mark.parametrize("name", RESHAPED)
def test_inputs_without_tokens_are_seen(name: str, models: Callable[..., Path]) -> None:
    facts = OnDisk.open(models(name)).facts
    assert facts.reshaped == RESHAPED[name]
    assert facts.leaders, "products are seen"


def test_nothing_is_changed_and_nothing_is_loaded(models: Callable[..., Path]) -> None:
    source = OnDisk.open(models("clip"))
    buffers = {n: (b.device.type, b.clone()) for n, b in source.model.named_buffers()}
    assert source.facts.reshaped
    assert all(p.is_meta for p in source.model.parameters())
    assert all(b.device.type == buffers[n][0] and b.equal(buffers[n][1]) for n, b in source.model.named_buffers())


@pytest.mark.parametrize(
    ("name", "some"),
    [("gemma3-vlm", "model.multi_modal_projector.mm_input_projection_weight"), ("qianfan-ocr", ""), ("llama", None)],
)
def test_what_text_reaches_is_told_as_by_a_run(name: str, some: str | None, models: Callable[..., Path]) -> None:
    """qianfan-ocr cannot go through token ids by shapes, and is run."""
    run, shapes = OnDisk.open(models(name)), OnDisk.open(models(name))
    shapes.by_shapes()
    assert shapes.facts.unreached == run.facts.unreached
    assert (some is None) is not bool(run.facts.unreached) and (not some or some in run.facts.unreached)
