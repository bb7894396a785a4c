"""The same random numbers and one thread for every test of the runtime."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from arrondi.kernels import FORCE


@pytest.fixture(autouse=True)
def same_every_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(FORCE, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of these small models more would only wait for each other
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)
