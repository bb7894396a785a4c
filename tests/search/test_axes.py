"""Axes beside schemes and methods: presets, rewrites before methods, and what becomes of embeddings."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import arrondi
from arrondi.cli.commands import app
from arrondi.cli.parsing import recipe_from
from arrondi.errors import SchemeError
from arrondi.pipeline import foreseen
from arrondi.pipeline.importance import sums_of_inputs
from arrondi.pipeline.presets import preset_recipe
from arrondi.search.candidates import candidates
from arrondi.search.front import answer
from tests.cli.conftest import Cli, cli, refused
from tests.search.test_front import row

__all__ = ["cli"]

ALL: dict[str, Any] = {
    "presets": ["best", "ZeroQuant"],
    "rewrites": ["none", "rotate:online=false+smoothquant"],
    "embeddings": ["none", "int8/row"],
}


def test_every_way_with_every_choice_of_embeddings() -> None:
    found = candidates(["W4A16", "W3A16"], ["rtn", "gptq:damping=0.05"], **ALL)
    assert len(found) == 2 * (2 * 2 + 2) * 2
    first = [(c.method, c.preset, c.embeddings) for c in found[:12]]
    assert first[:4] == [
        ("rtn", False, None),
        ("rtn", False, "int8/row"),
        ("rotate:online=false+smoothquant+rtn", False, None),
        ("rotate:online=false+smoothquant+rtn", False, "int8/row"),
    ]
    assert first[8:] == [("best", True, None), ("best", True, "int8/row"), ("ZeroQuant", True, None), ("ZeroQuant", True, "int8/row")]  # fmt: skip
    assert found[2].names["rewrites"] == ["rotate", "smoothquant"]
    assert found[9].names["preset"] == "best" and found[10].names["preset"] == "zeroquant"
    assert found[8].recipe == preset_recipe("best", "W4A16")


@pytest.mark.parametrize("schemes", [None, ["W3A16", "w=int4/g32,a=int4/token"]])
def test_the_options_of_a_row_do_the_same(schemes: list[str] | None) -> None:
    found = candidates(schemes, ["awq"], **ALL | {"presets": ["best", "q8bert"]}, group_size=32)
    assert [c.reason for c in found if c.recipe is None] == []
    for one in found:
        words = ["MODEL", "-o", "OUT", *shlex.split(one.options)]
        given = get_command(app).commands["quantize"].make_context("quantize", words).params
        named = {k: given[k] or None for k in ("scheme", "method", "group_size", "targets", "ignore")}
        steps = (given[k] or None for k in ("option", "recipe", "rewrite", "repair"))
        again = recipe_from(*named.values(), *steps, preset=given["preset"], embeddings=given["embeddings"])
        assert again == one.recipe, one.options


def test_a_preset_has_its_own_scheme_and_embeddings() -> None:
    (found,) = candidates(None, [], presets=["q8bert"])
    assert "int8/tensor" in found.scheme and "int8/tensor" in str(found.embeddings)
    assert found.scheme.count("w=") == 1, "the scheme of the tables is told apart from it"


@pytest.mark.parametrize(
    ("methods", "axes", "words"),
    [
        (["rtn"], {"presets": ["bets"]}, "Did you mean 'best'"),
        (["best"], {}, "--presets best"),
        (["rtn"], {"presets": ["best", "BEST"]}, "are the same"),
        (["rtn"], {"rewrites": ["rotat"]}, "Did you mean 'rotate'"),
        (["rtn"], {"rewrites": ["gptq"]}, "rewrite"),
        (["rotate+rtn"], {"rewrites": ["none", "rotate"]}, "rotate is there twice"),
        (["rotate+rtn", "rtn"], {"rewrites": ["none", "rotate"]}, "twice"),
        ([], {"presets": ["best"], "rewrites": ["rotate"]}, "go before methods"),
        (["rtn"], {"embeddings": ["int8/row", "w=int8/channel"]}, "are the same"),
        (["rtn"], {"embeddings": ["int9000"]}, "int9000"),
        (["rtn"], {"embeddings": [""]}, "embeddings"),
        ([], {}, "no method to compare"),
    ],
)
def test_bad_axes(methods: list[str], axes: dict[str, Any], words: str) -> None:
    with pytest.raises(SchemeError) as caught:
        candidates(["W4A16"], methods, **axes)
    assert words in str(caught.value)


def test_the_answer_tells_choices_apart() -> None:
    rows = [
        {**row("W4", "best", 4_000_000, 0.002, 0.001), "preset": "best", "embeddings": "int8/row"},
        {**row("W4", "gptq", 4_000_100, 0.0025, 0.001), "embeddings": "int8/row"},
        {**row("W4", "best", 4_000_200, 0.0026, 0.001), "preset": "best", "embeddings": None},
        {**row("W4", "gptq", 5_000_000, 0.001), "preset": None, "embeddings": None},
    ]
    assert answer(rows) == (
        "At 4.0 MB (4.000 bits a weight of the whole file) W4 by the preset best with embeddings in int8/row loses least (KL 0.002), "
        "level with gptq and the preset best with embeddings as they are within the noise; "
        "at 5.0 MB (5.000 bits a weight of the whole file) W4 by gptq is the only one (KL 0.001)."
    )


def test_rows_are_what_quantize_says(cli: Cli, models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    model = models("llama-tied", num_hidden_layers=1)
    few = ("--samples", 3, "--seq-len", 32, "--eval-samples", 4, "--group-size", 32, "--calibration", text)
    asked = ("compare", model, *few, "-o", tmp_path / "rows", "--presets", "zeroquant", "--methods", "rtn", "--rewrites", "none,rotate", "--embeddings", "none,int8/row")  # fmt: skip
    found = cli(*asked, "--json").document
    assert len(found["rows"]) == 6
    for one in found["rows"]:
        assert one["status"] == "done", one["reason"]
        out = tmp_path / "one"
        report = cli("quantize", model, "-o", out, *few[:6], *shlex.split(one["options"]), *few[8:], "--overwrite", "--json").document  # fmt: skip
        assert (one["kl_mean"], one["output_bytes"]) == (report["evaluation"]["kl_mean"], report["output_bytes"])
    by = {(r["method"], r["embeddings"]): r for r in found["rows"]}
    assert by["zeroquant", "int8/row"]["output_bytes"] < by["zeroquant", None]["output_bytes"]
    assert by["rotate+rtn", None]["rewrites"] == ["rotate"] and by["zeroquant", None]["preset"] == "zeroquant"
    shown = cli(*asked)
    assert "embeddings in int8/row" in shown.out and "the preset zeroquant" in shown.out and shown.code == 0
    refused(cli(*asked[:-1], "none,none"), "twice")
    refused(cli(*asked[:-1], ","), "--embeddings names nothing")


def test_what_candidates_share_is_found_once(
    models: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How large inputs become is asked for by every llm-int8, whatever its scheme; the rows are as if it had been asked alone."""
    calls = []
    monkeypatch.setattr(foreseen, "sums_of_inputs", lambda *a, **k: calls.append(1) or sums_of_inputs(*a, **k))
    few: dict[str, Any] = {"samples": 3, "seq_len": 32, "eval_samples": 4, "calibration": text}
    model, methods = models("llama-tied", num_hidden_layers=1), ["llm-int8", "llm-int8:threshold=3"]
    found = arrondi.compare(model, methods=methods, schemes=["W8A16"], out=tmp_path / "rows", **few)
    assert len(calls) == 1
    alone = arrondi.quantize(model, "W8A16", method="llm-int8", options={"threshold": 3}, out=tmp_path / "out", **few)
    row = next(r for r in found["rows"] if "threshold" in r["method"])
    assert (row["kl_mean"], row["output_bytes"]) == (alone["evaluation"]["kl_mean"], alone["output_bytes"])


def test_only_presets_are_compared_where_only_they_are_named(
    models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    few: dict[str, Any] = {"samples": 3, "seq_len": 32, "eval_samples": 4, "calibration": text}
    found = arrondi.compare(models("llama-tied", num_hidden_layers=1), presets=["q8bert"], out=tmp_path / "rows", **few)
    assert [(r["preset"], r["status"]) for r in found["rows"]] == [("q8bert", "done")]
