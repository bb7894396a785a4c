"""A run that ends in one GGUF file: what it reports is what the file holds, and what is in the way is refused before the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, GGUFWriter, LlamaFileType, dequantize

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.errors import ArrondiError, OutputError
from arrondi.pipeline import Recipe, TextOptions, rehearse
from arrondi.pipeline.convert import convert_model


@pytest.mark.parametrize(("scheme", "method"), [("Q4_0", "rtn"), ("Q8_0", "gptq")])
def test_one_file_and_its_report(
    scheme: str, method: str, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    plain, out = models("llama"), tmp_path / "m.gguf"
    calibration = None if method == "rtn" else text
    report = arrondi.quantize(
        plain,
        scheme,
        out=out,
        to="gguf",
        method=method,
        calibration=calibration,
        samples=4,
        seq_len=32,
        evaluation=text,
        eval_samples=4,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "m.report.json"]
    assert report["file_bytes"] == out.stat().st_size
    assert {t.tensor_type.name for t in GGUFReader(out).tensors if "ffn" in t.name and "norm" not in t.name} == {scheme}
    assert GGUFReader(out).fields["general.name"].contents() == plain.name
    found = arrondi.evaluate(out, plain, text, seq_len=32, samples=4)
    assert found["kl_mean"] == pytest.approx(report["evaluation"]["kl_mean"], rel=1e-6)


def test_the_package_of_gguf_decodes_what_we_load(models: Callable[..., Path], tmp_path: Path) -> None:
    arrondi.quantize(models("llama"), "Q4_0", out=tmp_path / "m.gguf", to="gguf")
    checkpoint = Checkpoint.open(tmp_path / "m.gguf")
    theirs = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert torch.equal(checkpoint.dense("model.layers.1.mlp.down_proj.weight"), theirs["blk.1.ffn_down.weight"])
    q, stored = checkpoint.dense("model.layers.1.self_attn.q_proj.weight"), theirs["blk.1.attn_q.weight"]
    heads = (
        stored.reshape(4, 8, 2, 64).swapaxes(1, 2).reshape(64, 64)
    )  # pairs of neighbours in the file, halves in the model
    assert torch.equal(q, heads)


@pytest.mark.parametrize(
    ("name", "out", "words"),
    [("llama", "m", "names no GGUF file"), ("mamba2", "m.gguf", "GGUF"), ("llama", "there.gguf", "is there already")],
)
def test_refused_before_the_work(name: str, out: str, words: str, models: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(ArrondiError, match=words):
        arrondi.quantize(models(name), "Q4_0", out=tmp_path / out, to="gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["there.gguf"] and (tmp_path / "there.gguf").read_text() == "mine"


def test_a_killed_run_goes_on(models: Callable[..., Path], tmp_path: Path) -> None:
    plain, out = models("llama"), tmp_path / "m.gguf"
    arrondi.quantize(plain, "Q4_0", out=out, to="gguf")
    whole = out.read_bytes()
    out.unlink()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        arrondi.quantize(plain, "Q4_0", out=out, to="gguf", progress=stop)
    assert not out.exists()
    arrondi.quantize(plain, "Q4_0", out=out, to="gguf")
    assert out.read_bytes() == whole
    with pytest.raises(OutputError, match="is there already"):
        arrondi.quantize(plain, "Q4_0", out=out, to="gguf")


WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}


def number_of(file: Path) -> str:
    fields = GGUFReader(file).fields
    assert fields["general.quantization_version"].contents() == 2
    return LlamaFileType(fields["general.file_type"].contents()).name


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q3_K_S", "mix:Q2_K", "Q5_K_S"])
def test_a_file_of_a_mix_bears_its_number(mix: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """As llama-quantize writes it; from the types of so few blocks Q3_K_S looks like another."""
    arrondi.quantize(models("llama", **WIDE), mix, out=tmp_path / "m.gguf", to="gguf")
    assert number_of(tmp_path / "m.gguf") == f"MOSTLY_{mix.removeprefix('mix:')}"
    convert_model(tmp_path / "m.gguf", tmp_path / "again.gguf", "gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_a_mix_of_a_few_tensors_gives_no_name(models: Callable[..., Path], tmp_path: Path) -> None:
    rules = (arrondi.Rule("Q4_K_M", "rtn", ("re:.*k_proj.*",)), arrondi.Rule("Q8_0", "rtn"))
    arrondi.quantize(models("llama", **WIDE), recipe=arrondi.Recipe(rules), out=tmp_path / "m.gguf", to="gguf")
    assert number_of(tmp_path / "m.gguf") == "MOSTLY_Q8_0"


def test_a_template_gives_the_header(models: Callable[..., Path], tmp_path: Path) -> None:
    plain, template, out = models("llama", **WIDE), tmp_path / "f16.gguf", tmp_path / "m.gguf"
    convert_model(plain, tmp_path / "first.gguf", "gguf")
    reader = GGUFReader(tmp_path / "first.gguf")
    writer = GGUFWriter(template, "llama")
    for key, field in reader.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_name("of the template")
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    arrondi.quantize(plain, "Q4_K_M", out=out, to="gguf", template=template)
    assert GGUFReader(out).fields["general.name"].contents() == "of the template"
    assert number_of(out) == "MOSTLY_Q4_K_M"
    other = tmp_path / "gpt2.gguf"
    convert_model(models("gpt2"), other, "gguf")
    for wrong, words in ((other, "of the architecture 'gpt2'"), (plain / "config.json", "is no GGUF file")):
        with pytest.raises(ArrondiError, match=words):
            arrondi.quantize(plain, "Q4_K_M", out=tmp_path / "n.gguf", to="gguf", template=wrong)
        with pytest.raises(ArrondiError, match=words):
            rehearse(plain, tmp_path / "n.gguf", Recipe.simple("Q4_K_M"), TextOptions(), layout="gguf", template=wrong)
    with pytest.raises(ArrondiError, match="goes with --to gguf"):
        arrondi.quantize(plain, "W4A16", out=tmp_path / "n", template=template)
    assert {p.name for p in tmp_path.iterdir()} == {"first.gguf", "f16.gguf", "gpt2.gguf", "m.gguf", "m.report.json"}


def test_what_another_command_left_beside_the_file_is_replaced(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run had come to its end, and the file was not made."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    plain, out = models("llama"), tmp_path / "m.gguf"
    with monkeypatch.context() as patched:
        patched.setattr("arrondi.pipeline.file_runs.convert_model", stop)
        with pytest.raises(KeyboardInterrupt):
            arrondi.quantize(plain, "Q4_0", out=out, to="gguf")
    assert (tmp_path / ".m.gguf.run").is_dir()
    arrondi.quantize(plain, "Q8_0", out=out, to="gguf")
    assert number_of(out) == "MOSTLY_Q8_0" and not (tmp_path / ".m.gguf.run").exists()


def test_what_a_header_cannot_say_is_refused_before_the_work(models: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ArrondiError, match="GGUF says nothing of query_pre_attn_scalar"):
        arrondi.quantize(models("gemma2", query_pre_attn_scalar=77), "Q8_0", out=tmp_path / "m.gguf", to="gguf")
    assert not [*tmp_path.iterdir()]
