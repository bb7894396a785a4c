"""The benchmark scripts: each runs and prints its figures; a yardstick and a layer loss are right where the answer is known."""

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import arrondi

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import layer_loss
import make_llama
import yardstick

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TEXT = arrondi.sample_path() / "heldout.txt"
FEW = ("--samples", 2, "--length", 16)

SMOKE: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "adapters.py": (
        lambda tiny: ["--model", tiny, "--text", TEXT, "--rank", 2, "--steps", 2, "--length", 16, "--schemes", "NF4", "--count", 5000, "--rounds", 1],
        r"NF4 +0\.\d+ +0\.\d+(?s:.*)AdamW8bit +\d+\.\d+ +2\.\d+(?s:.*) 2 bits +\d+\.\d+ of (?s:.*)NF4_DQ, loftq +\d",
    ),
    "binary.py": (
        lambda tiny: ["--data", novel(tiny), "--parts", "language", "--language-steps", 1, "--width", 32, "--windows", 1],
        r"float32 +loss +\d(?s:.*)bitnet +loss +\d.* s a step(?s:.*)twn +loss",
    ),
    "dit.py": (
        lambda tiny: ["--data", fashion(tiny), "--steps", 2, "--width", 32, "--depth", 1, "--samples", 10, "--limit", 20, "--epochs", 1],
        r"float32 +\d(?s:.*)rounded afterwards(?s:.*)ternary, RMSNorm .* gap \d\.\de-0[5-9]",
    ),
    "gptq_layer.py": (lambda _: ["--size", 256, "--rounds", 1], r"arrondi, search +\d.* loss 0\.\d+"),
    "gptq_speed.py": (
        lambda tiny: ["--data", data(tiny), "--model", tiny, "--repeat", 1],
        r"tiny, gptq W4A16(?s:.*)arrondi +\d.*CPU s(?s:.*)mean relative loss(?s:.*)gptq/arrondi-0 +21 (?s:.*)books-llama-6m is not there",
    ),
    "communication.py": (
        lambda _: ["--text", TEXT, "--worlds", 2, "--steps", 4, "--seeds", 1, "--width", 32, "--layers", 1, "--schemes", "DDP fp16", "qgz", "FSDP2 qwz + qgz"],
        r"2 machines × 1 ranks(?s:.*)DDP fp16 .* 1\.000 (?s:.*)qgz \| \d(?s:.*)FSDP2 qwz \+ qgz \| \d",
    ),
    "integer_speed.py": (
        lambda _: ["--networks", "made-up", "--turns", 1],
        r"made-up: 35 operators on codes, 0 in floating point(?s:.*) 1 +\d.*PyTorch, ORT(?s:.*) 32 +\d.*PyTorch, ORT",
    ),
    "kernels.py": (
        lambda _: ["--shapes", "64x128", "--m", 1, "--rounds", 1, "--threads", 1, "--seconds", 0.01, "--rotate-mb", 0.1, "--cases", "w4 bf16"],
        r"64x128 m=1 +4 bits +arrondi +w4 bf16 .*GB/s",
    ),
    "kv.py": (
        lambda _: ["--lengths", 96, "--hidden", 64, "--layers", 2, "--heads", 4, "--width", 32, "--decode", 2, "--rounds", 1],
        r"96  full .*100\.0% +\d(?s:.*)96  kivi2 .*%",
    ),
    "layer_loss.py": (lambda tiny: [tiny, quantized(tiny), "--text", TEXT, *FEW], r"mean relative loss(?s:.*)tiny-w4 +21 +0\.\d+"),
    "lightseq.py": (
        lambda _: ["--rounds", 1, "--tokens", 16, "--length", 8, "--width", 32, "--hidden", 64, "--heads", 2],
        r'"training step", "tokens": 16(?s:.*)"inference", "tokens": 16',
    ),
    "make_llama.py": (lambda tiny: [tiny.parent / "another", "--size", "tiny"], r"another: 574,336 parameters"),
    "networks.py": (lambda _: ["--networks", "made-up"], r"made-up: 269,722 parameters, top-1 100\.00 %"),
    "quality.py": (
        lambda tiny: ["--model", tiny, "--split", TEXT, "--samples", 2, "--seq-len", 16, "--windows", 2, "--only", "^W4A16 (hqq|gptq)$|^kv int8", "--copy", f"mine={quantized(tiny)}"],
        r"(?s)mine +– .*W4A16 hqq +4\.\d.*W4A16 gptq .*% .*kv int8 ",
    ),
    "quantizer_speed.py": (lambda _: ["--repeat", 1, "--rows", 64], r"round and pack, GB/s +compiled \d.* reference \d(?s:.*)hqq, s "),
    "rtn_speed.py": (lambda tiny: ["--model", tiny, "--repeat", 1], r"RTN W4A16, range searched.*GB/s a core(?s:.*)widest range .*GB/s a core(?s:.*)a plain copy"),
    "tokens.py": (
        lambda tiny: [quantized(tiny), "--activations", "int8/g128", "--plain", tiny, "--prompt", 8, "--decode", 3, "--rounds", 1],
        r"arrondi int8/g128 +prompt(?s:.*)transformers .* decode +\d",
    ),
    "train_networks.py": (
        lambda tiny: ["--data", fashion(tiny), "--out", tiny.parent, "--networks", "lenet", "--epochs", 1, "--limit", 100],
        r"lenet: epoch 1, loss \d\.\d+, \d+\.\d\d % of 100",
    ),
    "training.py": (
        lambda _: ["--speed", "--shapes", "16x64x32", "--rounds", 1, "--methods", "int8,hlq"],
        r"16 tokens, 64 → 32: float32 0\.\d+ CPU s(?s:.*)int8 +\d+\.\d\d ×(?s:.*)hlq +\d+\.\d\d ×",
    ),
    "vision.py": (
        lambda tiny: ["--data", tiny, "--networks", "made-up", "--only", "^W8A8 rtn min-max"],
        r"float32 +100\.00 %(?s:.*)W8A8 rtn min-max +\d+\.\d\d %  +\d+\.\d\d %  +\d+\.\d\d dB",
    ),
    "yardstick.py": (
        lambda tiny: [tiny, "--calibration", TEXT, "--evaluation", TEXT, "--bits", 3, "--eval-samples", 2, *FEW],
        r"3  rtn +\d(?s:.*)3  gptq +\d",
    ),
}  # fmt: skip
"""Script → its arguments for a tiny model, and what it prints. Peers are left out: they have environments of their own."""


