"""Routers and weights that are read bare, found in models of transformers and in small models made to mislead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from arrondi.model.flow import Flow, trace

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 8}
SIX = {
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
GROUPS = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 8}
HYBRID = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
SHARED = {
    "layers_block_type": ["mamba", "hybrid"],
    "mamba_headdim": 8,
    "n_mamba_heads": 8,
    "mamba_ngroups": 1,
    "num_key_value_heads": 4,
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
}
SWITCH = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_experts": 6,
    "num_decoder_layers": 2,
}
SWITCH |= {
    "decoder_start_token_id": 0,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "pad_token_id": 0,
}
LONGCAT = {"num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "zero_expert_num": 2, "moe_topk": 2}
LONGCAT |= {"num_key_value_heads": 4, "head_dim": 8}
RWKV = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 7, "context_length": 64, "intermediate_size": 48}


def small(kind: str, **options: Any) -> nn.Module:
    """A random model of transformers with every parameter and buffer perturbed."""
    config = transformers.CONFIG_MAPPING[kind](**options)
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM):
        if type(config) in auto._model_mapping:
            torch.manual_seed(0)
            model = auto.from_config(config).eval()
            break
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    noise = torch.Generator().manual_seed(1)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.add_(torch.randn(tensor.shape, generator=noise) * 0.05)
    return model


def runner(model: nn.Module, device: str = "cpu") -> Callable[[], Any]:
    ids = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(2)).to(device)
    if model.config.is_encoder_decoder:
        return lambda: model(ids, decoder_input_ids=ids)
    return lambda: model(ids, use_cache=False)


@torch.no_grad()
def flow_of(model: nn.Module, device: str = "cpu") -> Flow:
    return trace(model, dict(model.named_parameters()), runner(model, device))


ROUTERS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "mixtral": (SMALL | HEADS | SIX, {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}),
    "qwen2_moe": (SMALL | SIX, {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}),
    "qwen3_moe": (SMALL | HEADS | SIX, {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}),
    "deepseek_v3": (SMALL | SIX | LATENT | GROUPS, {"model.layers.1.mlp.gate"}),
    "hunyuan_v1_moe": (
        SMALL | HEADS | SIX | {"moe_topk": 2},
        {"model.layers.0.mlp.gate.wg", "model.layers.1.mlp.gate.wg"},
    ),
    "gpt_oss": (SMALL | HEADS | SIX, {"model.layers.0.mlp.router", "model.layers.1.mlp.router"}),
    "llama4_text": (
        SMALL | HEADS | SIX | {"moe_layers": [1], "intermediate_size_mlp": 48},
        {"model.layers.1.feed_forward.router"},
    ),
    "granitemoe": (
        SMALL | SIX,
        {"model.layers.0.block_sparse_moe.router", "model.layers.1.block_sparse_moe.router"},
    ),
    "jamba": (SMALL | SIX | MAMBA | HYBRID, {"model.layers.1.feed_forward.router"}),
    "olmoe": (SMALL | SIX, {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}),
    "qwen3_next": (SMALL | HEADS | SIX | DELTA, {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}),
    "jetmoe": (
        SMALL | SIX | {"num_key_value_heads": 4, "kv_channels": 8},
        {f"model.layers.{i}.{m}.router.layer" for i in (0, 1) for m in ("mlp", "self_attention.experts")},
    ),
    "doge": (
        SMALL | HEADS | {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},
        {"model.layers.0.mlp.router_gate", "model.layers.1.mlp.router_gate"},
    ),
    "switch_transformers": (
        SWITCH,
        {"encoder.block.1.layer.1.mlp.router.classifier", "decoder.block.1.layer.2.mlp.router.classifier"},
    ),
    "inkling_text": (  # two of its outputs belong to shared experts, which are not ranked
        SMALL | HEADS | SIX | {"n_shared_experts": 2, "topk": 2},
        {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"},
    ),
    "longcat_flash": (  # two of its outputs are experts that do nothing
        {k: v for k, v in SMALL.items() if k != "num_key_value_heads"} | SIX | LATENT | LONGCAT,
        {"model.layers.0.mlp.router.classifier"},
    ),
    "llama": (SMALL, set()),
    "deepseek_v32": (
        SMALL | SIX | LATENT | GROUPS | {"index_n_heads": 6, "index_head_dim": 8, "index_topk": 4},
        {"model.layers.1.mlp.gate"},
    ),
}


@pytest.mark.parametrize("kind", ROUTERS)
def test_the_routers_of_a_model(kind: str) -> None:
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    options, expected = ROUTERS[kind]
    model = small(kind, **options)
    flow = flow_of(model)
    assert flow.complete
    assert flow.routers == {f"{name}.weight" for name in expected}


@pytest.mark.parametrize("kind", ["gpt_oss", "switch_transformers"])
def test_shapes_alone_show_the_first_router(kind: str) -> None:
    options, expected = ROUTERS[kind]
    flow = flow_of(small(kind, **options).to("meta"), "meta")
    assert not flow.complete and len(flow.routers) == 1 and flow.routers < {f"{name}.weight" for name in expected}


def test_a_router_that_is_cast_to_float_is_one() -> None:
    options, expected = ROUTERS["deepseek_v3"]
    flow = flow_of(small("deepseek_v3", **options).bfloat16())
    assert flow.routers == {f"{name}.weight" for name in expected}


class Plain(nn.Module):
    """A model of `layers` whose forward is `function(model, x)`."""

    def __init__(self, function: Callable[..., torch.Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.block = nn.Module()
        for name, layer in layers.items():
            self.block.add_module(name, layer)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.block, x)


def linears(n: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(8, 8) for _ in range(n))


def chosen(m: Any, x: torch.Tensor) -> torch.Tensor:
    weights, index = m.gate(x).softmax(-1).topk(2)
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        rows, place = torch.where(index == e)
        y.index_add_(0, rows, expert(x[rows]) * weights[rows, place, None])
    return y


def first_only(m: Any, x: torch.Tensor) -> torch.Tensor:
    best = torch.argmax(m.gate(x), dim=-1)
    return torch.stack([m.experts[f"expert_{int(e)}"](row) for e, row in zip(best, x, strict=True)])


def sorted_rows(m: Any, x: torch.Tensor) -> torch.Tensor:
    scores, index = m.gate(x).sigmoid().sort(dim=-1, descending=True)
    order = index[:, 0].argsort()
    counts = index[:, 0].bincount(minlength=4).tolist()
    return torch.cat([e(rows) for e, rows in zip(m.experts, x[order].split(counts), strict=True)]) * scores[:, :1]


def rows_for_every_expert(m: Any, x: torch.Tensor) -> torch.Tensor:
    weights, rows = m.gate(x).softmax(-1).topk(2, dim=0)  # every expert takes its two best rows
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        y.index_add_(0, rows[:, e], expert(x[rows[:, e]]) * weights[:, e, None])
    return y


def from_a_table(m: Any, x: torch.Tensor) -> torch.Tensor:
    index = torch.tensor([[0, 3], [1, 2], [2, 0], [3, 1]])
    weights = m.gate(x).sigmoid().gather(1, index)
    return torch.stack([m.experts[int(index[i, 0])](row) * weights[i, 0] for i, row in enumerate(x)])


def best_word(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.layers[1](m.embed(m.head(m.layers[0](x)).argmax(-1)))


def sparse_attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    scores = (m.q(x) @ m.k(x).T) * m.weights(x)  # as many weights as tokens, and as many experts
    mask = torch.full((4, 4), -torch.inf).scatter(1, scores.topk(2, -1).indices, 0.0)
    attended = functional.scaled_dot_product_attention(m.q(x)[None], m.k(x)[None], x[None], mask)[0]
    return chosen(m, x + attended)


def sparse_activations(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.up(x)
    return m.down(torch.zeros_like(y).scatter(1, y.topk(2).indices, 1.0) * y)


def codebook(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.out(m.codes((x @ m.codes.weight.T).argmax(-1)))


MISLEADING: dict[str, tuple[nn.Module, set[str]]] = {
    "list of experts": (Plain(chosen, gate=nn.Linear(8, 4), experts=linears(4)), {"block.gate.weight"}),
    "the best alone": (
        Plain(
            first_only, gate=nn.Linear(8, 4), experts=nn.ModuleDict({f"expert_{i}": nn.Linear(8, 8) for i in range(4)})
        ),
        {"block.gate.weight"},
    ),
    "sorted rows": (Plain(sorted_rows, gate=nn.Linear(8, 4), experts=linears(4)), {"block.gate.weight"}),
    "rows for every expert": (
        Plain(rows_for_every_expert, gate=nn.Linear(8, 4), experts=linears(4)),
        {"block.gate.weight"},
    ),
    "from a table": (Plain(from_a_table, gate=nn.Linear(8, 4), experts=linears(4)), {"block.gate.weight"}),
    "best word": (Plain(best_word, head=nn.Linear(8, 2), embed=nn.Embedding(2, 8), layers=linears(2)), set()),
    "indexer of attention": (
        Plain(
            sparse_attention,
            q=nn.Linear(8, 8),
            k=nn.Linear(8, 8),
            weights=nn.Linear(8, 4),
            gate=nn.Linear(8, 4),
            experts=linears(4),
        ),
        {"block.gate.weight"},
    ),
    "sparse activations": (Plain(sparse_activations, up=nn.Linear(8, 4), down=nn.Linear(4, 8)), set()),
    "codebook": (Plain(codebook, codes=nn.Embedding(12, 8), out=nn.Linear(8, 8)), set()),
}


@pytest.mark.parametrize("case", MISLEADING)
@torch.no_grad()
def test_a_router_is_what_chooses_among_experts(case: str) -> None:
    model, expected = MISLEADING[case]
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert trace(model, dict(model.named_parameters()), lambda: model(x)).routers == expected


class Opaque(nn.Module):
    """A linear as packed codes: it multiplies, and its weight answers nothing but shape, type and device."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.multiply = lambda x, w=linear.weight, b=linear.bias: functional.linear(x, w, b)
        self.bias, self.in_features, self.out_features = linear.bias, linear.in_features, linear.out_features
        self.weight_ = SimpleNamespace(
            shape=linear.weight.shape, dtype=linear.weight.dtype, device=linear.weight.device
        )

    @property
    def weight(self) -> Any:
        return self.weight_

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x)


