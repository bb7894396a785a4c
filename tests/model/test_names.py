"""From stored tensors to the parameters that they fill, and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arrondi.errors import FileFormatError
from arrondi.model import OnDisk, Overlay, Site
from tests.zoo import of_transformers

Models = Callable[..., Path]

SPLIT = ["nomic-bert", "dinov2-swiglu", "gte", "jina-v3"]
"""Models whose stored tensors transformers splits."""


def altered(source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of a model directory with other tensors; `change` works in place."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize(
    "name", ["llama-tied", "gpt2", "phi3-fused-qkv", "qwen2-moe", *SPLIT, "deepseek-v3", "gemma4", "gpt-oss"]
)
def test_filled_parameters_and_buffers_are_those_of_transformers(name: str, models: Models) -> None:
    theirs = of_transformers(name, models(name))
    source = OnDisk.open(models(name))
    assert source.names.missing() == [] and source.names.unused == []
    instance = source.instance()
    for param, expected in theirs.named_parameters():
        instance.fill([param])
        assert torch.equal(instance.parameter(param), expected), param
        instance.drop([param])
        assert instance.is_empty(param)
    buffers = dict(instance.model.named_buffers())
    for buffer, expected in theirs.named_buffers():
        torch.testing.assert_close(buffers[buffer], expected, msg=buffer)


def test_nothing_is_filled_before_it_is_asked_for(models: Models) -> None:
    source = OnDisk.open(models("llama"))
    for model in (source.model, source.instance().model):
        assert all(p.device.type == "meta" for p in model.parameters())
        assert all(b.device.type == "cpu" for b in model.buffers()), "computed buffers are real"
        assert not model.training


# ── sites ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

WIDTHS = {
    "mixtral": [{"intermediate_size": 96}, {"intermediate_size": 64}, {"intermediate_size": 32}],
    "qwen3-moe": [{"moe_intermediate_size": 32}, {"moe_intermediate_size": 64}],
    "gpt-oss": [{"intermediate_size": 96}, {"intermediate_size": 64}],
    "llama4": [{"intermediate_size": 64}],
}
STACKS = [(name, width) for name, widths in WIDTHS.items() for width in widths]


@pytest.mark.parametrize(("name", "width"), STACKS, ids=[f"{n}-{next(iter(w.values()))}" for n, w in STACKS])
def test_every_expert_of_a_fused_parameter_is_its_stored_matrix(
    name: str, width: dict[str, int], models: Models
) -> None:
    """Square experts included, which look alike when they are transposed; and all sites together are all of the parameter."""
    folder = models(
        name, num_hidden_layers=1, **({**width, "layer_types": ["full_attention"]} if name == "gpt-oss" else width)
    )
    source, stored = OnDisk.open(folder), load_file(folder / "model.safetensors")
    instance = source.instance()
    covered: dict[str, int] = {}
    sites = [s for s in source.sites if s.param_index is not None]
    for site in sites:
        instance.fill([site.param])
        region = site.region(instance.parameter(site.param))
        assert tuple(region.shape) == site.shape and torch.equal(region, site.stored(stored[site.tensor])), site.name
        covered[site.param] = covered.get(site.param, 0) + region.numel()
    assert covered == {p: instance.empty[p].numel() for p in covered} and len(covered) == 2
    # (out, in), whichever way they are stored: what reads the hidden states has 64 columns, what gives them 64 rows.
    up, down = ([s for s in sites if end in s.param] for end in ("gate_up", "down"))
    assert all(s.shape[1] == 64 for s in up) and all(s.shape[0] == 64 for s in down)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "phi3-fused-qkv"])
def test_an_ordinary_weight_is_one_site(name: str, models: Models) -> None:
    source = OnDisk.open(models(name))
    stored = load_file(models(name) / "model.safetensors")
    for tensor in source.tensors:
        for site in tensor.sites:
            assert len(tensor.sites) == 1 and site.index is None and site.name == tensor.name
            assert torch.equal(
                site.stored(stored[site.tensor]),
                stored[site.tensor].T if name == "gpt2" and "h." in site.tensor else stored[site.tensor],
            )
            assert site.modules[0] in dict(source.model.named_modules())


@pytest.mark.parametrize("name", SPLIT)
def test_parts_of_a_stored_tensor_are_sites_under_the_names_of_the_model(name: str, models: Models) -> None:
    source, theirs = OnDisk.open(models(name)), of_transformers(name, models(name))
    instance = source.instance()
    parameters, modules = dict(theirs.named_parameters()), dict(theirs.named_modules())
    split = [t for t in source.tensors if t.converted and t.sites]
    assert split and all(t.name in parameters for t in split)
    for site in (s for t in split for s in t.sites):
        instance.fill([site.param])
        assert torch.equal(site.region(instance.parameter(site.param)), modules[site.modules[0]].weight)


def test_a_tied_weight_is_one_tensor_with_two_names(models: Models) -> None:
    source = OnDisk.open(models("llama-tied"))
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    assert all(sorted(source.names.names_of(n)) == sorted(names) for n in names)
    assert [t.name for t in source.tensors if t.name in names] == names[:1]
    instance = source.instance()
    instance.fill(["lm_head.weight"])
    assert instance.parameter(names[0]) is instance.parameter(names[1])


def test_a_changed_tensor_is_read_instead_of_the_file(models: Models) -> None:
    source = OnDisk.open(models("mixtral", num_hidden_layers=1))
    site = next(s for s in source.sites if ".experts.2.w1" in s.tensor)
    value = torch.full(site.shape, 7.0)
    instance = source.instance(Overlay({site.tensor: lambda: value.clone()}))
    instance.fill([site.param])
    region = site.region(instance.parameter(site.param))
    assert bool((region == 7).all()) and not bool((instance.parameter(site.param) == 7).all())
    other = source.instance()
    other.fill([site.param])
    assert not bool((site.region(other.parameter(site.param)) == 7).any()), "two instances are two models"


def site_named(source: OnDisk, word: str) -> Site:
    return next(s for s in source.sites if word in s.tensor)


# ── other names ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "prefix"), [("llama", "model."), ("gpt2", "transformer.")])
def test_names_without_the_prefix_of_the_model_are_found(
    name: str, prefix: str, models: Models, tmp_path: Path
) -> None:
    """A base model's checkpoint loads into the class with a head, as transformers allows."""

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for n in list(tensors):
            tensors[n.removeprefix(prefix)] = tensors.pop(n)

    usual, bare = OnDisk.open(models(name)), OnDisk.open(altered(models(name), tmp_path / "bare", strip))
    assert bare.names.unused == [] and bare.names.missing() == []
    assert {s.param: s.tensor.removeprefix(prefix) for s in usual.sites} == {s.param: s.tensor for s in bare.sites}
    assert [s.modules for s in sorted(usual.sites, key=lambda s: s.param)] == [
        s.modules for s in sorted(bare.sites, key=lambda s: s.param)
    ]