NOT_HERE = {"gpu.py", "signals.py"}
"""They need a GPU, and real networks."""


def test_make_gives_scripts_options_that_they_have() -> None:
    makefile = (BENCHMARKS.parent / "Makefile").read_text().replace("\\\n", " ")
    lines = [line for line in makefile.splitlines() if "benchmarks/" in line and not line.startswith("#")]
    assert lines
    for line in lines:
        script = BENCHMARKS.parent / str(re.search(r"benchmarks/\w+\.py", line)[0])
        for option in re.findall(r"--[\w-]+", line):
            assert f'"{option}"' in script.read_text(), f"{script.name} has no {option}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the sample's tokenizer."""
    folder = tmp_path_factory.mktemp("benchmarks") / "tiny"
    size = make_llama.SIZES["tiny"]
    make_llama.write_checkpoint(folder, size, tokenizer=arrondi.sample_path(), shard_bytes=10**9)
    return folder


def quantized(tiny: Path) -> Path:
    out = tiny.with_name("tiny-w4")
    if not out.exists():
        arrondi.quantize(tiny, "W4A16", out=out)
    return out


def data(tiny: Path) -> Path:
    """A directory of texts as the benchmarks want it."""
    folder = tiny.with_name("data")
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for name in ("wikipedia_calib.txt", "the_time_machine.txt"):
        (folder / "text" / name).write_bytes(TEXT.read_bytes())
    return folder


def novel(tiny: Path) -> Path:
    """A directory with a novel and the tokenizer of a language model."""
    folder = tiny.with_name("novel")  # of its own: other scripts take the directory of a model for the model
    (folder / "text").mkdir(parents=True, exist_ok=True)
    (folder / "text" / "emma.txt").write_bytes(TEXT.read_bytes()[:20_000])
    (folder / "books-llama-6m").mkdir(exist_ok=True)
    for path in arrondi.sample_path().glob("token*"):
        (folder / "books-llama-6m" / path.name).write_bytes(path.read_bytes())
    return folder


def fashion(tiny: Path) -> Path:
    """A directory of pictures as the benchmarks want it."""
    folder = tiny.with_name("data")
    (folder / "fashion_mnist").mkdir(parents=True, exist_ok=True)
    x, y = np.zeros((100, 28, 28), np.uint8), np.arange(100) % 10
    parts = {f"{part}_{kind}": v for part in ("train", "test") for kind, v in (("images", x), ("labels", y))}
    np.savez(folder / "fashion_mnist" / "fashion_mnist.npz", **parts)
    return folder


def test_every_script_has_a_run() -> None:
    assert {path.name for path in BENCHMARKS.glob("*.py")} - NOT_HERE == SMOKE.keys()