BARE: dict[str, tuple[dict[str, Any], set[str]]] = {
    "mamba": ({"vocab_size": 96, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1}, {"dt_proj"}),
    "jamba": (SMALL | SIX | MAMBA | HYBRID, {"dt_proj"}),
    "rwkv": (RWKV, {"output", "value"}),
    "zamba2": (SMALL | MAMBA | SHARED, set()),
    "recurrent_gemma": (SMALL | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16}, set()),
    "qwen3_next": (SMALL | HEADS | SIX | DELTA, set()),
    "llama": (SMALL, set()),
}


@pytest.mark.parametrize("kind", BARE)
@torch.no_grad()
def test_exactly_the_bare_linears_cannot_be_packed(kind: str) -> None:
    options, expected = BARE[kind]
    model = small(kind, **options)
    flow = flow_of(copy.deepcopy(model))
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    bare = {name for name in linears if f"{name}.weight" in flow.bare}
    assert {name.rpartition(".")[2] for name in bare} == expected
    for name in sorted(linears):
        other = copy.deepcopy(model)
        other.set_submodule(name, Opaque(other.get_submodule(name)))
        if name in bare:
            with pytest.raises((AttributeError, TypeError)):
                runner(other)()
        else:
            assert torch.equal(runner(other)()[0], runner(copy.deepcopy(model))()[0])


