"""Low-bit training on several ranks: DDP and FSDP2 over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from arrondi.training import TRAINING_METHODS, convert_to_lowbit_training

RANKS = 2


def work(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    found = {}
    for method in TRAINING_METHODS:
        for wrap in ("ddp", "fsdp"):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 16))
            convert_to_lowbit_training(model, method)
            torch.manual_seed(100 + rank)
            x = torch.randn(32, 64)
            if wrap == "ddp":
                wrapped: nn.Module = DistributedDataParallel(model)
            else:
                model(x)  # the steps of some methods begin with the first batch
                wrapped = fully_shard(model)
            optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
            losses = []
            for _ in range(6):
                optimizer.zero_grad()
                loss = (wrapped(x) - x[:, :16]).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            weight = model[0].weight.detach()
            found[method, wrap] = losses, (weight.full_tensor() if wrap == "fsdp" else weight).clone()
    torch.save(found, f"{results}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_ranks_learn_one_model(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path / "store"), str(tmp_path)), RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    assert len(first) == 2 * len(TRAINING_METHODS)
    for key, (losses, weight) in first.items():
        assert torch.equal(weight, second[key][1]), key
        assert losses[-1] < losses[0], key