@pytest.mark.parametrize("script", SMOKE)
def test_a_script_runs_and_prints_its_figures(
    script: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, figures = SMOKE[script]
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments(tiny))])
    monkeypatch.setitem(os.environ, "PYTHONPATH", str(Path(arrondi.__file__).parents[1]))  # of the processes it starts
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    out = capfd.readouterr().out
    assert re.search(figures, out), out


@pytest.mark.parametrize("script", ["kernels.py", "products/ours.py"])
def test_cases_that_match_nothing_are_an_error(script: str) -> None:
    command = [sys.executable, str(BENCHMARKS / script), "--shapes", "64x128", "--cases", "w4 bf61"]
    environment = {**os.environ, "PYTHONPATH": str(Path(arrondi.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "--cases w4 bf61 matches none of: w8 f32, w8 bf16" in done.stderr


PEERS = sorted(str(p.relative_to(BENCHMARKS)) for p in BENCHMARKS.glob("*/*.py") if p.name not in ("common.py", "ours.py"))  # fmt: skip


@pytest.mark.parametrize("script", PEERS)
def test_a_peers_script_is_python_that_does_not_need_arrondi(script: str) -> None:
    source = (BENCHMARKS / script).read_text(encoding="utf-8")
    compile(source, script, "exec")
    assert not re.search(r"^\s*(from|import) arrondi", source, re.MULTILINE)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


class TestMakeLlama:
    def test_tiny_checkpoint_in_shards_loads_whole(self, tmp_path: Path):
        make_llama.main([str(tmp_path / "tiny"), "--size", "tiny", "--shard-size", "300KB"])
        shards = sorted((tmp_path / "tiny").glob("*.safetensors"))
        assert len(shards) > 2
        assert all(shard.stat().st_size < 310_000 for shard in shards)

        index = json.loads((tmp_path / "tiny" / "model.safetensors.index.json").read_text())
        held = {}
        for shard in shards:
            with safe_open(shard, framework="pt") as file:
                held |= dict.fromkeys(file.keys(), shard.name)
        assert held == index["weight_map"]

        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", output_loading_info=True)
        assert not any(info.values())
        assert model.dtype == torch.bfloat16
        assert index["metadata"]["total_size"] == 2 * sum(p.numel() for p in model.parameters())
        weight = model.model.layers[1].mlp.down_proj.weight.detach().float()
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)  # 32,768 draws: standard error 0.4 %
        assert torch.equal(model.model.norm.weight, torch.ones(128, dtype=torch.bfloat16))
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()

    def test_a_tensor_depends_on_its_name_and_the_seed_alone(self, tmp_path: Path):
        name, shape = "model.layers.0.self_attn.k_proj.weight", (64, 128)
        once = make_llama.draw(name, shape, seed=7)
        assert torch.equal(once, make_llama.draw(name, shape, seed=7))
        assert not torch.equal(once, make_llama.draw(name, shape, seed=8))
        assert not torch.equal(once, make_llama.draw("model.layers.1.self_attn.k_proj.weight", shape, seed=7))

        make_llama.main([str(tmp_path / "one"), "--size", "tiny", "--seed", "7"])
        assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
        with safe_open(tmp_path / "one" / "model.safetensors", framework="pt") as file:
            assert torch.equal(file.get_tensor(name), once)

    def test_the_vocabulary_is_the_tokenizers_unless_named(self, tmp_path: Path):
        tokens = {"<s>": 0, "a": 1, "b": 2}
        added = [{"id": 0, "content": "<s>"}, {"id": 5, "content": "<pad>"}]
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": added}))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "b"}}))
        assert make_llama.tokenizer_facts(tmp_path) == (6, 0, 2)
        size = make_llama.SIZES["tiny"]
        make_llama.write_checkpoint(tmp_path / "six", size, tokenizer=tmp_path, shard_bytes=10**9)
        assert json.loads((tmp_path / "six" / "config.json").read_text())["vocab_size"] == 6
        make_llama.write_checkpoint(tmp_path / "ten", size, tokenizer=tmp_path, vocab=10, shard_bytes=10**9)
        assert json.loads((tmp_path / "ten" / "config.json").read_text())["vocab_size"] == 10
        with pytest.raises(ValueError, match="at least 6"):
            make_llama.write_checkpoint(tmp_path / "five", size, tokenizer=tmp_path, vocab=5, shard_bytes=10**9)

    @pytest.mark.parametrize(("size", "parameters"), [("57m", 58.7e6), ("0.5b", 0.57e9), ("1.3b", 1.364e9)])
    def test_presets_are_as_large_as_their_name_says(self, size: str, parameters: float):
        entries = list(make_llama.tensors(make_llama.SIZES[size], vocab=make_llama.SIZES[size].vocab))
        assert sum(torch.Size(shape).numel() for _, shape in entries) == pytest.approx(parameters, rel=0.3)
        assert all(width % 128 == 0 for _, shape in entries for width in shape)


class TestYardstick:
    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_gptq_with_a_diagonal_hessian_is_round_to_nearest(self, bits: int):
        generator = torch.Generator().manual_seed(bits)
        weight = torch.randn(24, 256, generator=generator, dtype=torch.float64)
        hessian = torch.rand(256, generator=generator, dtype=torch.float64).add(0.1).diag()
        assert torch.equal(yardstick.gptq(weight, hessian, bits), yardstick.rtn(weight, bits))

    def test_gptq_lowers_the_loss_it_minimizes(self):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(16, 128, generator=generator, dtype=torch.float64)
        mixing = torch.randn(128, 128, generator=generator, dtype=torch.float64)
        inputs = torch.randn(512, 32, generator=generator, dtype=torch.float64) @ mixing[:32]  # 32 directions of 128
        hessian = inputs.T @ inputs

        def loss(rounded: torch.Tensor) -> float:
            return ((weight - rounded) @ inputs.T).square().sum().item()

        assert loss(yardstick.gptq(weight, hessian, 3)) < 0.3 * loss(yardstick.rtn(weight, 3))

    def test_the_grid_is_the_unsigned_code_space(self):
        weight = torch.tensor([[-7.5, 7.5, 0.4, 0.6, 2.5, -2.5, 0.0, 3.5]])
        step = yardstick.column_steps(weight, 4, group_size=8)
        assert torch.equal(step, torch.ones(1, 8))
        assert yardstick.to_grid(weight, step, 4).tolist() == [[-8.0, 7.0, 0.0, 1.0, 2.0, -2.0, 0.0, 4.0]]

    def test_quantize_model_replaces_every_linear_but_the_head(self):
        model = tiny_llama()
        quantized = yardstick.quantize_model(model, torch.arange(32).view(2, 16), lambda w, h: yardstick.rtn(w, 4))
        for (name, before), after in zip(model.named_parameters(), quantized.parameters(), strict=True):
            if "_proj" in name:
                torch.testing.assert_close(after, yardstick.rtn(before.double(), 4).float(), rtol=0, atol=0)
            else:
                assert torch.equal(after, before), name

    def test_inputs_of_a_block_come_from_what_is_already_quantized(self):
        model, windows = tiny_llama(), torch.arange(32).view(2, 16)
        seen: list[torch.Tensor] = []
        quantized = yardstick.quantize_model(model, windows, lambda w, h: (seen.append(h), yardstick.rtn(w, 2))[1])
        names = [f"model.layers.{block}.{part}" for block in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")]
        with torch.no_grad():
            hessians = {
                name: yardstick.input_hessian(quantized.get_submodule(name), lambda: quantized(windows))
                for name in names
            }
        # Order of the calls in a block: q k v o gate up down. Float32 forward passes, so equal to rounding.
        for name, index in zip(names, (0, 6, 7, 13), strict=True):
            torch.testing.assert_close(seen[index], hessians[name], rtol=1e-4, atol=1e-4 * hessians[name].max().item())

    def test_mean_kl_of_a_model_with_itself_is_zero(self):
        model = tiny_llama()
        windows = torch.arange(32).view(2, 16)
        assert yardstick.mean_kl(model, model, windows) == 0
        quantized = yardstick.quantize_model(model, windows, lambda w, h: yardstick.rtn(w, 2))
        assert yardstick.mean_kl(model, quantized, windows) > 0


class TestLayerLoss:
    def test_it_is_the_trace_formula(self):
        model, windows = tiny_llama(), torch.arange(32).view(2, 16)
        copy = yardstick.quantize_model(model, windows, lambda w, h: yardstick.rtn(w, 3))
        losses = layer_loss.layer_losses(model, copy, windows)
        linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        assert losses.keys() == linears - {"lm_head"}

        name = "model.layers.1.mlp.down_proj"
        weight, rounded = (m.get_submodule(name).weight.detach().double() for m in (model, copy))
        with torch.no_grad():
            hessian = yardstick.input_hessian(model.get_submodule(name), lambda: model(windows))
        expected = ((weight - rounded) @ hessian @ (weight - rounded).T).trace() / (weight @ hessian @ weight.T).trace()
        assert losses[name] == pytest.approx(expected.item(), rel=1e-5)  # float32 products

    def test_rounding_to_bfloat16_is_not_quantizing(self):
        model = tiny_llama()
        copy = tiny_llama().bfloat16().float()
        assert layer_loss.layer_losses(model, copy, torch.arange(8).view(1, 8)) == {}
