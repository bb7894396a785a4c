"""Importance matrices: ours against a plain loop of transformers, and one that a method is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from arrondi.checkpoint.imatrix import Importance, ImportanceMatrix, read_imatrix, write_imatrix
from arrondi.errors import DataError, SchemeError
from arrondi.formats import Scheme
from arrondi.model import OnDisk
from arrondi.pipeline import Recipe, TextOptions, quantize_model
from arrondi.pipeline.importance import make_imatrix, match_imatrix
from arrondi.pipeline.statistics import Seen
from arrondi.pipeline.step import Step
from arrondi.rounding import METHODS, Rounding
from tests.pipeline.toys import data, toys_known

IDS = data(3, 24, 5)


def plain_loop(model: Any) -> dict[str, torch.Tensor]:
    """Σ x² of what every linear of a transformers model is given; of experts, of what every one of them is."""
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        found = x.double().reshape(-1, x.shape[-1]).square().sum(0)
        sums[name] = sums[name] + found if name in sums else found

    def watch(name: str, module: Any) -> None:
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, args: add(name, args[0]))
        elif getattr(getattr(module, "gate_up_proj", None), "ndim", 0) == 3:
            module.register_forward_pre_hook(lambda m, args: routed(name, m, *args))

    def routed(name: str, m: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> None:
        for e in range(len(m.gate_up_proj)):
            rows = hidden[(chosen == e).any(-1)]
            gate, up = (rows @ m.gate_up_proj[e].T).chunk(2, -1)
            add(f"{name}.{e}.in", rows)
            add(f"{name}.{e}.down", torch.nn.functional.silu(gate) * up)

    for name, module in model.named_modules():
        watch(name, module)
    with torch.no_grad():
        model(IDS)
    return sums


def test_values_are_those_of_a_plain_loop(models: Callable[..., Path], tmp_path: Path) -> None:
    path = models("llama")
    facts = make_imatrix(path, IDS, tmp_path / "a.gguf", head=True)
    assert facts["windows"] == 3 and facts["tokens"] == 72 and facts["unnamed"] == [] == facts["unreached"]
    sums, found = plain_loop(transformers.AutoModelForCausalLM.from_pretrained(path)), read_imatrix(tmp_path / "a.gguf")
    assert len(found.entries) == facts["weights"] == 3 * 7 + 1
    assert (found.chunks, found.chunk_size) == (3, 24)
    for ours, theirs in {"blk.2.attn_q": "model.layers.2.self_attn.q_proj", "blk.0.attn_output": "model.layers.0.self_attn.o_proj", "blk.1.ffn_down": "model.layers.1.mlp.down_proj", "output": "lm_head"}.items():  # fmt: skip
        entry = found.entries[f"{ours}.weight"]
        assert entry.counts.tolist() == [72.0]
        torch.testing.assert_close(entry.sums[0].double(), sums[theirs], rtol=1e-4, atol=1e-9)


def test_experts_have_sums_and_counts_of_their_own(models: Callable[..., Path], tmp_path: Path) -> None:
    path = models("mixtral")
    make_imatrix(path, IDS, tmp_path / "a.gguf")
    sums, found = plain_loop(transformers.AutoModelForCausalLM.from_pretrained(path)), read_imatrix(tmp_path / "a.gguf")
    for ours, theirs in (("ffn_gate_exps", "in"), ("ffn_up_exps", "in"), ("ffn_down_exps", "down")):
        entry = found.entries[f"blk.1.{ours}.weight"]
        wanted = torch.stack([sums[f"model.layers.1.mlp.experts.{e}.{theirs}"] for e in range(4)])
        torch.testing.assert_close(entry.sums.double(), wanted, rtol=1e-4, atol=1e-9)
        assert entry.counts.sum() == 2 * 72 and len(entry.counts) == 4


def test_a_router_in_a_file_of_llama_cpp_is_no_stranger(models: Callable[..., Path], tmp_path: Path) -> None:
    make_imatrix(models("mixtral"), IDS, tmp_path / "a.gguf")
    router = Importance(torch.ones(1, 64), torch.ones(1))
    path = changed(tmp_path / "a.gguf", tmp_path / "b.gguf", blk__0__ffn_gate_inp__weight=router)
    assert match_imatrix(path, OnDisk.open(models("mixtral"))).unused == ()


# ── a matrix that a method is given ───────────────────────────────────────────────────────────────────────────────────

GIVEN: dict[str, torch.Tensor] = {}


def weighed(weight: torch.Tensor, scheme: Scheme, seen: Seen | None, *, name: str) -> Rounding:
    """Rounds to nearest, and notes what it is told."""
    assert seen is not None and seen.importance is not None
    GIVEN[name] = seen.importance
    return METHODS["rtn"].round(weight, scheme, name=name)


STEP = Step("weighed", "round", round=weighed, needs=frozenset({"importance"}), fallback="rtn")


def run(model: Path, out: Path, matrix: Path | None, text: torch.Tensor | None = None) -> dict[str, Any]:
    GIVEN.clear()
    with toys_known(STEP):
        options = TextOptions(text, imatrix=matrix, evaluate=False)
        return quantize_model(model, out, Recipe.simple("w=int4/g32", "weighed"), options)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_method_is_given_the_means_without_any_text(name: str, models: Callable[..., Path], tmp_path: Path) -> None:
    make_imatrix(models(name), IDS, tmp_path / "a.gguf")
    report = run(models(name), tmp_path / "out", tmp_path / "a.gguf")
    entry = read_imatrix(tmp_path / "a.gguf").entries["blk.1.attn_v.weight"]
    torch.testing.assert_close(GIVEN["model.layers.1.self_attn.v_proj.weight"], entry.sums[0] / 72)
    assert len(GIVEN) == len(report["layers"]) and report["calibration"] is None
    assert {r["method"] for r in report["layers"]} == {"weighed"}
    assert report["importance"]["file"] == "a.gguf" and report["importance"]["lacking"] == []
    stack = read_imatrix(tmp_path / "a.gguf").entries.get("blk.1.ffn_down_exps.weight")
    if stack is not None:
        torch.testing.assert_close(
            GIVEN["model.layers.1.block_sparse_moe.experts.2.w2.weight"], stack.sums[2] / stack.counts[2]
        )


def test_with_text_and_without_a_file_it_is_what_was_seen(models: Callable[..., Path], tmp_path: Path) -> None:
    make_imatrix(models("llama"), IDS, tmp_path / "a.gguf")
    run(models("llama"), tmp_path / "out", None, IDS)
    entry = read_imatrix(tmp_path / "a.gguf").entries[
        "blk.0.attn_q.weight"
    ]  # the first inputs are not yet those of rounded weights
    torch.testing.assert_close(
        GIVEN["model.layers.0.self_attn.k_proj.weight"], entry.sums[0] / 72, rtol=1e-4, atol=1e-6
    )


def changed(path: Path, out: Path, **entries: Importance | None) -> Path:
    matrix = read_imatrix(path)
    kept = {**matrix.entries, **{n.replace("__", "."): e for n, e in entries.items()}}
    write_imatrix(out, replace(matrix, entries={n: e for n, e in kept.items() if e is not None}))
    return out


def test_what_a_file_lacks_is_named_and_not_nothing(models: Callable[..., Path], tmp_path: Path) -> None:
    make_imatrix(models("llama"), IDS, tmp_path / "a.gguf")
    zeros = Importance(torch.zeros(1, 64), torch.zeros(1))
    path = changed(tmp_path / "a.gguf", tmp_path / "b.gguf", blk__0__attn_q__weight=None, blk__1__attn_k__weight=zeros)
    report = run(models("llama"), tmp_path / "out", path)
    lacking, empty = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"
    rows = {r["name"]: r for r in report["layers"]}
    assert lacking not in GIVEN and rows[lacking]["method"] == "rtn"
    assert report["importance"]["lacking"] == [lacking] and any(
        f"has nothing of {lacking};" in n for n in report["notes"]
    )
    assert torch.equal(GIVEN[empty], torch.ones(64)) and any(f"saw no token for {empty};" in n for n in report["notes"])


def test_matrices_of_other_models_are_refused(models: Callable[..., Path], tmp_path: Path) -> None:
    make_imatrix(models("llama"), IDS, tmp_path / "a.gguf")
    other = Importance(torch.ones(1, 64), torch.ones(1))
    wrong = {
        "blk__0__ffn_down__weight": (other, r"blk\.0\.ffn_down\.weight has 64 numbers, but model\.layers\.0\.mlp\.down_proj\.weight has 96 inputs"),
        "blk__9__attn_q__weight": (other, r"blk\.9\.attn_q\.weight is of block 9, and this model has 3"),
        "blk__0__attn_z__weight": (other, r"blk\.0\.attn_z\.weight is no name of GGUF"),
    }  # fmt: skip
    source = OnDisk.open(models("llama"))
    for name, (entry, words) in wrong.items():
        with pytest.raises(DataError, match=words):
            match_imatrix(changed(tmp_path / "a.gguf", tmp_path / "b.gguf", **{name: entry}), source)
    known = match_imatrix(changed(tmp_path / "a.gguf", tmp_path / "b.gguf", blk__0__attn_k_b__weight=other), source)
    assert known.unused == ("blk.0.attn_k_b.weight",) and "also holds blk.0.attn_k_b.weight" in known.told([])[1][0]
    write_imatrix(tmp_path / "c.gguf", ImportanceMatrix({"blk.0.attn_k_b.weight": other}))
    with pytest.raises(DataError, match=r"none of its names is of this model, blk\.0\.attn_k_b\.weight"):
        match_imatrix(tmp_path / "c.gguf", source)


def test_a_matrix_that_nothing_takes_is_refused(models: Callable[..., Path], tmp_path: Path) -> None:
    make_imatrix(models("llama"), IDS, tmp_path / "a.dat")
    with pytest.raises(SchemeError, match="changes nothing: no method here takes one"):
        quantize_model(
            models("llama"), tmp_path / "out", Recipe.simple("W4A16", "rtn"), TextOptions(imatrix=tmp_path / "a.dat")
        )
    assert not (tmp_path / "out").exists()
