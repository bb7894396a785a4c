"""A model run unit by unit gives what transformers gives, for every batch and every version of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arrondi.model import Budget, Chain, Inputs, OnDisk, Overlay, Stream, settle, walk
from arrondi.model.unloaded import NotLoaded, Unloaded
from tests.zoo import ARCHITECTURES, of_transformers, outputs

Models = Callable[..., Path]
CHAINS = [
    *ARCHITECTURES,
    "deberta",
    "opt-projected",
    "deepseek-v3",
    "gemma4",
    "jamba",
    "gemma3-vlm",
    "gte",
    "gemma3n",
    "llama4",
    "gpt-oss",
    "zaya",
    "t5-encoder",
]
BATCHES = [torch.randint(3, 2000, size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate([(2, 23), (1, 23), (3, 17)])]  # fmt: skip
"""Of different tokens, sizes and lengths: what blocks are given belongs to the batch."""


def followed(units: Chain, batches: list[torch.Tensor], folder: Path, limit: int = 1 << 30) -> list[torch.Tensor]:
    with Stream(units, batches, Budget(limit), folder) as stream:
        stream.begin()
        for _ in walk([[stream]]):
            pass
        with units.outer_loaded():
            parts = [(j, stream.output(j, rows)) for j, rows in stream.pieces()]
    return [torch.cat([part for k, part in parts if k == j]) for j in range(len(batches))]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", CHAINS)
def test_unit_by_unit_equals_the_whole_model(name: str, models: Models, tmp_path: Path) -> None:
    theirs, source = of_transformers(name, models(name)), OnDisk.open(models(name))
    assert settle(source, BATCHES[0][:1]) == [] and not source.whole, "it is a chain"
    chain = source.units_of(source.instance())
    assert len(chain) > 1
    for found, batch in zip(followed(chain, BATCHES, tmp_path), BATCHES, strict=True):
        close(found, outputs(theirs, batch))
    assert all(p.device.type == "meta" for p in chain.model.parameters()), "and nothing stays in memory"


def test_nothing_is_computed_with_weights_that_are_not_loaded() -> None:
    """PyTorch itself looks up rows by indices on the meta device, and gives what lies in memory."""
    weight, ids = torch.empty(5, 3, device="meta"), torch.tensor([1, 2])
    real = torch.randn(5, 3)
    with Unloaded(torch.device("cpu")):
        assert weight.device == torch.device("cpu") and weight.shape == (5, 3) and weight.dtype == torch.float32
        assert torch.equal(torch.nn.functional.embedding(ids.to(weight.device), real), real[1:3])
        for wrong in (
            lambda: torch.nn.functional.embedding(ids, weight),
            lambda: ids.to(weight),
            lambda: weight.T,
            lambda: torch.cat([real, weight]),
            lambda: weight.new_zeros(2),
        ):
            with pytest.raises(NotLoaded):
                wrong()


@pytest.mark.parametrize("name", ["llama", "gemma4"])
def test_two_models_on_two_sets_of_batches_do_not_meet(name: str, models: Models, tmp_path: Path) -> None:
    """The arguments of a block belong to one model: keys and values that blocks share, and inputs that depend on weights."""
    source = OnDisk.open(models(name))
    changed = {
        s.tensor: s for s in source.sites if any(w in s.tensor for w in ("k_proj", "v_proj", "per_layer", "embed"))
    }
    overlay = Overlay({n: lambda n=n: 1.5 * source.checkpoint.dense(n) for n in changed})
    other = of_transformers(name, models(name))
    with torch.no_grad():
        for parameter in {dict(other.named_parameters(remove_duplicate=False))[s.param] for s in changed.values()}:
            parameter.mul_(1.5)
    one, two = (source.units_of(source.instance(o)) for o in (None, overlay))
    budget = Budget(1 << 30)
    with (
        Stream(one, BATCHES, budget, tmp_path) as first,
        Stream(two, BATCHES, budget, tmp_path) as second,
        Stream(two, BATCHES[:1], budget, tmp_path) as third,
    ):
        for stream in (first, second, third):
            stream.begin()
        for _ in walk([[first], [second, third]]):
            pass
        with one.outer_loaded(), two.outer_loaded():
            close(third.output(0), second.output(0))
            for j, batch in enumerate(BATCHES):
                close(first.output(j), outputs(of_transformers(name, models(name)), batch))
                close(second.output(j), outputs(other, batch))
                assert not torch.allclose(first.output(j), second.output(j), rtol=1e-2)


def test_a_visitor_changes_a_unit_before_it_runs(models: Models, tmp_path: Path) -> None:
    source, other = OnDisk.open(models("llama")), of_transformers("llama", models("llama"))
    chain = source.units_of(source.instance())
    seen = []

    def halve(i: int, streams: object) -> None:
        seen.append(i)
        if i == 1:
            chain.instance.parameter("model.layers.1.mlp.up_proj.weight").mul_(0.5)

    with Stream(chain, BATCHES, Budget(1 << 30), tmp_path) as stream:
        stream.begin()
        assert list(walk([[stream]], halve)) == seen == [0, 1, 2]
        with torch.no_grad(), chain.outer_loaded():
            other.model.layers[1].mlp.up_proj.weight.mul_(0.5)
            close(stream.output(2), outputs(other, BATCHES[2]))


def test_the_last_unit_is_not_run_where_nobody_reads_what_leaves_it(models: Models, tmp_path: Path) -> None:
    source = OnDisk.open(models("llama"))
    chain = source.units_of(source.instance())
    with Stream(chain, BATCHES, Budget(1 << 30), tmp_path) as stream:
        stream.to_the_end = False
        stream.begin()
        entering = {}
        for i in walk([[stream]], lambda i, _: entering.update({i: stream.hidden(i, 2).clone()})):
            last = i
        assert last == len(chain) - 1 and torch.equal(stream.hidden(len(chain), 2), entering[last])


def test_what_a_block_hands_to_a_later_one_is_what_it_computes_after_a_change(models: Models, tmp_path: Path) -> None:
    source, other = OnDisk.open(models("zaya")), of_transformers("zaya", models("zaya"))
    chain = source.units_of(source.instance())

    def halve(i: int, streams: object) -> None:
        if i == 0:
            chain.instance.parameter("model.layers.0.mlp.gate.down_proj.weight").mul_(0.5)

    with Stream(chain, BATCHES, Budget(1 << 30), tmp_path) as stream:
        stream.begin()
        list(walk([[stream]], halve))
        with torch.no_grad(), chain.outer_loaded():
            other.model.layers[0].mlp.gate.down_proj.weight.mul_(0.5)
            for j, batch in enumerate(BATCHES):
                close(stream.output(j), outputs(other, batch))


def test_what_does_not_fit_in_memory_changes_nothing_and_gives_its_file_back(models: Models, tmp_path: Path) -> None:
    import psutil

    source = OnDisk.open(models("gemma4"))
    before = psutil.Process().num_fds()
    in_memory = followed(source.units_of(source.instance()), BATCHES, tmp_path)
    in_file = followed(source.units_of(source.instance()), BATCHES, tmp_path, limit=0)
    assert all(torch.equal(a, b) for a, b in zip(in_memory, in_file, strict=True))
    assert psutil.Process().num_fds() == before and list(tmp_path.iterdir()) == []


def test_a_walk_that_breaks_off_drops_its_unit(models: Models, tmp_path: Path) -> None:
    source = OnDisk.open(models("llama"))
    chain = source.units_of(source.instance())

    def fail(i: int, streams: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Stream(chain, BATCHES, Budget(0), tmp_path) as stream:
        stream.begin()
        list(walk([[stream]], fail))
    assert all(p.device.type == "meta" for p in chain.model.parameters())


def test_the_units_are_the_largest_list_of_modules(models: Models) -> None:
    found = {
        n: OnDisk.open(models(n)).units for n in ("llama", "gpt2", "opt", "bert", "mixtral", "jamba", "gemma3-vlm")
    }
    assert found == {
        "llama": "model.layers",
        "gpt2": "transformer.h",
        "opt": "model.decoder.layers",
        "bert": "encoder.layer",
        "mixtral": "model.layers",
        "jamba": "model.layers",
        "gemma3-vlm": "model.language_model.layers",
    }


@pytest.mark.parametrize("batch", ["tensor", "mapping", "inputs"])
def test_a_batch_is_given_as_the_model_is_called(batch: str, models: Models, tmp_path: Path) -> None:
    ids, mask = BATCHES[0], torch.ones_like(BATCHES[0])
    mask[0, 15:] = 0
    given = {"tensor": ids, "mapping": {"input_ids": ids, "attention_mask": mask}, "inputs": Inputs((ids, mask))}[batch]
    source = OnDisk.open(models("bert"))
    (found,) = followed(source.units_of(source.instance()), [given], tmp_path)
    with torch.no_grad():
        expected = of_transformers("bert", models("bert"))(ids, None if batch == "tensor" else mask)[0]
    close(found, expected)


def test_the_global_random_state_is_untouched(models: Models) -> None:
    before = torch.random.get_rng_state()
    source = OnDisk.open(models("deepseek-v3"))
    assert source.sites
    settle(source, BATCHES[0])
    assert torch.equal(before, torch.random.get_rng_state())
