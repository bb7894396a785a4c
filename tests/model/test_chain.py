"""A model run block by block gives what transformers gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from arrondi.checkpoint import Checkpoint
from arrondi.model import Chain, Skeleton, find_blocks
from tests.conftest import ARCHITECTURES


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_block_by_block_equals_the_whole_model(name: str, models: Callable[..., Path]) -> None:
    folder = models(name)
    whole = getattr(transformers, ARCHITECTURES[name][0]).from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, 2048, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = whole(input_ids=ids)
    expected = output.logits if hasattr(output, "logits") else output[0]

    chain = Chain(Skeleton(Checkpoint.open(folder)))
    batches = [ids[:2], ids[2:]]  # two sizes, so that calls are learnt for each
    hidden = list(chain.begin(batches))
    for i in range(len(chain)):
        chain.fill(i)
        hidden = [chain.run(i, h) for h in hidden]
        chain.drop(i)
    with chain.outer_loaded(), torch.no_grad():
        found = torch.cat([chain.finish(b, h) for b, h in zip(batches, hidden, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_nothing_stays_in_memory_after_a_pass(models: Callable[..., Path]) -> None:
    chain = Chain(Skeleton(Checkpoint.open(models("llama"))))
    hidden = list(chain.begin([torch.zeros((1, 8), dtype=torch.long)]))
    chain.fill(0)
    chain.run(0, hidden[0])
    chain.drop(0)
    assert all(p.device.type == "meta" for n, p in chain.model.named_parameters() if p.ndim >= 2)


def test_blocks_are_the_largest_list_of_like_modules(models: Callable[..., Path]) -> None:
    found = {
        n: find_blocks(Skeleton(Checkpoint.open(models(n))).model) for n in ("llama", "gpt2", "opt", "bert", "mixtral")
    }
    assert found == {
        "llama": "model.layers",
        "gpt2": "transformer.h",
        "opt": "model.decoder.layers",
        "bert": "encoder.layer",
        "mixtral": "model.layers",
    }


def test_the_global_random_state_is_untouched(models: Callable[..., Path]) -> None:
    before = torch.random.get_rng_state()
    Skeleton(Checkpoint.open(models("llama")))
    assert torch.equal(before, torch.random.get_rng_state())