# ── what does not belong together ─────────────────────────────────────────────────────────────────────────────────────


def drop(*words: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if any(w in n for w in words)]:
            del tensors[name]

    return change


MISSING: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], None], str]] = {
    "a head": ("llama", drop("lm_head"), r"lm_head\.weight"),
    "a layer": ("llama", drop("layers.1."), r"model\.layers\.1\..*, .*, .* and 6 more"),
    "a bias": ("bert", drop("pooler.dense.bias"), r"pooler\.dense\.bias"),
    "an expert": ("mixtral", drop("layers.1.block_sparse_moe.experts.2."), r"layers\.1"),
    "one matrix of an expert": ("qwen3-moe", drop("layers.1.mlp.experts.2.up_proj"), r"layers\.1"),
    "half of a split tensor": ("nomic-bert", drop("layers.1.attn.Wqkv"), r"layers\.1"),
    "a buffer that is read": ("deepseek-v3", drop("e_score_correction_bias"), r"e_score_correction_bias"),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_a_checkpoint_lacks_is_refused_by_name(what: str, models: Models, tmp_path: Path) -> None:
    name, change, words = MISSING[what]
    with pytest.raises(FileFormatError, match=words) as caught:
        OnDisk.open(altered(models(name), tmp_path / "lacking", change))
    assert "missing" in str(caught.value), "it says what may have happened"


def test_more_layers_than_there_are_is_refused(models: Models, tmp_path: Path) -> None:
    folder = altered(models("llama"), tmp_path / "more", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(FileFormatError, match=r"model\.layers\.3\..* and 15 more"):
        OnDisk.open(folder)


def test_what_may_be_absent_may_be_absent(models: Models, tmp_path: Path) -> None:
    """A head that is tied, and what the model has no place for."""
    assert "lm_head.weight" not in load_file(models("llama-tied") / "model.safetensors")
    assert OnDisk.open(models("llama-tied")).names.missing() == []
    more = altered(models("llama"), tmp_path / "more", lambda t: t.update({"of.no.use": torch.zeros(3)}))
    source = OnDisk.open(more)
    assert source.names.unused == ["of.no.use"]
    assert next(t for t in source.tensors if t.name == "of.no.use").params == ()


def test_a_buffer_that_the_model_computes_is_not_read(models: Models, tmp_path: Path) -> None:
    """Old checkpoints hold the frequencies of positions, and transformers leaves them alone."""
    name = "model.rotary_emb.inv_freq"
    more = altered(models("llama"), tmp_path / "more", lambda t: t.update({name: torch.ones(8)}))
    source = OnDisk.open(more)
    assert source.names.unused == [name]
    computed = source.instance().model.model.rotary_emb.inv_freq
    assert torch.equal(computed, of_transformers("llama", more).model.rotary_emb.inv_freq)


def test_a_tensor_of_another_shape_is_named(models: Models, tmp_path: Path) -> None:
    folder = altered(models("llama"), tmp_path / "odd", lambda t: t.update({"model.norm.weight": torch.ones(63)}))
    with pytest.raises(FileFormatError, match=r"model\.norm\.weight has shape \(63,\), config.json says \(64,\)"):
        OnDisk.open(folder)
