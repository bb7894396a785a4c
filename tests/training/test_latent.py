"""Latent layers: the same parameters as before, the same outputs when they are packed, saved and loaded."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import arrondi as ar
from arrondi import SchemeError
from arrondi.nn import DenseLinear, QConv, QEmbedding, QLinear
from arrondi.runtime.modules import load_into
from arrondi.training.latent import LATENT, LatentLinear, to_latent, to_plain
from arrondi.training.models import make_latent, make_plain, pack, split_ternary


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(90, 48)
        self.conv = nn.Conv2d(1, 24, 3, padding=1, stride=2)
        self.up = nn.Linear(48, 130)
        self.down = nn.Linear(130, 48, bias=False)
        self.head = nn.Linear(48, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = x + self.conv(x.unsqueeze(1)).mean((1, 3))[:, : x.shape[1], None].repeat(1, 2, 1)[:, : x.shape[1]]
        x = x + self.down(torch.tanh(self.up(x)))
        return self.head(torch.relu(x))


LAYERS = ("table", "conv", "up", "down")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("twn", {}),
    ("twn", {"rows": False, "threshold": None}),
    ("bitnet", {}),
    ("terdit", {}),
    ("terdit", {"inputs": "int4/tensor"}),
    ("binary", {}),
    ("binary", {"rows": False, "inputs": "int8/tensor"}),
    ("bibert", {}),
]


@pytest.mark.parametrize(("method", "options"), CASES)
def test_packed_saved_and_loaded_they_are_one_function(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, ids = make_latent(Net(), method, targets=LAYERS, **options), torch.randint(0, 90, (5, 7))
    if method == "terdit":
        with torch.no_grad():
            model.up.alpha.neg_()
    wanted = model(ids).detach()
    plain = make_plain(copy.deepcopy(model), rounded=True)
    assert type(plain.up) is nn.Linear
    # Products of signs take their scale afterwards, so that their sums are whole numbers.
    near = {"rtol": 1e-5, "atol": 1e-6} if method == "bibert" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(plain(ids).detach(), wanted, **near)
    scheme = model.up.scheme
    ordinary = plain if scheme.inputs is not None and not scheme.inputs.dynamic else None
    packed = pack(model)
    assert [type(packed.get_submodule(n)) for n in LAYERS] == [QEmbedding, QConv, QLinear, QLinear]
    torch.testing.assert_close(packed(ids).detach(), wanted, rtol=1e-5, atol=1e-5)
    ar.save(packed, tmp_path / "out")
    loaded = load_into(Net(), tmp_path / "out")
    assert torch.equal(loaded(ids), packed(ids))
    assert (
        isinstance(loaded.up, QLinear) and loaded.up.meta.scheme == scheme.weights and loaded.up.inputs == scheme.inputs
    )
    if ordinary is None:  # what the pipeline makes of the rounded weights is the same, code for code
        for name in ("up", "down"):
            layer = plain.get_submodule(name)
            layer._forward_pre_hooks.clear()
        again = ar.quantize(plain, scheme, targets=("up", "down"))
        assert torch.equal(again.up.unpack().codes, packed.up.unpack().codes)
        torch.testing.assert_close(again.up.dequantize(), packed.up.dequantize(), rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    "layer", [nn.Linear(96, 40, bias=False), nn.Conv2d(6, 40, 4, bias=False)], ids=["linear", "conv"]
)
def test_a_sum_of_signs_that_is_zero_stays_zero(layer: nn.Module) -> None:
    """Half of 96 signs against the other half: α + α + … - α is no zero in float32, and the next layer asks for its sign."""
    x = torch.randn(64, 96) if isinstance(layer, nn.Linear) else torch.randn(64, 6, 4, 4)
    model = nn.Sequential(layer)
    make_latent(model, "bibert", targets=("0",))
    sums = nn.functional.linear(
        torch.where(x > 0, 1.0, -1.0).flatten(1), (layer.weight - layer.weight.flatten(1).mean(1).view(-1, *[1] * (layer.weight.ndim - 1))).sign().flatten(1)
    )  # fmt: skip
    zero = sums == 0
    assert int(zero.sum()) > 100
    assert bool((model(x).flatten(1)[zero] == 0).all())
    wanted = model(x).detach()
    torch.testing.assert_close(pack(model)(x), wanted)


@pytest.mark.parametrize("rows", [True, False])
def test_splitting_keeps_the_function(rows: bool, tmp_path: Path) -> None:
    model, ids = make_latent(Net(), "twn", targets=LAYERS, rows=rows), torch.randint(0, 90, (5, 7))
    wanted = model(ids).detach()
    latent = model.up.weight.detach().clone()
    split_ternary(model)
    assert model.up.method == "split" and model.table.method == "twn"
    torch.testing.assert_close(model.up.weight + model.up.weight_2, latent, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(ids).detach(), wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # as fine-tuning would: the halves are no longer alike
        model.up.weight_2.add_(torch.randn_like(model.up.weight_2) * 0.3)
    wanted = model(ids).detach()
    packed = pack(model)
    torch.testing.assert_close(packed(ids).detach(), wanted, rtol=1e-5, atol=1e-5)
    assert packed.up.meta.scheme.format.name == "lut2"
    ar.save(packed, tmp_path / "out")
    assert torch.equal(load_into(Net(), tmp_path / "out")(ids), packed(ids))


@pytest.mark.parametrize("method", LATENT)
def test_parameters_are_shared_and_named_as_before(method: str) -> None:
    model = Net()
    before = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    make_latent(model, method, targets=LAYERS)
    assert all(model.get_parameter(name) is p for name, p in before.items())
    old = model.up.weight.detach().clone()
    model(torch.randint(0, 90, (5, 7))).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
    optimizer.step()
    make_plain(model)
    assert set(model.state_dict()) == set(before) and type(model.conv) is nn.Conv2d
    assert model.up.weight is before["up.weight"] and not torch.equal(model.up.weight, old)


@pytest.mark.parametrize("method", LATENT)
def test_mixed_precision_and_checkpoints(method: str) -> None:
    model, ids = make_latent(Net(), method, targets=LAYERS), torch.randint(0, 90, (3, 5))
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.utils.checkpoint.checkpoint(model, ids, use_reentrant=False)
    y.float().square().sum().backward()
    found = [p.grad for p in model.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in found)
    assert model.up.weight.dtype == torch.float32


def test_a_norm_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 64))
    x = torch.randn(6, 40)
    make_latent(model, "bitnet", norm=True)
    with torch.no_grad():
        model[1].norm.weight.uniform_(0.5, 2)
    wanted = model(x).detach()
    assert torch.equal(make_plain(copy.deepcopy(model), rounded=True)(x).detach(), wanted)
    packed = pack(model)
    torch.testing.assert_close(packed(x).detach(), wanted, rtol=1e-5, atol=1e-5)
    assert isinstance(packed[1].linear, QLinear)


def test_bitnet_is_the_paper_s_product() -> None:
    layer, x = to_latent(nn.Linear(96, 32, bias=False), "bitnet"), torch.randn(9, 96)
    gamma = layer.weight.detach().abs().mean()
    t = torch.round(layer.weight.detach() / (gamma + 1e-6)).clamp(-1, 1)
    step = x.abs().amax(1, keepdim=True) / 127.5
    codes = torch.round(x / step).clamp(-128, 127)
    sums = (t.double() @ codes.double().T).T  # adds and subtracts, exact
    torch.testing.assert_close(layer(x).detach().double(), sums * gamma * step, rtol=1e-5, atol=1e-6)


def test_a_bitnet_of_transformers(tmp_path: Path) -> None:
    from transformers import BitNetConfig, BitNetForCausalLM

    config = BitNetConfig(
        vocab_size=150, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = BitNetForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    make_latent(model, "bitnet")
    inputs: dict[str, torch.Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LatentLinear):
            layer.register_forward_hook(
                lambda _, x, y, n=name: inputs.update({n: x[0].detach(), f"{n} out": y.detach()})
            )
    assert type(model.lm_head) is nn.Linear
    model(torch.randint(1, 150, (2, 9)))
    seen = dict(inputs)
    with torch.no_grad():
        ar.save(pack(model), tmp_path / "out")
        loaded = ar.load(tmp_path / "out", fuse=False)
        for ids in (torch.randint(1, 150, (2, n)) for n in (1, 17)):
            torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    for name in (n for n in seen if not n.endswith(" out")):  # whole models differ where a 1e-7 crosses a step of int8
        torch.testing.assert_close(loaded.get_submodule(name)(seen[name]), seen[f"{name} out"], rtol=1e-5, atol=1e-5)


def test_what_is_meant_where_nothing_is_said() -> None:
    model = make_latent(Net(), "twn")
    assert [type(model.get_submodule(n)).__name__ for n in LAYERS] == [
        "Embedding",
        "LatentConv2d",
        "LatentLinear",
        "LatentLinear",
    ]
    assert isinstance(make_latent(nn.Sequential(nn.Linear(16, 16)), "twn")[0], LatentLinear)  # no convolution is missed


def test_shared_layers_copies_and_hooks() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2] = model[0]
    calls: list[int] = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    make_latent(model, "twn")
    assert model[2] is model[0] and isinstance(model[0], LatentLinear)
    model(torch.randn(2, 16))
    handle.remove()
    model(torch.randn(2, 16))
    assert len(calls) == 2
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    x = torch.randn(2, 16)
    assert torch.equal(again(x), model(x))


def test_layers_that_compute_something_of_their_own_stay() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Doubled(16, 16), nn.Linear(16, 16), DenseLinear(16, 16))
    with pytest.warns(UserWarning, match=r"stay in float: 0 \(Doubled computes"):
        make_latent(model, "twn")
    assert [type(m) for m in model] == [Doubled, LatentLinear, LatentLinear]


def test_bad_input() -> None:
    model = Net()
    with pytest.raises(SchemeError, match="method"):
        make_latent(model, "twin")
    with pytest.raises(SchemeError, match="option of twn"):
        make_latent(model, "twn", windows=1.0)
    with pytest.raises(SchemeError, match="finds no layer"):
        make_latent(model, "twn", targets=["upp"])
    with pytest.raises(SchemeError, match="has no layer that"):
        make_latent(nn.Sequential(nn.ReLU()), "twn", targets=[])
    with pytest.raises(SchemeError, match="already"):
        to_latent(to_latent(nn.Linear(3, 3), "twn"), "twn")
    with pytest.raises(SchemeError, match="computes something else"):
        to_latent(nn.Bilinear(3, 3, 3), "twn")
    with pytest.raises(SchemeError, match="Drop 'norm'"):
        to_latent(nn.Conv2d(3, 3, 1), "bitnet", norm=True)
    with pytest.raises(SchemeError, match="no layer that was trained"):
        pack(Net())
    with pytest.raises(SchemeError, match="no ternary layer"):
        split_ternary(make_latent(Net(), "binary"))
    with pytest.raises(SchemeError, match="inputs of convolutions"):
        pack(make_latent(Net(), "binary", targets=["conv"], inputs="int8/token"))
    model = make_latent(Net(), "bitnet", targets=["up", "head"])
    with pytest.raises(SchemeError, match="only 3 outputs"):
        pack(model)
    assert isinstance(model.up, LatentLinear)  # as it was
    assert type(make_latent(Net(), "bitnet").head) is nn.Linear
    plain = to_plain(to_latent(nn.Linear(8, 8), "terdit"), rounded=False)
    assert set(plain.state_dict()) == {"weight", "bias"}
