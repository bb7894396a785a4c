"""What multiplies what is seen, whoever computes it and however the operands lie in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from arrondi.model import Chain, Inputs, OnDisk
from arrondi.model.flow import Use, find_stages, trace, watch


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(*shape: int, seed: int = 1) -> nn.Parameter:
    return nn.Parameter(random(*shape, seed=seed), requires_grad=False)


X = random(2, 3, 8)
W = weights(6, 8)
STACK = weights(3, 8, 6, seed=2)


def seen(call: Callable[[], object], params: Mapping[str, torch.Tensor]) -> list[tuple[Use, torch.Tensor]]:
    found: list[tuple[Use, torch.Tensor]] = []
    with watch(params, lambda use: found.append((use, use.x.clone()))):
        call()
    return found


def matrix(use: Use, params: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The part of the parameter that a use names, as (n, out): what its x is multiplied by."""
    whole = params[use.param]
    whole = whole if use.matrix is None else whole[use.matrix]
    if whole.ndim > 1:
        whole = whole[..., use.rows or slice(None), use.columns or slice(None)]
    return whole.T if use.reduces_last else whole


SINGLE: dict[str, tuple[Callable[[], torch.Tensor], bool]] = {
    "linear": (lambda: functional.linear(X, W), True),
    "linear by name": (lambda: functional.linear(input=X, weight=W), True),
    "linear with an (in, out) weight": (lambda: functional.linear(X[..., :6], W.T), False),
    "x @ W.T": (lambda: X @ W.T, True),
    "matmul": (lambda: torch.matmul(X, W.T), True),
    "method": (lambda: X.matmul(W.T), True),
    "mm": (lambda: X[0].mm(W.T), True),
    "x @ W": (lambda: X[..., :6] @ W, False),
    "addmm": (lambda: torch.addmm(torch.zeros(8), X[0, :, :6], W), False),
    "addmm with a factor": (lambda: torch.addmm(torch.zeros(3, 8), X[0, :, :6], W, beta=2), False),
    "W @ x": (lambda: (W @ X.mT).mT, True),
    "W.T @ x": (lambda: (W.T @ X[..., :6].mT).mT, False),
    "mv": (lambda: W.mv(X[0, 0]), True),
    "addmv": (lambda: torch.addmv(torch.zeros(6), W, X[0, 0]), True),
    "vector @ W": (lambda: X[0, 0, :6] @ W, False),
    "inner": (lambda: torch.inner(X, W), True),
    "linalg": (lambda: torch.linalg.matmul(X, W.T), True),
    "baddbmm": (lambda: torch.baddbmm(torch.zeros(2, 3, 6), X, W.T.expand(2, 8, 6)), True),
    "bmm with a repeated weight": (lambda: torch.bmm(X, W.T[None].expand(2, -1, -1)), True),
    "tensordot": (lambda: torch.tensordot(X, W, ([2], [1])), True),
    "tensordot of inner axes": (lambda: torch.tensordot(X[..., :6], W, 1), False),
    "einsum": (lambda: torch.einsum("btn,on->bto", X, W), True),
    "einsum, weight first": (lambda: torch.einsum("on,btn->bto", W, X), True),
    "einsum, (in, out)": (lambda: torch.einsum("...n,no->...o", X[..., :6], W), False),
    "einsum without an arrow": (lambda: torch.einsum("an,bn", X[0], W), True),
    "einsum with a list": (lambda: torch.einsum("btn,on->bto", [X, W]), True),
    "einsum in numbers": (lambda: torch.einsum(X, [0, 1, 2], W, [3, 2], [0, 1, 3]), True),
    "einsum of three": (lambda: torch.einsum("btn,n,on->bto", X, X[0, 0], W), True),
    "operator": (lambda: torch.ops.aten.mm(X[0], W.T), True),
}


