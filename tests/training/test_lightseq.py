"""LightSeq's int8 layers: what they train, and what integer inference makes of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import arrondi
from arrondi.errors import SchemeError, ShapeError
from arrondi.kernels.clipping import clip_codes, half_up, marks, narrow
from arrondi.nn import QConv, QLinear
from arrondi.training import convert_to_lowbit_training, learned_state, load_learned_state, training_report
from arrondi.training.lightseq import (
    IntegerLinear,
    LightSeqDecoderLayer,
    LightSeqEncoderLayer,
    LightseqOptions,
    to_integers,
    use_lightseq_layers,
)
from arrondi.training.lightseq.attention import int8_linear
from arrondi.training.lightseq.packed import to_packed

WIDTH, HEADS = 32, 4


def perturbed(module: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


def encoder(norm_first: bool = False, activation: Any = "relu", **more: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    made = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 48, 0.0, activation, batch_first=True, norm_first=norm_first, **more
    )
    return perturbed(made)


def decoder(norm_first: bool = False, activation: Any = "relu", **more: Any) -> nn.TransformerDecoderLayer:
    torch.manual_seed(0)
    made = nn.TransformerDecoderLayer(
        WIDTH, HEADS, 48, 0.0, activation, batch_first=True, norm_first=norm_first, **more
    )
    return perturbed(made)


def clipping(module: nn.Module) -> None:
    """Clips at which a good share of everything is clipped."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith(("lowbit_clip", "states.clip")):
                p.mul_(0.5)


# ---- a layer, by a computation of its own in float64 ----


def fake(x: torch.Tensor, clip: torch.Tensor, unsigned: bool = False) -> torch.Tensor:
    """Rounded and back; autograd's gradient of it is the learned clip's."""
    low = 0 if unsigned else -clip
    scale, shift = (254, 127) if unsigned else (127, 0)
    codes = ((x.detach().float() * (scale / clip.detach().float())) - shift + 0.5).floor().clamp(-127, 127).double()
    there = (codes + shift) * clip.detach() / scale
    inside = (x < clip) & (x >= 0 if unsigned else x > low)
    ends = torch.where(x > 0, clip, -clip if not unsigned else clip.detach() * 0)
    return torch.where(inside, x + (there - x).detach(), ends)


def twin(x: torch.Tensor, linear: Any, clip: torch.Tensor) -> torch.Tensor:
    """What a layer of `lightseq` computes."""
    options, kept = linear.lowbit.layer.options, linear.lowbit.layer.kept
    weight = linear.weight
    of_weight = weight + (fake(weight.detach(), 1.0000001 * weight.detach().abs().max()) - weight).detach()
    y = fake(x, clip, options.inputs == "unsigned") @ of_weight.T
    if options.outputs == "int8":
        out = kept["clip_out"].double()
        rounded = (127 * y.detach() / out + 0.5).floor().clamp(-127, 127) * out / 127
        y = torch.where(127 * y.detach().abs() / out < 127, y + (rounded - y).detach(), rounded)
    return y + linear.bias


@pytest.mark.parametrize("options", [LightseqOptions(), LightseqOptions("int32"), LightseqOptions("int32", "unsigned")])
def test_a_layer_is_its_fake_quantized_twin(options: LightseqOptions) -> None:
    torch.manual_seed(0)
    layer = int8_linear(torch.randn(24, 40, dtype=torch.float64), torch.randn(24, dtype=torch.float64), options)
    first = torch.randn(3, 7, 40, dtype=torch.float64)
    layer(first.relu() if options.inputs == "unsigned" else first)
    clipping(layer)
    for length in (1, 5, 9):
        x = (torch.randn(2, length, 40, dtype=torch.float64)).requires_grad_()
        given = x.relu() if options.inputs == "unsigned" else x
        clip = layer.lowbit_clip
        y, expected = layer(given), twin(given, layer, clip.double())
        near = (y - expected).abs() < 1e-5 * expected.abs().max()
        assert near.float().mean() > 0.99
        slope = torch.randn_like(y)
        sides = (x, layer.weight, layer.bias, clip)
        found = torch.autograd.grad(y, sides, slope, retain_graph=True)
        wanted = torch.autograd.grad(expected, sides, slope)
        for one, two in zip(found, wanted, strict=True):
            assert torch.allclose(one.double(), two.double(), rtol=1e-4, atol=1e-4 * float(two.abs().max()))


