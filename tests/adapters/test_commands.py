"""`adapt init` and `adapt merge`, from end to end, with plain peft as the reader."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import arrondi as ar
from arrondi.adapters.files import Adapter
from arrondi.adapters.initial import INITS, Init, initialize
from arrondi.adapters.merge import merge_adapter
from arrondi.checkpoint import Checkpoint
from arrondi.cli import _run
from arrondi.errors import ArrondiError, FileFormatError, OutputError, SchemeError, ShapeError, say
from arrondi.pipeline import Recipe, TextOptions
from tests.conftest import VOCABULARY

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::FutureWarning:transformers.*")

IDS = torch.arange(40).reshape(2, 20) * 31 % VOCABULARY
LAYERS = 21


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def arrondi(*arguments: Any) -> int:
    """The exit status of a command."""
    try:
        return _run([str(a) for a in arguments])
    except ArrondiError as error:
        print(error, file=sys.stderr)
        return say(error)[1]


def plain(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture(scope="module")
def starts(
    models: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Every start: its directory and what was said."""
    found = {}
    for name in INITS:
        out = tmp_path_factory.mktemp("starts") / name
        given = TextOptions(text if name == "eora" else None, samples=4, seq_len=64, evaluate=False)
        said = initialize(models("llama"), out, Init(name, rank=8, alpha=16), Recipe.simple("NF4_DQ"), text=given, measured_on=text if name == "eora" else None, measured_windows=4, seq_len=64)  # fmt: skip
        found[name] = out, said
    return found


def test_base_and_adapter_are_what_is_said(models: Callable[..., Path], starts: Any) -> None:
    original = Checkpoint.open(models("llama"))
    for name, (out, said) in starts.items():
        base, adapter = Checkpoint.open(out), Adapter.read(out / "adapter")
        assert len(said["layers"]) == len(adapter.deltas) == LAYERS
        for row in said["layers"]:
            weight = f"{row['name']}.weight"
            w, q = original.dense(weight), base.dense(weight)
            error = float((w - adapter.deltas[row["name"]](q)).norm() / w.norm())
            assert error == pytest.approx(row["error"], rel=1e-4), (name, weight)
        if name != "lora":
            assert said["error"] < said["rounded_error"]
        if name == "eora":
            assert said["start"]["kl_mean"] < said["base"]["kl_mean"]
    means = {name: said["error"] for name, (_, said) in starts.items()}
    assert means["qpissa"] < means["pissa"] and means["loftq"] < means["lora"] == starts["lora"][1]["rounded_error"]


def test_plain_peft_loads_them_over_packed_and_plain_weights(starts: Any, tmp_path: Path) -> None:
    out = starts["qpissa"][0]
    ar.dequantize(out, tmp_path / "plain", "float32")
    found = [
        peft.PeftModel.from_pretrained(m, out / "adapter", is_trainable=True)
        for m in (ar.load(out), plain(tmp_path / "plain"))
    ]
    torch.testing.assert_close(logits(found[0]), logits(found[1]), rtol=1e-4, atol=1e-4)
    merged = found[1].merge_and_unload()
    adapter = Adapter.read(out / "adapter")
    for name, delta in adapter.deltas.items():
        ours = delta(Checkpoint.open(out).dense(f"{name}.weight"))
        torch.testing.assert_close(merged.get_submodule(name).weight.detach(), ours, rtol=1e-5, atol=1e-6)