@pytest.mark.parametrize("call", SINGLE)
@pytest.mark.parametrize("inference", [False, True], ids=["no grad", "inference mode"])
def test_a_product_with_a_parameter_is_reported_with_its_input(call: str, inference: bool) -> None:
    run, last = SINGLE[call]
    with torch.inference_mode(inference):
        ((use, x),) = seen(run, {"w": W})
        expected = run()
    assert (use.param, use.matrix, use.rows, use.columns) == ("w", None, None, None)
    assert use.reduces_last == last
    torch.testing.assert_close((x @ matrix(use, {"w": W})).reshape(expected.shape), expected)


def test_one_matrix_of_a_stack_is_told_from_the_others() -> None:
    params = {"stack": STACK}
    for e in range(3):
        for call in (lambda e=e: X[0] @ STACK[e], lambda e=e: functional.linear(X[0], STACK[torch.tensor(e)].T)):
            ((use, x),) = seen(call, params)
            assert (use.matrix, use.reduces_last) == (e, False)
            torch.testing.assert_close(x @ matrix(use, params), call())


WHOLE_STACK: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bmm": lambda x: torch.bmm(x, STACK),
    "@": lambda x: x @ STACK,
    "weight first": lambda x: (STACK.mT @ x.mT).mT,
    "einsum": lambda x: torch.einsum("etn,eno->eto", x, STACK),
    "einsum in another order": lambda x: torch.einsum("eno,tne->teo", STACK, x.permute(1, 2, 0)).transpose(0, 1),
    "operator": lambda x: torch.ops.aten.bmm(x, STACK),
}


@pytest.mark.parametrize("call", WHOLE_STACK)
def test_a_product_with_the_whole_stack_is_one_for_each_matrix(call: str) -> None:
    x = random(3, 5, 8, seed=3)
    found = seen(lambda: WHOLE_STACK[call](x), {"stack": STACK})
    assert [use.matrix for use, _ in found] == [0, 1, 2]
    for e, (use, rows) in enumerate(found):
        assert torch.equal(rows, x[e]) and not use.reduces_last
    assert len({use.reads for use, _ in found}) == 3


def test_one_input_of_a_whole_stack_is_the_same_for_each_matrix() -> None:
    found = seen(lambda: X[0] @ STACK, {"stack": STACK})
    assert [use.matrix for use, _ in found] == [0, 1, 2]
    assert all(torch.equal(x, X[0]) for _, x in found) and len({use.reads for use, _ in found}) == 1


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped products")
def test_grouped_products_give_every_matrix_its_rows() -> None:
    stack, x = weights(3, 16, 8).bfloat16(), random(12, 16).bfloat16()
    ends = torch.tensor([4, 4, 12], dtype=torch.int32)
    found = seen(lambda: torch._grouped_mm(x, stack, ends), {"stack": stack})
    assert [(use.matrix, len(rows)) for use, rows in found] == [(0, 4), (1, 0), (2, 8)]
    assert torch.equal(torch.cat([rows for _, rows in found]), x)


def test_heads_of_one_matrix_are_slices_of_its_rows() -> None:
    w, q = weights(6, 4), random(2, 3, 5, seed=4)
    heads = w.view(3, 2, 4)  # three heads of two rows
    found = seen(lambda: torch.einsum("bht,hdn,bhd->bhtn", q, heads, q[..., :2]), {"w": w})
    assert [use.rows for use, _ in found] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert all(not use.reduces_last and use.columns is None for use, _ in found)
    (use, x), *_ = seen(lambda: torch.einsum("btn,hdn->bthd", random(2, 3, 4), heads), {"w": w})
    assert (use.rows, use.reduces_last) == (None, True)
    output = random(2, 3, 6).view(2, 3, 3, 2)
    ((use, x),) = seen(lambda: torch.einsum("bthd,hdn->btn", output, heads), {"w": w})
    assert (use.rows, use.reduces_last) == (None, False)
    torch.testing.assert_close(x @ w, output.flatten(2) @ w)