def test_the_clip_learns_what_finite_differences_say() -> None:
    """Where everything is beyond the clip, its gradient is exact."""
    torch.manual_seed(0)
    layer = int8_linear(torch.randn(8, 16), None, LightseqOptions("int32"))
    x = torch.randn(5, 16).sign() * (2 + torch.rand(5, 16))
    layer(x)
    slope = torch.randn(5, 8)
    with torch.no_grad():
        layer.lowbit_clip.fill_(1.0)
    (found,) = torch.autograd.grad(layer(x), layer.lowbit_clip, slope)
    values = []
    for clip in (0.99, 1.01):
        with torch.no_grad():
            layer.lowbit_clip.fill_(clip)
            values.append(float((layer(x) * slope).sum()))
    assert float(found) == pytest.approx((values[1] - values[0]) / 0.02, rel=1e-3)
    by_x = torch.autograd.grad(layer(x.requires_grad_()), x, slope)[0]
    assert not by_x.any()


def test_codes_are_rounded_half_up_and_marked() -> None:
    clip = torch.tensor(127.0)
    x = torch.tensor([[-127.0, -128.0, -126.9, -2.5, -1.5, -0.5, 0.49999997, 0.5, 1.5, 126.5, 127.0, 300.0]])
    codes, beyond = clip_codes(x, clip, marked=True)
    assert codes[0].tolist() == [-127, -127, -127, -2, -1, 0, 0, 1, 2, 127, 127, 127]
    assert beyond is not None and beyond.shape == (1, 2) and beyond.dtype == torch.uint8
    assert marks(beyond, 12)[0].nonzero()[:, 0].tolist() == [0, 1, 10, 11]
    codes, beyond = clip_codes(torch.tensor([[-1.0, 0.0, 63.5, 126.9, 127.0, 999.0]]), clip, unsigned=True, marked=True)
    assert codes[0].tolist() == [-127, -127, 0, 127, 127, 127]
    assert beyond is not None and marks(beyond, 6)[0].nonzero()[:, 0].tolist() == [0, 1, 4, 5]
    sums = torch.tensor([[-1000, -3, 5, 254, 1000]], dtype=torch.int32)
    assert narrow(sums, torch.tensor(0.5)).codes[0].tolist() == [-127, -1, 3, 127, 127]
    assert half_up(torch.tensor([float("nan"), float("inf")])).tolist() == [-127, 127]


def test_after_a_relu_the_offset_is_exact_and_wants_int32() -> None:
    """Relative errors near the specification's: int32 sums 0.0100, a byte for sums without the offset 0.0198, the offset of
    weights that were not rounded 0.0215."""
    torch.manual_seed(0)
    weight, x = torch.randn(64, 256, dtype=torch.float64), torch.randn(512, 256, dtype=torch.float64).relu()
    clip, clip_weight = x.max(), weight.abs().max()
    codes = clip_codes(x, clip, unsigned=True).codes.double()
    of_weight = clip_codes(weight, clip_weight).codes.double()
    there, rounded = (codes + 127) * clip / 254, of_weight * clip_weight / 127
    sums = codes @ of_weight.T * (clip * clip_weight / (2 * 127**2))
    offset = clip / 2 * rounded.sum(1)
    assert torch.allclose(sums + offset, there @ rounded.T, rtol=1e-12)
    layer = int8_linear(weight.float(), None, LightseqOptions("int32", "unsigned"))
    assert torch.allclose(layer(x.float()).double(), there @ rounded.T, atol=1e-4)
    exact = x @ weight.T

    def lost(y: torch.Tensor) -> float:
        return float((y - exact).norm() / exact.norm())

    unit = sums.abs().max() / 127
    narrowed = (sums / unit + 0.5).floor().clamp(-127, 127) * unit
    errors = lost(sums + offset), lost(narrowed + offset), lost(sums + clip / 2 * weight.sum(1))
    assert errors[0] < 0.75 * errors[1] and errors[0] < 0.75 * errors[2]
    assert errors[0] < 0.015


