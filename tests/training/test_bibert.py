"""BiBERT: bi-attention beside plain loops, what its bits say, distillation, and the checkpoint that is loaded on packed kernels."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import arrondi as ar
from arrondi import DataError, SchemeError, ShapeError
from arrondi.kernels import binary_linear, pack_signs, sign_tiles
from arrondi.model.bi_attention import bi_attention, half_attention
from arrondi.nn import QEmbedding, QLinear
from arrondi.training.bibert import binarize_bert, blocks_of
from arrondi.training.distill import Attended, attended, direction_loss, hidden_loss, soft_loss
from arrondi.training.latent import to_latent
from arrondi.training.models import pack

NONE = nn.Identity()


def states(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(shape), torch.randn(shape), torch.randn(shape)


def entropy(bits: torch.Tensor) -> float:
    p = float(bits.float().mean())
    return 0.0 if p in (0.0, 1.0) else float(torch.special.entr(torch.tensor([p, 1 - p])).sum()) / 0.6931472


def test_bi_attention_is_the_plain_loop() -> None:
    q, k, v = states(2, 2, 5, 8)
    k, v = k[:, :1], v[:, :1]  # one head of keys serves both
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[1, ..., 3:] = False
    found, weights = bi_attention(NONE, q, k, v, mask, scaling=8**-0.5)
    for b in range(2):
        for h in range(2):
            for i in range(5):
                total = torch.zeros(8)
                for j in range(5):
                    score = sum(1 if (q[b, h, i, d] >= 0) == (k[b, 0, j, d] >= 0) else -1 for d in range(8))
                    bit = bool(mask[b, 0, i, j]) and score >= 0
                    assert bool(weights[b, h, i, j]) == bit
                    total += bit * torch.where(v[b, 0, j] >= 0, 1.0, -1.0)
                assert torch.equal(found[b, i, h], total)
    added = torch.zeros(2, 1, 5, 5).masked_fill(~mask, -10000.0)
    assert torch.equal(bi_attention(NONE, q, k, v, added)[0], found)


def test_bits_of_attention_say_most_where_softmax_says_nothing() -> None:
    q, k, v = states(4, 4, 63, 33)
    _, weights = bi_attention(NONE, q, k, v, None)
    assert float(weights.mean()) == pytest.approx(0.5, abs=0.01) and entropy(weights) > 0.999
    soft = torch.softmax(q @ k.transpose(2, 3) / 33**0.5, -1)
    assert entropy(torch.sign(soft) > 0) == 0.0


@pytest.mark.parametrize("seen", [1, 4, 7, 8])
def test_half_of_a_row(seen: int) -> None:
    q, k, v = states(2, 3, 8, 6)
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    mask[..., :seen] = True
    q.requires_grad_()
    found, weights = half_attention(NONE, q, k, v, mask)
    assert bool((weights.sum(-1) == (seen + 1) // 2).all()) and not weights[..., seen:].any()
    scores = torch.where(q >= 0, 1.0, -1.0) @ torch.where(k >= 0, 1.0, -1.0).transpose(2, 3)
    kept = scores.masked_fill(weights == 0, 99).amin(-1)
    left = scores.masked_fill((weights == 1) | ~mask, -99).amax(-1)
    assert bool((kept >= left).all())
    found.sum().backward()
    assert q.grad is not None and bool(q.grad.isfinite().all())


def test_gradients_pass_scores_within_the_window() -> None:
    q, k, v = states(1, 1, 6, 16)
    q.requires_grad_()
    found, _ = bi_attention(NONE, q, k, v, None)
    g = torch.randn_like(found)
    (found * g).sum().backward()
    signs = [torch.where(t >= 0, 1.0, -1.0)[0, 0] for t in (q, k, v)]
    scores = signs[0] @ signs[1].T / 4
    wanted = (g[0, :, 0] @ signs[2].T * (scores.abs() <= 1)) @ signs[1] / 4 * (q[0, 0].detach().abs() <= 1)
    torch.testing.assert_close(q.grad[0, 0], wanted)


def test_a_layer_is_xnor_and_popcount() -> None:
    layer, x = to_latent(nn.Linear(100, 40), "bibert"), torch.randn(7, 100)
    w = layer.weight.detach()
    tiles = sign_tiles(pack_signs(w - w.mean(1, keepdim=True)))
    found = binary_linear(pack_signs(x), tiles, (40, 100), scale=w.abs().mean(1)) + layer.bias.detach()
    torch.testing.assert_close(layer(x).detach(), found, rtol=1e-5, atol=1e-5)


def test_direction_loss() -> None:
    one = [Attended(*states(2, 3, 7, 8)) for _ in range(2)]
    other = [Attended(*states(2, 3, 7, 16)) for _ in range(2)]
    mask = torch.ones(2, 7)
    mask[0, 5:] = 0
    loss = float(direction_loss(one, other, mask))
    scaled = [Attended(*(2.5 * t for t in a)) for a in one]
    assert float(direction_loss(scaled, other, mask)) == pytest.approx(loss, rel=1e-5)
    assert float(direction_loss(scaled, one, mask)) == pytest.approx(0, abs=1e-4)
    padded = [Attended(*(t.clone() for t in a)) for a in one]
    for t in padded[0]:
        t[0, :, 5:] = 99.0
    assert float(direction_loss(padded, other, mask)) == pytest.approx(loss, rel=1e-6)
    wanted = 0.0
    for a, b in zip(one, other, strict=True):  # written out for each head
        for x, y in zip(a, b, strict=True):
            for n in range(2):
                length = int(mask[n].sum())
                for h in range(3):
                    p, q = (t[n, h, :length] @ t[n, h, :length].T for t in (x, y))
                    wanted += float((p / p.norm() - q / q.norm()).norm()) / 6
    assert loss == pytest.approx(wanted, rel=1e-5)
    zero = torch.zeros(1, 1, 3, 4, requires_grad=True)
    direction_loss([Attended(zero, zero, zero)], [Attended(*states(1, 1, 3, 4))]).backward()
    assert zero.grad is not None and bool(zero.grad.isfinite().all())


def test_other_losses() -> None:
    h, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert float(hidden_loss([3 * h], [h], mask)) == pytest.approx(0, abs=1e-4)
    assert float(hidden_loss([-h], [h], mask)) == pytest.approx(2, rel=1e-4)
    logits = torch.randn(4, 3)
    own = soft_loss(logits, logits, 2.0)
    assert all(float(soft_loss(logits + torch.randn(4, 3), logits, 2.0)) > float(own) for _ in range(5))
    with pytest.raises(DataError, match="one list of layers"):
        hidden_loss([], [h])
    with pytest.raises(ShapeError, match="alike"):
        hidden_loss([h[:, :3]], [h])
    with pytest.raises(DataError, match="one list of layers"):
        direction_loss([], [])
    with pytest.raises(ShapeError, match="heads and tokens"):
        direction_loss([Attended(*states(1, 2, 3, 4))], [Attended(*states(1, 1, 3, 4))])


def perturbed(path: Path) -> nn.Module:
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return model.eval()


@pytest.mark.parametrize("half", [False, True])
def test_trained_saved_and_loaded_on_packed_kernels(half: bool, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=120, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, num_labels=3, max_position_embeddings=32
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "float")
    teacher = perturbed(tmp_path / "float")
    student = binarize_bert(copy.deepcopy(teacher), half=half).train()
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    batches = [torch.randint(1, 120, (2, n)) for n in (5, 12, 31)]
    for ids in batches:
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        with attended(student) as own, attended(teacher) as wanted:
            a = student(ids, attention_mask=mask, output_hidden_states=True)
            b = teacher(ids, attention_mask=mask, output_hidden_states=True)
        assert len(own) == len(wanted) == 2
        loss = direction_loss(own, wanted, mask) + hidden_loss(a.hidden_states, b.hidden_states, mask)
        optimizer.zero_grad()
        (loss + soft_loss(a.logits, b.logits)).backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in student.parameters())
        optimizer.step()
    student.eval()
    with torch.no_grad():
        trained = [student(ids).logits for ids in batches]
        pack(student)
        packed = [student(ids).logits for ids in batches]
        ar.save(student, tmp_path / "out")
        loaded = ar.load(tmp_path / "out")
        again = [loaded(ids).logits for ids in batches]
    for one, two, three in zip(trained, packed, again, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(two, three, rtol=1e-5, atol=1e-5)
    query = loaded.bert.encoder.layer[0].attention.self.query
    assert isinstance(query, QLinear) and str(query.inputs) == "binary/tensor/static"
    assert isinstance(loaded.bert.embeddings.word_embeddings, QEmbedding)
    named = json.loads((tmp_path / "out" / "config.json").read_text())["attn_implementation"]
    assert named == ("arrondi-bi-half" if half else "arrondi-bi")


def test_what_is_no_encoder(models: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(SchemeError, match="encoder of transformers"):
        binarize_bert(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(SchemeError, match="no list of blocks"):
        blocks_of(nn.Sequential(nn.Linear(3, 3)))
    llama = AutoModelForCausalLM.from_pretrained(models("llama"))
    assert blocks_of(llama) == "model.layers"
    llama.config._attn_implementation = "flash_attention_2"
    with pytest.raises(SchemeError, match="is sdpa, eager or"), attended(llama):
        pass
