"""What llama.cpp does to inputs, against gguf-py and a plain loop; and that only products with stored weights are rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from arrondi.model import OnDisk
from arrondi.verification.predict import Stored, predict
from arrondi.verification.prompt import prompt_of
from arrondi.verification.roundings import Rounding, blocks_of_32, blocks_of_256

X = torch.randn(7, 512, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, 7)[:, None]


def test_blocks_of_32_are_q8_0() -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(X.numpy(), kind), kind)
    np.testing.assert_allclose(blocks_of_32(X).numpy(), expected, rtol=0, atol=float(X.abs().max()) * 2**-30)


def test_blocks_of_256_by_a_plain_loop() -> None:
    found = blocks_of_256(X).reshape(-1, 256)
    for row, given in zip(X.reshape(-1, 256).numpy(), found.numpy(), strict=True):
        largest = row[np.abs(row).argmax()]
        codes = np.minimum(np.rint(row * np.float32(-127 / largest)), 127)
        assert codes.min() == -127
        np.testing.assert_allclose(given, codes * (largest / np.float32(-127)), rtol=1e-6)


def test_zeros_stay_zeros() -> None:
    for how in (blocks_of_32, blocks_of_256):
        assert not how(torch.zeros(2, 256)).any()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_every_product_with_a_stored_weight_is_rounded(name: str, models: Callable[..., Path]) -> None:
    """Doubling what every product reads doubles what it gives; experts in one parameter are no modules, and count as well."""
    source, seen = OnDisk.open(models(name)), []

    def watched(stored: Stored) -> Rounding:
        return Rounding(lambda x: seen.append(stored.dtype) or x)

    prompt = prompt_of(source)
    found = predict(source, prompt, {"plain": lambda stored: Rounding(), "watched": watched})
    assert found["plain"].likely is found["plain"].exact
    np.testing.assert_array_equal(found["watched"].likely["logits"], found["watched"].exact["logits"])
    layers = source.config["num_hidden_layers"]
    dense = 7 if name == "llama" else 5  # with the router, without the experts
    experts = len(seen) - dense * layers - 1
    assert experts == 0 if name == "llama" else experts >= 2 * layers
