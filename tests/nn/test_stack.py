"""QStack in the place of fused expert parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from arrondi.errors import ShapeError
from arrondi.formats import parse_scheme
from arrondi.nn import QStack, replace_parameter
from arrondi.tensor.nearest import quantize_tensor
from arrondi.tensor.qtensor import QTensor
from tests.kernels.common import assert_same

EXPERTS, HIDDEN, INNER = 4, 64, 96


def experts(rows: int, columns: int, pieces: int, schemes: list[str]) -> list[list[QTensor]]:
    generator = torch.Generator().manual_seed(rows + columns)
    return [
        [
            quantize_tensor(
                torch.randn(rows, columns, generator=generator) * 0.1,
                parse_scheme(schemes[(e + p) % len(schemes)]).weights,
            )
            for p in range(pieces)
        ]
        for e in range(EXPERTS)
    ]


def dense(stack: list[list[QTensor]]) -> torch.Tensor:
    return torch.stack([torch.cat([q.dequantize() for q in pieces]) for pieces in stack])


def mixtral() -> Any:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        num_attention_heads=4,
    )
    config._experts_implementation = "eager"
    return MixtralSparseMoeBlock(config)


def qwen3() -> Any:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        num_attention_heads=4,
    )
    config._experts_implementation = "eager"
    return Qwen3MoeSparseMoeBlock(config)


@pytest.mark.parametrize("build", [mixtral, qwen3])
@pytest.mark.parametrize("schemes", [["W4A16"], ["NVFP4A16", "W3A16_ASYM"]], ids=["one-scheme", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_transformers_run_on_packed_weights(build: Any, schemes: list[str], dtype: torch.dtype):
    torch.manual_seed(0)
    block = build().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1)
    gate_up, down = experts(INNER, HIDDEN, 2, schemes), experts(HIDDEN, INNER, 1, schemes)
    block.experts.gate_up_proj.data, block.experts.down_proj.data = dense(gate_up), dense(down)
    block = block.to(dtype)
    packed = copy.deepcopy(block)
    replace_parameter(packed.experts, "gate_up_proj", QStack(gate_up, dtype=dtype))
    replace_parameter(packed.experts, "down_proj", QStack(down, dtype=dtype))
    assert [n for n, _ in packed.experts.named_parameters()] == []
    x = torch.randn(2, 7, HIDDEN).to(dtype)
    with torch.no_grad():
        assert torch.equal(packed(x), block(x))


@pytest.mark.parametrize("transposed", [False, True])
def test_an_index_gives_one_matrix(transposed: bool):
    pieces = experts(32, 48, 3, ["W4A16", "FP8A16"])
    stack = QStack(pieces, dtype=torch.bfloat16, transposed=transposed)
    whole = dense(pieces).bfloat16()
    whole = whole.transpose(1, 2) if transposed else whole
    assert (stack.shape, len(stack), stack.dtype, stack.device.type) == (whole.shape, EXPERTS, torch.bfloat16, "cpu")
    for e in range(-EXPERTS, EXPERTS):
        assert torch.equal(stack[e], whole[e])
        assert torch.equal(stack[torch.tensor(e)], whole[e])
        assert torch.equal(stack[torch.tensor([e])], whole[e])
    with pytest.raises(ShapeError, match='"eager"'):
        stack[torch.tensor([0, 1])]
    for e in (EXPERTS, -EXPERTS - 1):
        with pytest.raises(IndexError, match="the stack has 4"):
            stack[e]


def test_every_expert_is_listed_by_iteration():
    pieces = experts(32, 48, 1, ["W4A16"])
    assert torch.equal(torch.stack(list(QStack(pieces))), dense(pieces))


def test_it_stays_packed_through_casts_and_copies():
    pieces = experts(64, 256, 2, ["W4A16"])
    stack = QStack(pieces)
    assert stack.weight_nbytes == sum(q.stored_bits // 8 for expert in pieces for q in expert)
    assert stack.weight_nbytes < 0.30 * stack.shape.numel() * 2
    cast = copy.deepcopy(nn.Sequential(stack)).to(torch.bfloat16)[0]
    assert torch.equal(cast[1], stack[1])
    assert cast.weight_nbytes == stack.weight_nbytes
    assert stack.state_dict() == {}
    for found, wanted in zip(cast.unpack(), pieces, strict=True):
        for a, b in zip(found, wanted, strict=True):
            assert_same(a, b)
    assert "(4, 128, 256), weight=int4/g128" in repr(stack)


def test_mistakes_are_named():
    pieces = experts(32, 48, 1, ["W4A16"])
    with pytest.raises(ShapeError, match="one shape"):
        QStack([pieces[0], [*pieces[1], *pieces[2]]])
    with pytest.raises(ShapeError, match="0 experts"):
        QStack([])
    with pytest.raises(ShapeError, match="equal width"):
        QStack([[pieces[0][0], experts(32, 64, 1, ["W4A16"])[0][0]]])
    holder = nn.Module()
    holder.register_parameter("gate_up_proj", nn.Parameter(torch.zeros(EXPERTS, 48, 32)))
    with pytest.raises(ShapeError, match="`transposed`"):
        replace_parameter(holder, "gate_up_proj", QStack(pieces))
    replace_parameter(holder, "gate_up_proj", QStack(pieces, transposed=True))
    assert list(holder.named_parameters()) == []