def test_pissa_in_ordinary_numbers_and_back_to_plain_lora(models: Callable[..., Path], tmp_path: Path) -> None:
    """W_res + B A is W, the gradient of A is there from the start, and peft turns the tuned adapter into one on the original."""
    base = tmp_path / "base"
    initialize(models("llama"), base, Init("pissa", rank=4, alpha=8))
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(plain(base), base / "adapter")), logits(plain(models("llama"))), rtol=1e-3, atol=1e-4
    )  # fmt: skip
    model = peft.PeftModel.from_pretrained(plain(base), base / "adapter", is_trainable=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(float(p.grad.norm()) > 0 for n, p in model.named_parameters() if "lora_A" in n)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    tuned = logits(model)
    model.save_pretrained(tmp_path / "delta", path_initial_model_for_weight_conversion=str(base / "adapter"))
    again = peft.PeftModel.from_pretrained(plain(models("llama")), tmp_path / "delta")
    torch.testing.assert_close(logits(again), tuned, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"use_rslora": True, "alpha_pattern": {"q_proj": 3, r"layers\.[12]\.mlp\..*": 40}}],
    ids=str,
)
def test_merging_is_what_peft_computes(starts: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    base = starts["lora"][0]
    model = peft.get_peft_model(ar.load(base), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    said = merge_adapter(tmp_path / "adapter", base, tmp_path / "dense", scheme="fp32")
    assert said["sqnr_db"] is None or said["sqnr_db"] > 120
    torch.testing.assert_close(logits(plain(tmp_path / "dense")), logits(model), rtol=1e-4, atol=1e-4)
    again = merge_adapter(tmp_path / "adapter", base, tmp_path / "packed")
    assert 15 < again["sqnr_db"] < 30
    schemes = [{str(p.scheme) for p in Checkpoint.open(d).placed.values()} for d in (base, tmp_path / "packed")]
    assert schemes[0] == schemes[1]
    untouched = "model.layers.0.self_attn.k_proj.weight"
    # Numbers that lie on their grid stay there; scales that are quantized in turn move it by a little.
    before, after = (Checkpoint.open(d).dense(untouched) for d in (base, tmp_path / "packed"))
    assert float((after - before).norm() / before.norm()) < 0.01


def test_the_commands(
    models: Callable[..., Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, merged = tmp_path / "out", tmp_path / "merged"
    first = ["adapt", "init", str(models("llama")), "-o", str(out), "--scheme", "NF4", "--init", "qpissa", "--rank", "4", "--steps", "1", "--json", "-q"]  # fmt: skip
    assert arrondi(*first) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["init"] == "qpissa" and len(said["layers"]) == LAYERS
    assert arrondi("adapt", "merge", str(out / "adapter"), "--base", str(out), "-o", str(merged), "--text", str(text), "--eval-samples", "2", "--json") == 0  # fmt: skip
    said = json.loads(capsys.readouterr().out)
    assert said["merged"] == LAYERS and said["kl_mean"] > 0 and said["sqnr_db"] > 10
    assert isinstance(logits(ar.load(merged)), torch.Tensor)
    assert arrondi(*first) == 2, "the adapter is there already"
    assert "--overwrite" in capsys.readouterr().err
    assert arrondi("adapt", "merge", str(out / "adapter"), "--base", str(models("llama", hidden_size=32)), "-o", str(tmp_path / "no")) == 2  # fmt: skip
    assert "the adapter is for" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged", "out"], "nothing is left behind"


def test_bad_input(models: Callable[..., Path], starts: Any, tmp_path: Path) -> None:
    out, model = tmp_path / "out", models("llama")
    cases: list[tuple[Callable[[], Any], type[ArrondiError], str]] = [
        (lambda: Init("olora"), SchemeError, "olora"),
        (lambda: initialize(model, out, Init("loftq")), SchemeError, "Add --scheme"),
        (lambda: initialize(model, out, Init("eora"), Recipe.simple("NF4")), SchemeError, "Add --calibration"),
        (lambda: initialize(model, out, Init("lora", rank=40), Recipe.simple("NF4")), ShapeError, "rank of 40"),
        (
            lambda: initialize(starts["lora"][0], out, Init("lora"), Recipe.simple("NF4")),
            SchemeError,
            "already quantized",
        ),
        (lambda: merge_adapter(model, model, out), FileFormatError, "no such file"),
        (lambda: merge_adapter(starts["pissa"][0] / "adapter", starts["lora"][0], out), FileFormatError, "other codes"),
        (lambda: merge_adapter(starts["pissa"][0] / "adapter", model, out), FileFormatError, "other weights"),
        (
            lambda: merge_adapter(starts["pissa"][0] / "adapter", models("gpt2"), out),
            FileFormatError,
            "no linear layer",
        ),
        (lambda: merge_adapter(starts["lora"][0] / "adapter", *[starts["lora"][0]] * 2), OutputError, "same directory"),
        (lambda: Init("lora", alpha=float("inf")), SchemeError, "finite"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()
    assert not out.exists()


def test_ordinary_numbers_replace_only_what_arrondi_wrote(
    models: Callable[..., Path], starts: Any, tmp_path: Path
) -> None:
    base, theirs, out = starts["lora"][0], tmp_path / "theirs", tmp_path / "out"
    theirs.mkdir()
    (theirs / "config.json").write_text("{}", encoding="utf-8")
    (theirs / "thesis.txt").write_text("years of work", encoding="utf-8")

    def merged(folder: Path, **more: Any) -> Any:
        return merge_adapter(base / "adapter", base, folder, scheme="bf16", **more)

    for overwrite in (False, True):
        for call in (
            lambda overwrite=overwrite: initialize(models("llama"), theirs, Init("pissa", rank=4), overwrite=overwrite),
            lambda overwrite=overwrite: merged(theirs, overwrite=overwrite),
        ):
            with pytest.raises(OutputError, match="Nothing was touched"):
                call()
    assert sorted(p.name for p in theirs.iterdir()) == ["config.json", "thesis.txt"]
    merged(out)
    with pytest.raises(OutputError, match="--overwrite"):
        merged(out)
    merged(out, overwrite=True)
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    entries = Checkpoint.open(out).folder.entries.values()
    assert {e.torch_dtype for e in entries} == {torch.bfloat16}


def test_a_model_that_reads_no_text_is_merged_all_the_same(models: Callable[..., Path], tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    ar.quantize(models("vit"), "W8A16", out=base, evaluate=False)
    peft.get_peft_model(ar.load(base), peft.LoraConfig(r=2, target_modules="all-linear")).save_pretrained(adapter)
    assert arrondi("adapt", "merge", adapter, "--base", base, "-o", tmp_path / "merged") == 0


def test_an_output_layer_that_stayed_plain(models: Callable[..., Path], starts: Any, tmp_path: Path) -> None:
    """peft saves its weight along, and takes more rank than it has."""
    base = starts["lora"][0]
    model = peft.get_peft_model(ar.load(base), peft.LoraConfig(r=40, target_modules=["lm_head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    assert Adapter.read(tmp_path / "adapter").copies
    merge_adapter(tmp_path / "adapter", base, tmp_path / "dense", scheme="fp32")
    torch.testing.assert_close(logits(plain(tmp_path / "dense")), logits(model), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.base_model.model.lm_head.base_layer.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(FileFormatError, match="another lm_head"):
        merge_adapter(tmp_path / "adapter", base, tmp_path / "no")
    with pytest.raises(FileFormatError, match="shares its weight"):
        merge_adapter(tmp_path / "adapter", models("llama", tie_word_embeddings=True), tmp_path / "no")


def test_factors_that_belong_to_other_weights_are_refused(
    models: Callable[..., Path], starts: Any, tmp_path: Path
) -> None:
    """peft's pissa moves a part of each weight into the factors, and does so again at every loading."""
    model = peft.get_peft_model(
        plain(models("llama")), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    model.save_pretrained(tmp_path / "pissa")
    with pytest.raises(FileFormatError, match="path_initial_model_for_weight_conversion"):
        merge_adapter(tmp_path / "pissa", models("llama"), tmp_path / "out", scheme="fp32")
    config = json.loads((tmp_path / "pissa" / "adapter_config.json").read_text(encoding="utf-8"))
    for change in ({"alpha_pattern": {"q_proj": "many"}}, {"alpha_pattern": [1]}, {"lora_alpha": None}):
        text = json.dumps({**config, "init_lora_weights": True, **change})
        (tmp_path / "pissa" / "adapter_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(FileFormatError, match="alpha"):
            Adapter.read(tmp_path / "pissa")
    with pytest.raises(FileFormatError, match="other codes"):
        peft.PeftModel.from_pretrained(ar.load(starts["lora"][0]), starts["qpissa"][0] / "adapter")


def test_adapters_that_are_more_than_lora_are_refused(starts: Any, tmp_path: Path) -> None:
    base = starts["lora"][0]
    for n, options in enumerate(({"modules_to_save": ["lm_head"]}, {"lora_bias": True})):
        model = peft.get_peft_model(ar.load(base), peft.LoraConfig(r=2, target_modules=["q_proj"], **options))
        model.save_pretrained(tmp_path / str(n))
        with pytest.raises(FileFormatError, match=next(iter(options))):
            merge_adapter(tmp_path / str(n), base, tmp_path / "out")
    peft.get_peft_model(
        ar.load(base), peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    ).save_pretrained(tmp_path / "ia3")
    with pytest.raises(FileFormatError, match="IA3"):
        merge_adapter(tmp_path / "ia3", base, tmp_path / "out")
