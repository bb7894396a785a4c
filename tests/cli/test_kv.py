"""`run --kv`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import arrondi
from arrondi.runtime.kv.layer import PackedLayer
from tests.cli.conftest import Cli, refused

Models = Callable[..., Path]


@pytest.mark.parametrize("kind", ["int8", "int4", "kivi2", "kivi4;0=full"])
def test_a_text_goes_on_with_rounded_keys_and_values(cli: Cli, models: Models, kind: str) -> None:
    model = models("llama", head_dim=32)
    found = cli("run", model, "Once upon a time", "--max-new-tokens", 5, "--kv", kind, "--json")
    assert (found.code, found.document["tokens"]) == (0, 5)


def test_what_does_not_go_is_said_in_one_sentence(cli: Cli, models: Models) -> None:
    llama = models("llama")
    refused(
        cli("run", llama, "Once", "--kv", "int7"), "Unknown kind of key/value cache 'int7'", "Did you mean", "kivi2"
    )
    refused(cli("run", llama, "Once", "--kv", "kivi2"), "heads that are a multiple of 32 wide", "Use int8")
    refused(cli("run", llama, "Once", "--kv", "int8-static"), "come from calibration")
    refused(cli("run", models("bert"), "Once", "--kv", "int8"), "does not generate text")
    refused(cli("run", llama, "Once", "--kv-bits", "4"), "--kv int8, int4 or kivi2")


def test_eval_measures_what_a_cache_costs(cli: Cli, models: Models, text: Path) -> None:
    llama, bert = models("llama"), models("bert")
    asked = ("eval", llama, "--against", llama, "--text", text, "--seq-len", 48, "--samples", 3, "--kv")
    found = cli(*asked, "int8", "--json").document
    assert 0 < found["kl_mean"] < 0.01 and found["kv"] == "int8"
    assert cli(*asked, "int8", "--max-kl", 1e-9).code == 3
    refused(cli(*asked, "int7"), "Unknown kind", "Did you mean")
    refused(cli(*asked, "int8", "--device", "cuda"), "Leave it out")
    refused(cli("eval", bert, "--against", bert, "--text", text, "--kv", "int8"), "does not continue texts")


@pytest.mark.parametrize("kind", ["int8", "int8-static;0=int8", "pca2"])
def test_a_model_keeps_the_cache_that_it_was_quantized_for(
    cli: Cli, models: Models, text: Path, tmp_path: Path, kind: str
) -> None:
    llama, out = models("llama"), tmp_path / "out"
    asked = ("quantize", llama, "-o", out, "--scheme", "W8A16", "--seq-len", 32, "--samples", 4, "--kv", kind)
    report = cli(*asked, "--calibration", text, "--no-eval", "--json").document
    assert report["kv"] == kind == json.loads((out / "config.json").read_text())["arrondi_kv_cache"]
    assert (out / "kv_cache.arrondi").exists() == (kind != "int8")
    measure = ("eval", out, "--against", llama, "--text", text, "--seq-len", 48, "--samples", 2, "--json")
    rounded, whole = cli(*measure).document, cli(*measure, "--kv", "none").document
    assert rounded["kv"] == kind and "kv" not in whole and rounded["kl_mean"] != whole["kl_mean"]
    assert cli("run", out, "Once upon", "--max-new-tokens", 3, "--json").document["tokens"] == 3
    model = arrondi.load(out)
    assert isinstance(arrondi.kv_cache(model).layers[1], PackedLayer)
    if kind != "int8":
        (out / "kv_cache.arrondi").write_bytes(b"nothing")
        refused(cli("run", out, "Once"), "holds no calibration", "--kv none")
        (out / "kv_cache.arrondi").unlink()
        refused(cli("run", out, "Once"), "is missing", "--kv none")


def test_a_scheme_may_name_the_cache(cli: Cli, models: Models, tmp_path: Path) -> None:
    llama = models("llama")
    cli("quantize", llama, "-o", tmp_path / "out", "--scheme", "w=int8/channel,kv=int8/token", "-q")
    assert "k=int8/token" in json.loads((tmp_path / "out" / "config.json").read_text())["arrondi_kv_cache"]


def test_quantizing_refuses_caches_that_cannot_be(cli: Cli, models: Models, tmp_path: Path) -> None:
    llama, out = models("llama"), tmp_path / "out"
    begin = ("quantize", llama, "-o", out, "--kv")
    refused(cli(*begin, "int7"), "Unknown kind of key/value cache 'int7'")
    refused(cli(*begin, "pca2"), "need calibration text")
    refused(cli(*begin, "int8;9=int4"), "names layer 9")
    refused(cli(*begin, "int8", "--scheme", "w=int8/channel,kv=int4/g32/offset"), "Leave one of them out")
    refused(cli("quantize", models("bert"), "-o", out, "--kv", "int8"), "keeps no keys and values")