class Reads(nn.Module):
    """A linear and a module around it that does `function(linear, x)`."""

    def __init__(self, function: Callable[[nn.Linear, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.function = nn.Linear(8, 8), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.inner, x)


OTHER_READS: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], str]] = {
    "its own product": (lambda m, x: m(x), ""),
    "facts": (lambda m, x: m(x.to(m.weight.dtype).to(m.weight.device).view(-1, m.weight.shape[1])), ""),
    "more facts": (lambda m, x: m(x) * m.weight.size(0) + m.weight.numel() + torch.zeros_like(m.weight).sum(), ""),
    "another's product": (lambda m, x: functional.linear(x, m.weight), "linear"),
    "arithmetic": (lambda m, x: m(x) * m.weight.sum(), "sum"),
    "in place": (lambda m, x: (m.weight.div_(2), m(x))[1], "div_"),
    "an expression": (lambda m, x: functional.linear(x, -torch.exp(m.weight)), "exp"),
    "indices": (lambda m, x: functional.linear(x, m.weight[:4]), "__getitem__"),
    "data": (lambda m, x: functional.linear(x, m.weight.data), ".data"),
    "transposed": (lambda m, x: x @ m.weight.T, ".T"),
    "joined": (lambda m, x: x @ torch.cat([m.weight, m.weight]).T, "cat"),
    "norm": (lambda m, x: m(x) / m.weight.norm(), "norm"),
    "convolution": (lambda m, x: functional.conv1d(x[None, :, :, None][0], m.weight[..., None]), "__getitem__"),
    "as an input": (lambda m, x: functional.linear(m.weight, x), "linear"),
}


@pytest.mark.parametrize("case", OTHER_READS)
@torch.no_grad()
def test_other_reads_of_a_weight_are_named(case: str) -> None:
    function, expected = OTHER_READS[case]
    model = Reads(function)
    x = torch.randn(3, 8)
    flow = trace(model, {"inner.weight": model.inner.weight}, lambda: model(x))
    assert flow.bare == ({"inner.weight": f"{expected} in the model"} if expected else {})


@torch.no_grad()
def test_a_module_may_read_its_own_weight_in_products_and_not_otherwise() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.randn(3, 8, 8))
            self.listed = nn.ParameterList([torch.randn(8, 8)])
            self.normed, self.sliced, self.scale = (nn.Parameter(torch.randn(8, 8)) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for matrix in self.stack:
                x = x @ matrix
            x = x @ self.stack[1].T @ self.listed[0]
            x = functional.linear(x, functional.normalize(self.normed))
            x = torch.cat([functional.linear(x, self.sliced[:4]), functional.linear(x, self.sliced[4:])], -1)
            return functional.linear(x, self.stack[0], self.scale[0])

    model = Own()
    flow = trace(model, dict(model.named_parameters()), lambda: model(torch.randn(2, 8)))
    assert flow.bare == {
        "normed": "normalize in the model",
        "sliced": "a part of it (linear)",
        "scale": "operand of linear in the model",
    }
    assert {u.param for u in flow.uses} == {"stack", "listed.0", "sliced"}


@torch.no_grad()
def test_tied_weights_belong_to_every_module_that_holds_them() -> None:
    model = small("llama", **SMALL, tie_word_embeddings=True)
    flow = flow_of(model)
    assert flow.bare.keys().isdisjoint(n for n, p in model.named_parameters() if p.ndim > 1)
    assert [u.kind for u in flow.uses if u.param == "model.embed_tokens.weight"] == ["embedding", "linear"]
