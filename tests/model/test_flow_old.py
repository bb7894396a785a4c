"""Uses with parameters are seen, whoever makes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from arrondi.checkpoint import Checkpoint
from arrondi.model import Chain, Skeleton
from arrondi.model.flow import Use, find_stages, watch

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
W = nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), requires_grad=False)
STACK = nn.Parameter(torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(2)), requires_grad=False)

CALLS: dict[str, tuple[Callable[[], torch.Tensor], bool]] = {
    "linear": (lambda: nn.functional.linear(X, W), True),
    "linear by name": (lambda: nn.functional.linear(input=X, weight=W), True),
    "x @ W.T": (lambda: X @ W.T, True),
    "matmul": (lambda: torch.matmul(X, W.T), True),
    "method": (lambda: X.matmul(W.T), True),
    "mm": (lambda: X[0].mm(W.T), True),
    "x @ W": (lambda: X[..., :6] @ W, False),
    "addmm": (lambda: torch.addmm(torch.zeros(8), X[0, :, :6], W), False),
}


def seen(call: Callable[[], object], params: dict[str, torch.Tensor]) -> list[Use]:
    found: list[Use] = []
    with watch(params, found.append):
        call()
    return found


@pytest.mark.parametrize("call", CALLS)
def test_a_product_with_a_parameter_is_reported_with_its_input(call: str) -> None:
    run, last = CALLS[call]
    (product,) = seen(run, {"w": W})
    assert product.param == "w" and product.matrix is None
    assert product.reduces_last == last
    assert product.x.shape[-1] == W.shape[1 if last else 0]
    expected = product.x @ (W.T if last else W)
    torch.testing.assert_close(run().reshape(expected.shape), expected)


def test_one_matrix_of_a_stack_is_told_from_the_others() -> None:
    for e in range(3):
        (product,) = seen(lambda e=e: X[0] @ STACK[e], {"stack": STACK})  # type: ignore[misc]
        assert (product.matrix, product.reduces_last) == (e, False)
    (product,) = seen(lambda: nn.functional.linear(X[0], STACK[1].T), {"stack": STACK})
    assert (product.matrix, product.reduces_last) == (1, False)


def test_a_product_with_the_whole_stack_is_one_for_each_matrix() -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3))
    products = seen(lambda: torch.bmm(x, STACK), {"stack": STACK})
    assert [p.matrix for p in products] == [0, 1, 2]
    assert all(torch.equal(p.x, x[e]) and not p.reduces_last for e, p in enumerate(products))


def test_other_tensors_are_not_reported() -> None:
    other = torch.randn(6, 8)
    assert seen(lambda: X @ other.T, {"w": W}) == []
    assert seen(lambda: W + 1, {"w": W}) == []
    seen(lambda: None, {"w": W})
    assert (X @ W.T).shape == (2, 3, 6), "and nothing is watched afterwards"


def test_stages_are_in_the_order_of_use_and_share_inputs() -> None:
    q, k, o = (nn.Parameter(torch.randn(8, 8), requires_grad=False) for _ in range(3))
    unused = nn.Parameter(torch.randn(8, 8), requires_grad=False)

    def block() -> torch.Tensor:
        normed = X * 2
        return nn.functional.linear(nn.functional.linear(normed, q) + nn.functional.linear(normed, k), o)

    stages = find_stages({"o": o, "q": q, "k": k, "unused": unused}, block)
    assert [s.leaders for s in stages] == [{"q": "q", "k": "q"}, {"o": "o"}]
    assert all(s.reduces_last == dict.fromkeys(s.leaders, True) for s in stages)


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
    chain = Chain(Skeleton(Checkpoint.open(models(name))))
    hidden = next(iter(chain.begin([torch.arange(6)[None]])))
    chain.fill(0)
    params = {n: p for n in chain.params(0) if (p := chain.skeleton.parameter(n)).ndim >= 2}
    stages = find_stages(params, lambda: chain.run(0, hidden))
    assert [[n.split(".")[-2] for n in s.leaders] for s in stages] == expected
    assert all(len(set(s.leaders.values())) == 1 for s in stages)
    assert {r for s in stages for r in s.reduces_last.values()} == {name != "gpt2"}
