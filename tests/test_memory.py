"""What a loaded model occupies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import arrondi
from arrondi.nn import QLinear


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_loaded_4_bit_model_takes_less_than_40_percent_of_bfloat16(dtype: str, tmp_path: Path) -> None:
    arrondi.quantize(arrondi.sample_path(), "W4A16", out=tmp_path / "w4")
    model = arrondi.load(tmp_path / "w4", dtype=dtype)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]
    }
    original = sum(t["bytes"] for t in arrondi.inspect(arrondi.sample_path())["tensors"])
    embedding = model.get_input_embeddings().weight
    if dtype == "float32":  # the embedding is not quantized and doubles; everything else must still be small
        assert sum(storages.values()) - embedding.nbytes < 0.4 * (original - embedding.numel() * 2)
    else:
        assert sum(storages.values()) < 0.4 * original
    linears = [m for m in model.modules() if isinstance(m, QLinear)]
    assert len(linears) == 28
    assert all(p.numel() != m.in_features * m.out_features for m in linears for p in [*m.parameters(), *m.buffers()])
    assert torch.isfinite(model(input_ids=torch.arange(8)[None]).logits).all()
