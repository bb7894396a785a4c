"""`arrondi inspect --folds`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import transformers

from tests.cli.conftest import Cli, refused

Models = Callable[..., Path]


def test_json_has_every_activation(cli: Cli, models: Models) -> None:
    found = cli("inspect", models("llama"), "--folds", "--json").document
    assert (found["foldable"], found["not_foldable"]) == (13, 0)
    by_consumers = {tuple(fold["consumers"]): fold for fold in found["folds"]}
    layer = "model.layers.1"
    queries = by_consumers[tuple(f"{layer}.self_attn.{n}_proj.weight" for n in "kqv")]
    assert queries == {
        "unit": 1,
        "consumers": [f"{layer}.self_attn.{n}_proj.weight" for n in "kqv"],
        "producer": {
            "kind": "norm",
            "param": f"{layer}.input_layernorm.weight",
            "offset": 0.0,
            "bias": None,
            "index": None,
            "rows": None,
        },
        "channels": "same",
        "reason": None,
    }
    values = by_consumers[(f"{layer}.self_attn.o_proj.weight",)]
    assert values["channels"] == "blocks of 16 repeated ×2"
    assert by_consumers[("lm_head.weight",)]["unit"] is None


def test_parts_of_a_parameter_and_reasons(cli: Cli, models: Models) -> None:
    found = cli("inspect", models("gpt2"), "--folds", "--json").document
    by_consumers = {tuple(fold["consumers"]): fold for fold in found["folds"]}
    projected = by_consumers[("transformer.h.0.attn.c_proj.weight",)]["producer"]
    assert projected["rows"] == [128, 192]
    assert projected["bias"] == "transformer.h.0.attn.c_attn.bias"
    down = by_consumers[("transformer.h.0.mlp.c_proj.weight",)]
    assert down["channels"] is None and down["reason"] == "pow is taken of it in transformer.h.0.mlp.act"
    assert found["not_foldable"] == sum(fold["reason"] is not None for fold in found["folds"]) == 4


def test_the_table(cli: Cli, models: Models) -> None:
    shown = cli("inspect", models("gpt2"), "--folds")
    assert shown.code == 0
    for words in (
        "transformer.h.0",
        "attn.c_attn.weight rows 128–191",
        "no: pow is taken of it in mlp.act",
        "for 9 activations, not for 4",
    ):
        assert words in shown.out
    experts = cli("inspect", models("mixtral"), "--folds").out
    assert "block_sparse_moe.experts.2.w1.weight, 4 more" in experts


def test_what_has_no_folds_says_why(cli: Cli, models: Models, tmp_path: Path) -> None:
    cli("quantize", models("llama"), "-o", tmp_path / "q", "--scheme", "W4A16", "--group-size", 32)
    refused(cli("inspect", tmp_path / "q", "--folds"), "already quantized", "original")
    config = transformers.BrosConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BrosModel(config).save_pretrained(tmp_path / "boxes")
    refused(cli("inspect", tmp_path / "boxes", "--folds"), "does not run", "bbox")