def test_a_slice_of_a_parameter_is_named_by_its_indices() -> None:
    params = {"w": W}
    for part, rows, columns in (
        (lambda: functional.linear(X, W[2:5]), slice(2, 5), None),
        (lambda: functional.linear(X, W.chunk(3)[1]), slice(2, 4), None),
        (lambda: functional.linear(X[..., :3], W[:, 5:]), None, slice(5, 8)),
        (lambda: functional.linear(X[..., :4], W[::2, ::2]), slice(0, 5, 2), slice(0, 7, 2)),
    ):
        ((use, x),) = seen(part, params)
        assert (use.rows, use.columns) == (rows, columns)
        torch.testing.assert_close(x @ matrix(use, params), part())


def test_parameters_that_share_storage_are_told_apart() -> None:
    buffer = random(24, 8)
    params = {"q": buffer[:8], "k": buffer[8:16], "v": buffer[16:], "t": buffer[:8].T}
    for name in "qkv":
        ((use, _),) = seen(lambda name=name: functional.linear(X, params[name]), params)
        assert (use.param, use.rows) == (name, None)
    params["all"] = buffer
    assert [use.param for use, _ in seen(lambda: functional.linear(X, buffer), params)] == ["all"]
    assert [use.param for use, _ in seen(lambda: functional.linear(X, buffer[16:]), params)] == ["v"]
    tied = {"embed": W, "head": W}
    assert [use.param for use, _ in seen(lambda: functional.linear(X, W), tied)] == ["embed"]
    assert not seen(lambda: functional.linear(X, buffer[4:12]), {"q": buffer[:8], "k": buffer[8:16]}), "neither"


def test_a_storage_that_is_freed_is_not_taken_for_a_later_one() -> None:
    numbers = []
    with watch({"w": W}, lambda use: numbers.append(use.reads)):
        for seed in range(50):
            functional.linear(random(2, 3, 8, seed=seed), W)
    assert len(set(numbers)) == 50


CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "add_": lambda x: x.add_(1),
    "+=": lambda x: x.__iadd__(1),
    "item": lambda x: x.__setitem__(0, 1.0),
    "data": lambda x: x.data.mul_(2),
    "a view": lambda x: x[0].zero_(),
    "out": lambda x: torch.mul(x, 2, out=x),
    "relu": lambda x: functional.relu(x, inplace=True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("inference", [False, True], ids=["no grad", "inference mode"])
def test_an_input_changed_in_place_is_another_input(change: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        x = random(4, 8)

        def run() -> None:
            functional.linear(x, W)
            functional.linear(x[:], W)
            CHANGES[change](x)
            functional.linear(x, W)

        (first, a), (same, _), (other, b) = seen(run, {"w": W})
    assert first.reads == same.reads != other.reads
    assert not torch.equal(a, b)


def test_views_of_one_input_are_one_input_and_parts_of_it_are_not() -> None:
    k = weights(5, 8)

    def run() -> None:
        functional.linear(X, W)
        functional.linear(X.view(-1, 8), k)
        X[:, None] @ W.T
        W @ X[0].T
        functional.linear(X[0], k)
        functional.linear(X[1], k)
        functional.linear(X[0].T[:, :1].expand(8, 8), k)
        functional.linear(X.clone(), k)
        functional.linear(torch.mul(X, 2, out=torch.empty_like(X)), k)
        functional.linear(X, k)

    numbers = [use.reads for use, _ in seen(run, {"w": W, "k": k})]
    assert numbers[0] == numbers[1] == numbers[2] and numbers[3] == numbers[4]
    assert numbers[-1] == numbers[0] and len(set(numbers)) == 6


def test_a_weight_that_is_used_twice_is_reported_twice() -> None:
    square = weights(8, 8)
    moment = torch.zeros(8, 8)

    def report(use: Use) -> None:
        moment.add_(use.x.reshape(-1, 8).T @ use.x.reshape(-1, 8))

    with watch({"w": square}, report):
        y = functional.linear(functional.linear(X, square), square)
    first, second = X.reshape(-1, 8), (X @ square.T).reshape(-1, 8)
    torch.testing.assert_close(moment, first.T @ first + second.T @ second)
    torch.testing.assert_close(y, X @ square.T @ square.T)


GEOMETRIES = [
    (nn.Conv1d(6, 4, 3, stride=2, padding=1), (2, 6, 9)),
    (nn.Conv1d(6, 6, 4, padding=3, groups=6), (2, 6, 9)),
    (nn.Conv1d(6, 4, 3, padding="same", dilation=2), (6, 9)),
    (nn.Conv2d(3, 8, (2, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2)), (2, 3, 6, 7)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", groups=2, bias=False), (1, 4, 5, 5)),
    (nn.Conv3d(2, 3, (1, 2, 2), stride=(1, 2, 2)), (2, 2, 3, 4, 4)),
]


@pytest.mark.parametrize(("conv", "shape"), GEOMETRIES, ids=[str(c) for c, _ in GEOMETRIES])
@torch.no_grad()
def test_the_patches_of_a_convolution_give_its_result(conv: nn.Conv2d, shape: tuple[int, ...]) -> None:
    x = random(*shape)
    ((use, rows),) = seen(lambda: conv(x), {"w": conv.weight})
    assert (use.kind, use.reduces_last, use.groups) == ("convolution", True, conv.groups)
    filters = conv.weight.flatten(1).view(conv.groups, -1, conv.weight[0].numel())
    rows = rows if conv.groups > 1 else rows[None]
    flat = torch.cat([r @ f.T for r, f in zip(rows, filters, strict=True)], 1)  # (positions, out)
    flat = flat if conv.bias is None else flat + conv.bias
    expected = conv(x) if x.ndim == conv.weight.ndim else conv(x)[None]
    torch.testing.assert_close(flat, expected.movedim(1, -1).reshape(flat.shape))


@torch.no_grad()
def test_convolutions_share_an_input_if_their_patches_are_the_same() -> None:
    a, b, c = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 2, 3), nn.Conv2d(4, 6, 3, padding=1)
    x = random(1, 4, 5, 5)
    stages = find_stages({"a": a.weight, "b": b.weight, "c": c.weight}, lambda: (a(x), b(x), c(x)))
    assert [s.leaders for s in stages] == [{"a": "a", "b": "a"}, {"c": "c"}]


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_sums_over_channels(groups: int) -> None:
    conv = nn.ConvTranspose1d(4, 6, 2, stride=2, groups=groups, bias=False)  # patches do not overlap
    x = random(2, 4, 5)
    ((use, rows),) = seen(lambda: conv(x), {"w": conv.weight})
    assert (use.kind, use.reduces_last, use.groups) == ("convolution", False, groups)
    rows = rows if groups > 1 else rows[None]
    blocks = conv.weight.view(groups, 4 // groups, -1)  # (groups, in, out · kernel)
    y = torch.stack([r @ b for r, b in zip(rows, blocks, strict=True)], 1)  # (positions, groups, out · kernel)
    y = y.view(2, 5, 6, 2).permute(0, 2, 1, 3).reshape(2, 6, 10)
    torch.testing.assert_close(y, conv(x))


def test_an_embedding_is_reported_with_its_indices() -> None:
    ids = torch.tensor([[1, 4, 2]])
    embedding = nn.Embedding(6, 8)

    def run() -> None:
        functional.linear(embedding(ids), embedding.weight)

    (lookup, indices), (head, _) = seen(run, {"embed": embedding.weight})
    assert (lookup.kind, head.kind) == ("embedding", "linear") and torch.equal(indices, ids)
    assert [s.leaders for s in find_stages({"embed": embedding.weight}, run)] == [{"embed": "embed"}]


@torch.no_grad()
@pytest.mark.parametrize("both", [False, True], ids=["forward", "both directions"])
def test_every_step_of_a_recurrent_layer_is_seen(both: bool) -> None:
    layer = nn.LSTM(5, 4, num_layers=2, batch_first=True, bidirectional=both)
    x = random(2, 7, 5)
    params = dict(layer.named_parameters())
    moments: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()))

    def report(use: Use) -> None:
        rows = use.x.reshape(-1, use.x.shape[-1])
        assert use.kind == "recurrent" and use.reduces_last
        moments[use.param] = moments[use.param] + rows.T @ rows

    with watch({n: p for n, p in params.items() if p.ndim == 2}, report):
        y, _ = layer(x)

    def direction(x: torch.Tensor, suffix: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The equations of the layer: hidden states after every step, and the sum of h hᵀ before every step."""
        h = c = torch.zeros(2, 4)
        states, moment = [], torch.zeros(4, 4)
        for t in range(x.shape[1]):
            moment += h.T @ h
            gates = x[:, t] @ params[f"weight_ih_{suffix}"].T + params[f"bias_ih_{suffix}"]
            gates = gates + h @ params[f"weight_hh_{suffix}"].T + params[f"bias_hh_{suffix}"]
            i, f, g, o = gates.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
        return torch.stack(states, 1), moment

    for depth in range(2):
        inner = x.reshape(-1, x.shape[-1])
        outputs = []
        for suffix in [f"l{depth}", f"l{depth}_reverse"][: 1 + both]:
            flip = (1,) if suffix.endswith("reverse") else ()
            h, moment = direction(x.flip(flip), suffix)
            torch.testing.assert_close(moments[f"weight_ih_{suffix}"], inner.T @ inner)
            torch.testing.assert_close(moments[f"weight_hh_{suffix}"], moment)
            outputs.append(h.flip(flip))
        x = torch.cat(outputs, -1)
    torch.testing.assert_close(y, x)


@torch.no_grad()
def test_the_products_inside_of_torchs_attention_are_seen() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    params = {n: p for n, p in layer.named_parameters() if p.ndim == 2}
    (first, x), (second, rows) = seen(lambda: layer(X, X, X), params)
    assert (first.param, second.param) == ("in_proj_weight", "out_proj.weight")
    torch.testing.assert_close(x.reshape(-1, 8).T @ x.reshape(-1, 8), X.reshape(-1, 8).T @ X.reshape(-1, 8))
    y = layer(X, X, X)[0]
    result = (rows @ layer.out_proj.weight.T + layer.out_proj.bias).view(3, 2, 8)
    torch.testing.assert_close(result.reshape(-1, 2, 8).transpose(0, 1), y)
    found = trace(layer, params, lambda: layer(X, X, X)).bare
    assert found == dict.fromkeys(params, "multi_head_attention_forward in the model")


def test_a_cast_weight_is_still_the_weight() -> None:
    half, x = weights(6, 8).bfloat16(), X.bfloat16()
    params = {"w": half, "stack": STACK}
    flow = trace(None, params, lambda: functional.linear(x.float(), half.float()))
    assert [(u.param, u.reduces_last) for u in flow.uses] == [("w", True)] and flow.bare == {"w": "float"}
    flow = trace(None, params, lambda: X[0].double() @ STACK[1].double())
    assert [(u.param, u.matrix, u.reduces_last) for u in flow.uses] == [("stack", 1, False)]
    flow = trace(None, params, lambda: x.float() @ half.T.to(torch.float32, copy=True).contiguous())
    assert [(u.param, u.reduces_last, u.rows) for u in flow.uses] == [("w", True, None)]


def test_other_tensors_are_not_reported() -> None:
    other = random(6, 8)
    assert seen(lambda: X @ other.T, {"w": W}) == []
    assert seen(lambda: W + 1, {"w": W}) == []
    assert seen(lambda: torch.einsum("on->o", W), {"w": W}) == []
    assert seen(lambda: torch.einsum("on,om->nmo", W, other), {"w": W}) == [], "nothing is summed over"
    calls: list[Use] = []
    with watch({"w": W}, calls.append):
        pass
    assert (X @ W.T).shape == (2, 3, 6) and calls == [], "and nothing is watched afterwards"


def test_stages_are_in_the_order_of_use_and_share_inputs() -> None:
    q, k, o = (weights(8, 8, seed=s) for s in range(3))
    unused = weights(8, 8)

    def block() -> torch.Tensor:
        normed = X * 2
        return functional.linear(functional.linear(normed, q) + functional.linear(normed, k), o)

    stages = find_stages({"o": o, "q": q, "k": k, "unused": unused}, block)
    assert [s.leaders for s in stages] == [{"q": "q", "k": "q"}, {"o": "o"}]
    assert all(s.reduces_last == dict.fromkeys(s.leaders, True) for s in stages)


def test_a_weight_with_two_inputs_shares_no_stage_with_one_that_has_one_of_them() -> None:
    q, k, both = (weights(8, 8, seed=s) for s in range(3))
    a, b = X * 2, X * 3

    def run() -> None:
        for x in (a, b):
            functional.linear(x, both)
        functional.linear(a, q)
        functional.linear(b, k)

    flow = trace(None, {"q": q, "k": k, "both": both}, run)
    assert [list(s.leaders) for s in flow.stages] == [["both"], ["q"], ["k"]]
    assert flow.readers["both"] == flow.readers["q"] + flow.readers["k"]


def test_stacks_of_experts_that_read_the_same_rows_share_a_stage() -> None:
    gate, up, down = weights(3, 6, 8), weights(3, 6, 8, seed=5), weights(3, 8, 6, seed=6)

    def run() -> None:
        for e in (0, 2):
            rows = X[0, : e + 1].clone()
            y = functional.linear(rows, gate[e]) * functional.linear(rows, up[e])
            functional.linear(y, down[e])

    stages = find_stages({"gate": gate, "up": up, "down": down}, run)
    assert [s.leaders for s in stages] == [{"gate": "gate", "up": "gate"}, {"down": "down"}]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("gpt2", [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]),
        ("bert", [["query", "key", "value"], ["dense"], ["dense"], ["dense"]]),
        ("phi3-fused-qkv", [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]),
    ],
)
def test_the_stages_of_a_real_block(name: str, expected: list[list[str]], models: Callable[..., Path]) -> None:
    source = OnDisk.open(models(name))
    chain = Chain(source.instance(), source.units)
    with chain.outer_loaded():
        hidden, calls = chain.begin(Inputs.of(torch.arange(6)[None]))
    chain.fill(0)
    params = {n: p for n in chain.params(0) if (p := chain.instance.parameter(n)).ndim >= 2}
    stages = find_stages(params, lambda: chain.run(0, hidden, calls[0]))
    assert [[n.split(".")[-2] for n in s.leaders] for s in stages] == expected
    assert all(len(set(s.leaders.values())) == 1 for s in stages)
    assert {r for s in stages for r in s.reduces_last.values()} == {name != "gpt2"}


def test_shapes_alone_show_the_uses_up_to_where_values_are_needed() -> None:
    with torch.device("meta"):
        a, b = nn.Linear(8, 8), nn.Linear(8, 8)
        x = torch.empty(2, 8)
    params = {"a": a.weight, "b": b.weight}

    def run() -> None:
        y = a(x)
        b(y[y.sum() > 0])

    flow = trace(None, params, run)
    assert [u.param for u in flow.uses] == ["a"] and not flow.complete and flow.stopped
    whole = trace(None, params, lambda: b(a(x)))
    assert whole.complete and [list(s.leaders) for s in whole.stages] == [["a"], ["b"]]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trace(None, {"w": W}, lambda: functional.linear(random(2, 5), W))
    with pytest.raises(ZeroDivisionError):
        trace(None, params, lambda: 1 / 0)


def test_an_activation_can_only_be_read_while_it_is_reported() -> None:
    (use,) = trace(None, {"w": W}, lambda: functional.linear(X, W)).uses
    with pytest.raises(ValueError, match="was not kept"):
        _ = use.x