def test_what_is_kept_for_the_way_back() -> None:
    """A byte and a bit for each number that enters, a bit for each that leaves."""
    layer = int8_linear(torch.randn(64, 96), torch.randn(64), LightseqOptions())
    kept: list[torch.Tensor] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    x = torch.randn(4, 50, 96)
    layer(x)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    by_size = sorted(t.nbytes for t in kept)
    assert by_size[-4:] == sorted([200 * 96, 200 * 96 // 8, 64 * 96, 200 * 64 // 8])
    assert sum(by_size[:-4]) <= 16


def test_clips_follow_and_are_saved() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(16, 8))
    convert_to_lowbit_training(layer, "lightseq")
    assert "int32 → int8" in training_report(layer)[0].arithmetic[0]
    x = torch.randn(64, 16)
    layer(x)
    state = learned_state(layer)
    assert float(state["0.clip"]) == float(x.abs().max())
    with torch.no_grad():
        layer(100 * x)
    assert float(learned_state(layer)["0.clip_out"]) == float(state["0.clip_out"])  # evaluation leaves clips alone
    layer(x / 2).sum().backward()
    after = learned_state(layer)
    assert float(after["0.clip_out"]) < float(state["0.clip_out"])
    with torch.no_grad():
        layer[0].lowbit_clip.fill_(-1.0)
    assert torch.isfinite(layer(x)).all()
    load_learned_state(layer, state)
    assert float(layer[0].lowbit_clip.detach()) == float(state["0.clip"])


# ---- as ordinary packed layers ----


def lines(width: int = 24) -> nn.Sequential:
    torch.manual_seed(4)
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 36, width), nn.ReLU(), nn.Linear(width, 5)
    )
    return perturbed(made)


def test_trained_layers_are_saved_as_packed_ones(tmp_path: Path) -> None:
    model = lines()
    convert_to_lowbit_training(model, "lightseq", outputs="int32")
    model(2 * torch.randn(20, 3, 6, 6))
    x = torch.randn(7, 3, 6, 6)
    y = model(x).detach()
    rows = to_packed(model)
    assert [row.name for row in rows] == ["0", "2", "4"] and all(len(row.lost) == 1 for row in rows)
    assert type(model[2]) is QLinear and type(model[0]) is QConv
    assert torch.allclose(model(x), y, atol=1e-5)
    arrondi.save(model, tmp_path / "out")
    again = arrondi.load(tmp_path / "out", model=lines())
    assert torch.equal(again(x), model(x))


def test_after_a_relu_a_packed_layer_has_a_zero_point() -> None:
    model = lines()
    convert_to_lowbit_training(model, "lightseq", ignore=("0", "2"), outputs="int32", inputs="unsigned")
    model(2 * torch.randn(20, 3, 6, 6))
    x = torch.randn(7, 3, 6, 6)
    y = model(x).detach()
    to_packed(model)
    assert int(model[4].input_zero_point) == -127
    assert torch.allclose(model(x), y, atol=1e-5)
    narrowed = lines()
    convert_to_lowbit_training(narrowed, "lightseq")
    with pytest.raises(SchemeError, match="no batch"):
        to_packed(narrowed)
    narrowed(x)
    y = narrowed(x).detach()
    assert any("not rounded" in lost for lost in to_packed(narrowed)[0].lost)
    assert 1e-4 < (narrowed(x) - y).norm() / y.norm() < 0.05
    with pytest.raises(SchemeError, match="convert it first"):
        to_packed(narrowed)


# ---- whole layers ----


