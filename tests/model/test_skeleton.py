"""From stored tensors to the parameters that they fill, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from arrondi.checkpoint import Checkpoint
from arrondi.errors import FileFormatError
from arrondi.model import Skeleton
from tests.conftest import ARCHITECTURES


def skeleton_of(folder: Path) -> Skeleton:
    return Skeleton(Checkpoint.open(folder))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_filled_parameters_are_those_of_transformers(name: str, models: Callable[..., Path]) -> None:
    theirs = getattr(transformers, ARCHITECTURES[name][0]).from_pretrained(models(name), dtype=torch.float32)
    expected = dict(theirs.named_parameters())
    skeleton = skeleton_of(models(name))
    assert skeleton.missing == [] and skeleton.unused == []
    for param in expected:
        skeleton.fill([param])
        assert torch.equal(skeleton.parameter(param), expected[param]), param
        skeleton.drop([param])
        assert skeleton.is_empty(param)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_is_filled_before_it_is_asked_for(name: str, models: Callable[..., Path]) -> None:
    skeleton = skeleton_of(models(name))
    assert all(p.device.type == "meta" for p in skeleton.model.parameters())
    assert all(b.device.type == "cpu" for b in skeleton.model.buffers()), "computed buffers are real"
    assert not skeleton.model.training


EXPERTS: dict[str, dict[str, dict[str, Any]]] = {
    "mixtral": {
        "wide": {"intermediate_size": 96},
        "square": {"intermediate_size": 64},
        "half": {"intermediate_size": 32},
    },
    "qwen2-moe": {"narrow": {"moe_intermediate_size": 32}, "square": {"moe_intermediate_size": 64}},
    "qwen3-moe": {"narrow": {"moe_intermediate_size": 32}, "square": {"moe_intermediate_size": 64}},
}
FUSED = [(name, kind) for name, kinds in EXPERTS.items() for kind in kinds]


@pytest.mark.parametrize(("name", "kind"), FUSED, ids=["-".join(f) for f in FUSED])
def test_every_slot_of_a_fused_parameter_holds_its_tensor(name: str, kind: str, models: Callable[..., Path]) -> None:
    """The region of the filled parameter is the stored tensor itself, square experts included."""
    skeleton = skeleton_of(models(name, num_hidden_layers=1, **EXPERTS[name][kind]))
    covered: dict[str, int] = {}
    sources = [s for s in skeleton.checkpoint.names if ".experts." in s]
    assert len(sources) == 12
    for source in sources:
        slots = skeleton.slots(source)
        assert len(slots) == 1, source
        slot = slots[0]
        skeleton.fill([slot.param])
        assert slot.index is not None and slot.source_index is None
        region = skeleton.parameter(slot.param)[slot.index][slot.rows, slot.columns]
        stored = skeleton.checkpoint.dense(source)
        assert torch.equal(region.T if slot.flipped else region, stored), source
        covered[slot.param] = covered.get(slot.param, 0) + region.numel()
    assert covered == {p: skeleton.empty[p].numel() for p in covered}, "slots cover all of it, once"


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "phi3-fused-qkv"])
def test_a_plain_parameter_is_one_slot(name: str, models: Callable[..., Path]) -> None:
    skeleton = skeleton_of(models(name))
    for source, params in skeleton.params_of.items():
        if params[0] not in skeleton.empty:
            continue
        (slot,) = skeleton.slots(source)
        skeleton.fill([slot.param])
        assert slot.index is None and not slot.flipped
        assert torch.equal(skeleton.parameter(slot.param)[slot.rows, ...], skeleton.checkpoint.dense(source))


def test_a_tied_weight_is_one_tensor_with_two_names(models: Callable[..., Path]) -> None:
    skeleton = skeleton_of(models("llama-tied"))
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    assert all(sorted(skeleton.names_of(n)) == sorted(names) for n in names)
    assert all(skeleton.sources(n) == ["model.embed_tokens.weight"] for n in names)
    skeleton.fill(["lm_head.weight"])
    assert skeleton.parameter(names[0]) is skeleton.parameter(names[1])


def test_an_override_is_read_instead_of_the_file(models: Callable[..., Path]) -> None:
    skeleton = skeleton_of(models("mixtral", num_hidden_layers=1))
    source = next(s for s in skeleton.checkpoint.names if ".experts.2.w1" in s)
    (slot,) = skeleton.slots(source)
    skeleton.overrides[source] = torch.full(skeleton.checkpoint.names[source], 7.0)
    skeleton.fill([slot.param])
    region = skeleton.parameter(slot.param)[slot.index][slot.rows, slot.columns]  # type: ignore[index]
    assert bool((region == 7).all())
    region.zero_()
    assert bool((skeleton.overrides[source] == 7).all()), "what was filled is a copy"


def test_what_a_checkpoint_lacks_is_missing_and_zero(models: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((models("bert") / "config.json").read_bytes())
    tensors = load_file(models("bert") / "model.safetensors")
    tensors.pop("pooler.dense.weight")
    save_file({**tensors, "of.no.use": torch.zeros(3)}, tmp_path / "model.safetensors")
    skeleton = skeleton_of(tmp_path)
    assert skeleton.missing == ["pooler.dense.weight"] and skeleton.unused == ["of.no.use"]
    skeleton.fill(["pooler.dense.weight"])
    assert not skeleton.parameter("pooler.dense.weight").any()


def test_a_tensor_of_another_shape_is_named(models: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((models("llama") / "config.json").read_bytes())
    tensors = load_file(models("llama") / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(63)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(FileFormatError, match=r"model\.norm\.weight has shape \(63,\), config.json says \(64,\)"):
        skeleton_of(tmp_path)


def test_names_of_an_older_layout_are_found(models: Callable[..., Path], tmp_path: Path) -> None:
    """A base model's checkpoint loads into the class with a head, and the other way round, as transformers allows."""
    tensors = load_file(models("gpt2") / "model.safetensors")
    assert any(n.startswith("transformer.") for n in tensors)
    (tmp_path / "config.json").write_bytes((models("gpt2") / "config.json").read_bytes())
    save_file({n.removeprefix("transformer."): t for n, t in tensors.items()}, tmp_path / "model.safetensors")
    skeleton = skeleton_of(tmp_path)
    assert skeleton.unused == [] and skeleton.missing == []
    skeleton.fill(["transformer.h.0.attn.c_attn.weight"])
    found = skeleton.parameter("transformer.h.0.attn.c_attn.weight")
    assert torch.equal(found, tensors["transformer.h.0.attn.c_attn.weight"])
