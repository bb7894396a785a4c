"""Architectures end to end: what becomes of every parameter, and one model in the files, in transformers and here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.measure.compare import compare_models
from arrondi.measure.text import load_tokenizer, special_tokens
from arrondi.model import OnDisk
from arrondi.pipeline import Recipe, TextOptions, dequantize_model, make_plan, quantize_model
from arrondi.runtime.generate import generate
from tests.zoo import ARCHITECTURES, VISION, ZOO, of_transformers, outputs

Models = Callable[..., Path]
IDS = torch.randint(3, 2000, (2, 20), generator=torch.Generator().manual_seed(3))
W4 = Recipe.simple("W4A16", group_size=32)
GPTQ = Recipe.simple("W4A16", "gptq", group_size=32)


WRITES_TEXT = ("t5", "whisper")
NO_TEXT = (*WRITES_TEXT, "vit", "clip", "dinov2-swiglu")
"""They do not run on token ids alone."""


def read_by_transformers(report: dict[str, Any]) -> bool:
    return bool(next(r["ok"] for r in report["readers"] if r["reader"].startswith("transformers")))


CHOSEN = [
    "llama-tied", "gpt2", "phi3-fused-qkv", "mixtral", "opt-projected", "deberta", "jina-v3", "albert", "jamba", "gemma3-vlm",
]  # fmt: skip
"""Shared, turned, joined, stacked and split weights; linears before the blocks; no chain; blocks of several classes; two towers."""
NO_LAYOUT = ("gpt-oss", "llama4", "zaya")
END_TO_END = [
    pytest.param(name, marks=() if name in CHOSEN else pytest.mark.full)
    for name in ZOO
    if name not in (*NO_TEXT, *NO_LAYOUT)
]


UNREAD = {"olmo-hybrid", "minimax-m3", "qianfan-ocr"}
"""Of which transformers joins or splits tensors that are quantized; tests/contract tries whether it really cannot."""


@pytest.mark.parametrize("name", END_TO_END)
def test_what_is_written_loads_in_transformers_and_here_with_the_same_outputs(
    name: str, models: Models, text: Path, tmp_path: Path
) -> None:
    source, out = models(name), tmp_path / "out"
    options = TextOptions(text, samples=4, seq_len=33, eval_text=text, eval_samples=3)
    report = quantize_model(source, out, GPTQ, options)
    assert report["layout"] == "compressed-tensors" and read_by_transformers(report) == (name not in UNREAD)

    # Every tensor of the file has one class, with a reason; what was quantized says how, and whether it was done blindly.
    layers, kept = {r["name"]: r for r in report["layers"]}, {k["name"]: k for k in report["kept"]}
    assert not layers.keys() & kept.keys() and all(k["reason"] for k in kept.values())
    assert sorted([*layers, *kept]) == sorted(Checkpoint.open(out).names)
    for row in layers.values():
        assert (row["method"] == "gptq" and row["calibration_tokens"]) or (row["method"] == "rtn" and row["why"])

    if read_by_transformers(report):
        ours, theirs = outputs(arrondi.load(out), IDS), outputs(of_transformers(name, out), IDS)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-5 * float(theirs.abs().max()))

    # What `quantize` followed is what it wrote.
    again = compare_models(out, source, text, seq_len=33, samples=3)
    key = "kl_mean" if "kl_mean" in again else "relative_error"
    assert report["evaluation"][key] == again[key] > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3-fused-qkv", "mixtral", "nomic-bert"])
def test_plain_weights_are_those_of_the_codes(name: str, models: Models, tmp_path: Path) -> None:
    """Bit for bit, and transformers computes the same with them."""
    out, plain = tmp_path / "out", tmp_path / "plain"
    report = quantize_model(models(name), out, W4)
    dequantize_model(out, plain, "float32")
    packed, restored = Checkpoint.open(out), Checkpoint.open(plain)
    assert not restored.quantized
    for row in report["layers"]:
        assert torch.equal(restored.read(row["name"]), packed.dense(row["name"])), row["name"]
    theirs = outputs(of_transformers(name, plain), IDS)
    torch.testing.assert_close(
        outputs(arrondi.load(out), IDS), theirs, rtol=1e-4, atol=2e-5 * float(theirs.abs().max())
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_matrix_but_embeddings_head_and_routers_is_quantized(name: str, models: Models) -> None:
    plan = make_plan(OnDisk.open(models(name)), W4)
    assert plan.problems == [] and plan.notes == []
    assert [t.name for t in plan.tensors] == list(Checkpoint.open(models(name)).names)
    assert all(t.reason and (t.status == "quantized") == (t.scheme is not None) for t in plan.tensors)
    aside = ("embed", "wte", "wpe", "lm_head", "gate.weight")
    expected = {t.name for t in plan.tensors if len(t.shape) >= 2 and not any(w in t.name for w in aside)}
    assert {t.name for t in plan.quantized} == expected


# ── routers, stored layers that are not built, buffers ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("hunyuan", "mlp.gate.wg"), ("deepseek-v3", "mlp.gate"), ("mixtral", "block_sparse_moe.gate"), ("qwen3-moe", "mlp.gate"),
        ("jamba", "feed_forward.router"), ("minimax", "block_sparse_moe.gate"), ("qwen3-next", "mlp.gate"),
        ("gpt-oss", "mlp.router"), ("llama4", "feed_forward.router"),
    ],
)  # fmt: skip
def test_routers_stay_plain_whatever_their_class(name: str, router: str, models: Models) -> None:
    """Their output chooses experts; asked for by name, the plan says why not."""
    source = OnDisk.open(models(name))
    for recipe in (W4, Recipe.simple("W4A16", group_size=32, targets=["Linear", f"re:.*{router}$"])):
        plan = make_plan(source, recipe)
        found = [t for t in plan.tensors if t.name.endswith(f"{router}.weight")]
        assert found and all(t.status != "quantized" for t in found)
    assert all("router" in t.reason for t in found), {t.reason for t in found}
    experts = [t for t in plan.quantized if ".experts." in t.name]
    assert experts, "and what they choose is quantized"


def test_layers_that_are_stored_and_not_built_are_kept_and_listed_as_ignored(models: Models, tmp_path: Path) -> None:
    """Layers for predicting several tokens: the package's matcher would take them for packed."""
    import shutil

    from compressed_tensors.utils.match import is_match
    from safetensors.torch import load_file, save_file

    source = Path(shutil.copytree(models("deepseek-v3"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    more = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if "layers.1." in n}
    more["model.layers.2.eh_proj.weight"] = torch.randn(64, 128)
    save_file({**tensors, **more}, source / "model.safetensors", {"format": "pt"})
    report = quantize_model(source, tmp_path / "out", W4)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    kept = {k["name"]: k["reason"] for k in report["kept"]}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    for name, tensor in {**tensors, **more}.items():
        if name in more:
            assert torch.equal(stored[name], tensor) and kept[name] == "not a parameter of the model"
        if tensor.ndim == 2 and "embed" not in name:
            module = name.removesuffix(".weight")
            packed = f"{name}_packed" in stored
            assert is_match(module, torch.nn.Linear(2, 2), group["targets"], config["ignore"]) == packed, module


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_an_expert_that_saw_no_token_is_reported(name: str, models: Models, text: Path, tmp_path: Path) -> None:
    source = models(name, num_hidden_layers=1, num_experts_per_tok=1)
    report = quantize_model(source, tmp_path / "out", GPTQ, TextOptions(text, samples=1, seq_len=2, evaluate=False))
    rows = {r["name"]: r for r in report["layers"]}
    idle = [r for n, r in rows.items() if ".experts." in n and r["calibration_tokens"] == 0]
    assert idle, "two tokens with one expert each cannot reach four"
    assert all(r["method"] == "rtn" and "no token" in r["why"] for r in idle)
    assert all(r["calibration_tokens"] == 2 for n, r in rows.items() if "q_proj" in n)


# ── what runs before and outside of the units ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["opt-projected", "electra"])
def test_a_linear_before_the_blocks_is_calibrated_and_the_blocks_see_it_rounded(
    name: str, models: Models, text: Path, tmp_path: Path
) -> None:
    options = TextOptions(text, samples=4, seq_len=24, evaluate=False)
    report = quantize_model(models(name), tmp_path / "out", Recipe.simple("W2A16", "gptq", group_size=32), options)
    early = next(r for r in report["layers"] if "project" in r["name"] and "out" not in r["name"])
    assert early["calibration_tokens"] == 4 * 24 and early["output_error"] > 0
    # The first block's inputs are what the rounded projection gives: keep the projection, and its weights come out otherwise.
    keeping = Recipe.simple("W2A16", "gptq", group_size=32, ignore=[early["name"].removesuffix(".weight")])
    quantize_model(models(name), tmp_path / "kept", keeping, options)
    one, two = Checkpoint.open(tmp_path / "out"), Checkpoint.open(tmp_path / "kept")
    first = next(n for n in two.placed if ".0." in n)
    assert not torch.equal(one.dense(first), two.dense(first))


def test_a_class_that_needs_its_weights_is_marked(models: Models) -> None:
    """Also where it is a model inside another."""
    for name, starts in (
        ("modernbert", False),
        ("t5-encoder", False),
        ("gemma3-vlm", False),
        ("llama", True),
        ("bert", True),
    ):
        source = OnDisk.open(models(name))
        linears = [n for n, m in source.model.named_modules() if isinstance(m, torch.nn.Linear)]
        before = {n: b.clone() for n, b in source.model.named_buffers()}
        state = torch.random.get_rng_state()
        assert source.starts_without(linears) == starts
        assert torch.equal(state, torch.random.get_rng_state())
        assert all(torch.equal(before[n], b) for n, b in source.model.named_buffers())
        assert all("weight" in source.model.get_submodule(n)._parameters for n in linears)


@pytest.mark.parametrize("name", NO_TEXT)
def test_a_model_without_text_is_quantized_without_and_refused_with(
    name: str, models: Models, text: Path, tmp_path: Path
) -> None:
    report = quantize_model(models(name), tmp_path / "blind", Recipe.simple("W8A16", group_size=16))
    assert report["layers"] and all(r["method"] == "rtn" for r in report["layers"])
    arrondi.load(tmp_path / "blind")
    if read_by_transformers(report):
        of_transformers(name, tmp_path / "blind")
    else:
        assert name == "dinov2-swiglu"
        with pytest.raises(ValueError, match="one to many"):
            of_transformers(name, tmp_path / "blind")
    if name in WRITES_TEXT:
        return  # see test_seq2seq.py
    for method, evaluate in (("rtn", False), ("gptq", True)):
        with pytest.raises(arrondi.SchemeError, match=r"^[^\n]*--method rtn or hqq[^\n]*$"):
            options = TextOptions(text, samples=2, seq_len=24, evaluate=evaluate)
            quantize_model(models(name), tmp_path / "out", Recipe.simple("W8A16", method, group_size=16), options)
    assert not (tmp_path / "out").exists()


GENERATING = [
    "mamba", "rwkv", "recurrent-gemma", "minimax", "llama4",
    *(
        pytest.param(name, marks=pytest.mark.full)
        for name in ("mamba2", "xglm", "jamba", "gemma3n", "qwen2.5-vl", "bamba", "falcon-h1", "qwen3-next", "gpt-oss", "gemma4", "deepseek-v3")
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", GENERATING)
def test_what_is_written_continues_a_text_as_transformers_does(name: str, models: Models, tmp_path: Path) -> None:
    """With whatever state its class keeps; in bfloat16 it runs, too."""
    quantize_model(models(name), tmp_path / "out", Recipe.simple("w=int4/g16"))
    dequantize_model(tmp_path / "out", tmp_path / "plain", "float32")
    theirs, tokenizer = of_transformers(name, tmp_path / "plain"), load_tokenizer(models(name))
    start = special_tokens(tokenizer)[0]
    ids = torch.tensor([[*start, *tokenizer("def add(a, b):", add_special_tokens=False)["input_ids"]]])
    expected = ids
    for _ in range(5):  # without any cache
        expected = torch.cat([expected, outputs(theirs, expected)[:, -1:].argmax(-1)], 1)
    found = generate(tmp_path / "out", "def add(a, b):", max_new_tokens=5, dtype="float32")
    assert found["text"] == tokenizer.decode(expected[0], skip_special_tokens=True)
    assert generate(tmp_path / "out", "def add(a, b):", max_new_tokens=5, dtype="bfloat16")["tokens"] == 5


@pytest.mark.parametrize("name", ["t5", "whisper", "bert", "vit", "clip"])
def test_what_is_no_decoder_is_said_to_be_none(name: str, models: Models) -> None:
    with pytest.raises(arrondi.SchemeError, match="Use a decoder-only language model"):
        generate(models(name), "Return", max_new_tokens=2)


def test_a_matrix_of_the_model_itself_is_no_module_to_be_ignored(tmp_path: Path) -> None:
    """What lies in no module inside has no path, and a config that names an empty one is no config."""
    config = transformers.MLCDVisionConfig(**VISION, num_hidden_layers=2, num_key_value_groups=1)
    model = transformers.MLCDVisionModel(config)
    assert any("." not in name and parameter.ndim > 1 for name, parameter in model.named_parameters())
    model.save_pretrained(tmp_path / "model")
    quantize_model(tmp_path / "model", tmp_path / "out", Recipe.simple("W8A16", group_size=16))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] and all(config["ignore"])
    arrondi.load(tmp_path / "out")


def test_a_language_model_stored_with_the_config_of_a_larger_one(models: Models, text: Path, tmp_path: Path) -> None:
    shutil.copytree(models("gemma3"), tmp_path / "model")
    own = json.loads((tmp_path / "model" / "config.json").read_text())
    whole = {"model_type": "gemma3", "architectures": ["Gemma3ForCausalLM"], "text_config": own}
    (tmp_path / "model" / "config.json").write_text(json.dumps(whole))
    report = quantize_model(tmp_path / "model", tmp_path / "out", Recipe.simple("W8A16", group_size=16), TextOptions(
        eval_text=text, eval_samples=2, seq_len=20
    ))  # fmt: skip
    assert report["evaluation"]["kl_mean"] < 0.01
    ours, theirs = (
        outputs(arrondi.load(tmp_path / "out"), IDS),
        outputs(of_transformers("gemma3", tmp_path / "out"), IDS),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-5 * float(theirs.abs().max()))