def masks(batch: int, length: int) -> list[dict[str, Any]]:
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[0, length // 2 + 1 :] = True
    causal = nn.Transformer.generate_square_subsequent_mask(length)
    return [{}, {"mask": causal}, {"mask": causal == float("-inf"), "padding": padding}, {"padding": padding}]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", nn.ReLU()])
def test_encoder_layers(norm_first: bool, activation: Any) -> None:
    plain = encoder(norm_first, activation)
    layer = LightSeqEncoderLayer.from_torch(plain)
    torch.manual_seed(1)
    layer(
        torch.randn(8, 32, WIDTH), is_causal=True
    )  # the first token sees itself alone, which gives the largest numbers
    exported = layer.export()
    assert layer.linear2.lowbit.layer.options.inputs == ("signed" if activation == "gelu" else "unsigned")
    assert not any(t.is_floating_point() and t.dim() > 1 for t in exported.state_dict().values())
    for batch, length in ((2, 9), (3, 5), (1, 1)):
        x = torch.randn(batch, length, WIDTH)
        for how in masks(batch, length):
            given = {"src_mask": how.get("mask"), "src_key_padding_mask": how.get("padding")}
            y, reference = layer(x, **given).detach(), plain.train()(x, **given).detach()
            seen = ~how.get("padding", torch.zeros(batch, length, dtype=torch.bool))
            assert (y - reference)[seen].norm() / reference[seen].norm() < 0.04
            assert torch.allclose(exported(x, **given), y, atol=1e-5)
    table = layer.clips()
    assert table.shape == (12,) and table[11] == 0 and (table[:11] > 0).all()
    assert torch.equal(exported.clips(), table)
    assert float(table[0]) == float(plain.self_attn.in_proj_weight.detach().abs().max())


def test_layers_train_and_export_what_they_learned() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([LightSeqEncoderLayer.from_torch(encoder()), LightSeqDecoderLayer.from_torch(decoder())])
    x, y, wanted = torch.randn(4, 6, WIDTH), torch.randn(4, 5, WIDTH), torch.randn(4, 5, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    model[1](y, model[0](x))
    clipping(model)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (model[1](y, model[0](x), tgt_mask=mask) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    exported = [layer.eval().export() for layer in model]
    memory = model[0](x)
    assert torch.allclose(exported[0](x), memory, atol=1e-5)
    assert torch.allclose(exported[1](y, memory, tgt_mask=mask), model[1](y, memory, tgt_mask=mask), atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decoder_step_by_step_is_its_whole_forward(norm_first: bool, dtype: torch.dtype) -> None:
    plain = decoder(norm_first, "relu" if norm_first else "gelu").to(dtype)
    layer = LightSeqDecoderLayer.from_torch(plain)
    torch.manual_seed(2)
    layer(torch.randn(2, 9, WIDTH, dtype=dtype), torch.randn(2, 7, WIDTH, dtype=dtype))
    clipping(layer.self_attn.states)
    exported = layer.export()
    assert exported.clips().shape == (19,) and exported.memory_clips().shape == (3,)
    assert exported.clips()[17] == 0 and float(exported.clips()[18]) == float(layer.self_attn.states.clip.detach())
    for batch, length, other in ((3, 8, 6), (1, 5, 7)):  # one text takes the compiled attention
        x, memory = torch.randn(batch, length, WIDTH, dtype=dtype), torch.randn(batch, other, WIDTH, dtype=dtype)
        padding = torch.zeros(batch, other, dtype=torch.bool)
        padding[0, 4:] = True
        whole = layer(x, memory, tgt_is_causal=True, memory_key_padding_mask=padding).detach()
        again = exported(x, memory, tgt_is_causal=True, memory_key_padding_mask=padding)
        assert torch.allclose(again, whole, atol=1e-5)
        state = exported.begin(memory, padding)
        steps = torch.cat([exported.step(x[:, i : i + 1], state) for i in range(length)], 1)
        away = (steps - whole).abs()
        # Where sums are added up in another order, a code may fall to the other side of a tie.
        assert (away < 1e-5).all() if dtype == torch.float64 else (away < 1e-5).float().mean() > 0.98
        assert state.tokens == length and state.bytes_used() == 2 * batch * WIDTH * (32 + other)  # room by 32 tokens
        assert away.max() < 0.05


def test_beams_are_reordered_in_bytes() -> None:
    layer = LightSeqDecoderLayer.from_torch(decoder()).double()
    torch.manual_seed(3)
    x, memory = torch.randn(3, 6, WIDTH).double(), torch.randn(3, 4, WIDTH).double()
    layer(x, memory)
    exported, rows = layer.export(), torch.tensor([2, 0, 0])
    state = exported.begin(memory)
    for i in range(4):
        exported.step(x[:, i : i + 1], state)
    state.select(rows)
    last = exported.step(x[rows, 4:5], state)
    assert torch.allclose(last, exported(x[rows, :5], memory[rows], tgt_is_causal=True)[:, -1:], atol=1e-5)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_layers_take_the_places_of_pytorchs() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, HEADS, 1, 1, 48, 0.0)  # (tokens, batch, width)
    perturbed(model)
    reference = copy.deepcopy(model)
    assert use_lightseq_layers(model) == ["encoder.layers.0", "decoder.layers.0"]
    x, y = torch.randn(7, 2, WIDTH), torch.randn(5, 2, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    out, expected = model(x, y, tgt_mask=mask), reference(x, y, tgt_mask=mask)
    assert (out - expected).norm() / expected.norm() < 0.05
    to_integers(model)
    assert isinstance(model.encoder.layers[0].linear1, IntegerLinear)
    assert torch.allclose(model.eval()(x, y, tgt_mask=mask), out, atol=1e-5)


def test_what_is_not_finite_is_not_hidden() -> None:
    layer = LightSeqDecoderLayer.from_torch(decoder())
    x, memory = torch.randn(2, 4, WIDTH), torch.randn(2, 3, WIDTH)
    layer(x, memory)
    x[1, 2, 5] = float("nan")
    for module in (layer, layer.export()):
        y = module(x, memory)
        assert torch.isfinite(y[0]).all() and not torch.isfinite(y[1, 2]).any()


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(SchemeError, match="wasted"):
        LightseqOptions("int8", "unsigned")
    with pytest.raises(SchemeError, match="speed"):
        LightseqOptions(speed=2.0)
    with pytest.raises(SchemeError, match=r"nn\.TransformerEncoderLayer"):
        LightSeqEncoderLayer.from_torch(decoder())
    with pytest.raises(SchemeError, match=r"nn\.TransformerDecoderLayer"):
        LightSeqDecoderLayer.from_torch(nn.Linear(2, 2))
    layer = LightSeqEncoderLayer.from_torch(encoder())
    with pytest.raises(SchemeError, match="run a batch"):
        layer.export()
    with pytest.raises(ShapeError, match="three dimensions"):
        layer(torch.randn(4, WIDTH))
    with pytest.raises(ShapeError, match="mask of attention"):
        layer(torch.randn(2, 4, WIDTH), torch.zeros(3, 3))
    with pytest.raises(ShapeError, match="padding"):
        layer(torch.randn(2, 4, WIDTH), None, torch.zeros(4, 2, dtype=torch.bool))
    trained = LightSeqDecoderLayer.from_torch(decoder())
    with pytest.raises(SchemeError, match="export"):
        trained.begin(torch.randn(1, 3, WIDTH))
    with pytest.raises(SchemeError, match="has no nn"):
        use_lightseq_layers(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(SchemeError, match="convert it first"):
        to_integers(nn.Sequential(nn.Linear(2, 2)))
    conv = nn.Sequential(nn.Conv2d(3, 4, 3))
    convert_to_lowbit_training(conv, "lightseq", outputs="int32", inputs="unsigned")
    with pytest.raises(SchemeError, match="convolution"):
        conv(torch.rand(1, 3, 8, 8))
    odd = nn.TransformerDecoderLayer(WIDTH, HEADS)
    odd.multihead_attn = nn.MultiheadAttention(WIDTH, HEADS, kdim=8, vdim=8)
    with pytest.raises(SchemeError, match="kdim"):
        LightSeqDecoderLayer.from_torch(odd)
