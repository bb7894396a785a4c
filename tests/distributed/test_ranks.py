"""What needs real processes: `ranks` is run once with two and once with four of them, on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import arrondi
from arrondi.errors import SchemeError
from tests.distributed.ranks import CHECKS, network


@cache
def outcomes(world: int, folder: Path) -> list[dict[str, str]]:
    """Of every rank: check → "fine" or what went wrong."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "LOCAL_WORLD_SIZE": ""}
    command = [sys.executable, "-m", "tests.distributed.ranks", str(world), str(folder)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    files = [folder / f"{rank}.json" for rank in range(world)]
    assert all(f.exists() for f in files), done.stderr[-3000:]
    return [json.loads(f.read_text(encoding="utf-8")) for f in files]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {world: tmp_path_factory.mktemp(f"ranks{world}") for world in (2, 4)}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("check", CHECKS)
def test_ranks(world: int, check: str, folders: dict[int, Path]) -> None:
    for rank, found in enumerate(outcomes(world, folders[world])):
        assert found.get(check, "not reached") == "fine", f"rank {rank}: {found.get(check, 'not reached')}"


def test_without_a_process_group() -> None:
    with pytest.raises(SchemeError, match="init_process_group"):
        arrondi.compress_gradients(network(), "qgz")
    with pytest.raises(SchemeError, match="init_process_group"):
        arrondi.compress_fsdp(torch.nn.Linear(2, 2))
