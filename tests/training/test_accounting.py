"""The figures of BiBERT by our own count, and the count held against transformers' own model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel

from arrondi import SchemeError
from arrondi.training.accounting import Encoder, float_cost, one_bit_cost
from arrondi.training.bibert import binarize_bert
from arrondi.training.models import pack


def test_figures_of_the_paper() -> None:
    whole, bits = float_cost(), one_bit_cost()
    assert whole.bytes / 2**20 == pytest.approx(418, abs=0.5) and bits.bytes / 2**20 == pytest.approx(13.4, abs=0.05)
    assert whole.bytes / bits.bytes == pytest.approx(31.2, rel=0.005)
    assert whole.operations / 1e9 == pytest.approx(22.5, rel=0.01) and bits.operations / 1e9 == pytest.approx(
        0.4, rel=0.01
    )
    assert whole.operations / bits.operations == pytest.approx(56.3, rel=0.01)


def test_what_the_figure_leaves_out() -> None:
    assert float_cost().bytes / one_bit_cost(everything=True).bytes == pytest.approx(23.8, abs=0.05)


def test_sizes_are_those_of_the_model() -> None:
    config = BertConfig()
    with torch.device("meta"):
        model = BertModel(config)
    assert float_cost(Encoder.of(config)).bytes == 4 * sum(p.numel() for p in model.parameters())
    with pytest.raises(SchemeError, match="hidden_size"):
        Encoder.of(SimpleNamespace(num_hidden_layers=2))


def test_bytes_are_those_of_a_packed_model() -> None:
    config = BertConfig(
        vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    model = pack(binarize_bert(BertModel(config)))
    held = sum(p.numel() * 4 for p in model.parameters())
    held += sum(m.unpack().stored_bits // 8 for m in model.modules() if hasattr(m, "unpack"))
    assert held == one_bit_cost(Encoder.of(config), everything=True).bytes
