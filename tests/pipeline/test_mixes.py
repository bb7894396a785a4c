"""Which type each tensor gets under a mix; held to llama.cpp's own files by `test_llama_quantize`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader

import arrondi
from arrondi.checkpoint.layouts.ggml import BLOCKS
from arrondi.errors import SchemeError
from arrondi.pipeline import Recipe
from arrondi.pipeline.convert import convert_model
from arrondi.pipeline.mixes import MIXES, Facts, mix_of, type_in_mix
from arrondi.pipeline.recipe import Rule

V, DOWN, OUT, UP = (f"blk.3.{n}.weight" for n in ("attn_v", "ffn_down", "attn_output", "ffn_up"))
HEAD, WORDS = "output.weight", "token_embd.weight"


def along(mix: str, name: str, layers: int = 16, **facts: object) -> str:
    """The types of all layers, by the digit of their bits; "s" for Q4_0 and the like."""
    found = [type_in_mix(mix, name, Facts(512, i, layers, **facts)) for i in range(layers)]  # type: ignore[arg-type]
    return "".join(str(kind).removeprefix("IQ").removeprefix("Q")[0] for kind in found)


@pytest.mark.parametrize(
    ("mix", "name", "facts", "types"),
    [
        ("Q4_K_M", V, {}, "66446446446446" + "66"),
        ("Q5_K_M", DOWN, {}, "66556556556556" + "66"),
        ("Q4_K_M", DOWN, {"falcon": True}, "65445445445445" + "55"),
        ("Q4_K_S", V, {}, "5555" + 12 * "4"),
        ("Q4_K_S", DOWN, {}, "55" + 14 * "4"),
        ("Q3_K_M", V, {}, "55" + 14 * "4"),
        ("Q3_K_M", DOWN, {}, "5" + 15 * "4"),
        ("Q3_K_M", OUT, {}, 16 * "4"),
        ("Q3_K_M", UP, {}, 16 * "3"),
        ("Q3_K_L", V, {}, 16 * "5"),
        ("Q2_K", V, {"gqa": 4}, 16 * "4"),
        ("Q2_K", V, {"gqa": 2}, 16 * "3"),
        ("Q2_K", V, {"gqa": 8, "seventy": True}, 16 * "5"),
        ("Q2_K_S", DOWN, {}, "44" + 14 * "2"),
        ("Q4_K_M", V, {"experts": 8}, 16 * "8"),
        ("Q4_K_M", OUT, {"experts": 8}, 16 * "5"),
        ("IQ4_XS", V, {"gqa": 4}, 16 * "5"),
        ("IQ4_XS", DOWN, {}, "55" + 14 * "4"),
        ("IQ4_XS", DOWN, {"importance": True}, 16 * "4"),
    ],
)  # fmt: skip
def test_layers(mix: str, name: str, facts: dict[str, object], types: str) -> None:
    assert along(mix, name, **facts) == types


def test_heads_tables_and_rows_that_no_large_block_divides() -> None:
    assert type_in_mix("Q4_K_M", HEAD, Facts(512)) == "Q6_K"
    assert type_in_mix("Q4_K_M", WORDS, Facts(512)) == "Q4_K"
    assert type_in_mix("Q4_K_M", WORDS, Facts(512, tied=True)) == "Q6_K"
    assert type_in_mix("Q8_0", HEAD, Facts(512)) == type_in_mix("Q4_K_M", HEAD, Facts(512, falcon=True)) == "Q8_0"
    assert type_in_mix("Q4_K_M", HEAD, Facts(288)) == "Q8_0"
    assert type_in_mix("TQ2_0", WORDS, Facts(512)) == "Q4_K"
    assert type_in_mix("MXFP4_MOE", "blk.0.ffn_up_exps.weight", Facts(512, stacked=True)) == "MXFP4"
    narrow = {mix: type_in_mix(mix, UP, Facts(288)) for mix in MIXES}
    assert narrow["Q2_K"] == narrow["Q3_K_M"] == narrow["TQ2_0"] == "Q4_0"
    assert (narrow["Q4_K_M"], narrow["Q5_K_S"], narrow["Q6_K"]) == ("Q5_0", "Q5_1", "Q8_0")
    assert narrow["IQ4_XS"] == narrow["IQ4_NL"] == "IQ4_NL"
    assert all(type_in_mix(mix, UP, Facts(40)) is None for mix in MIXES)
    assert all(BLOCKS[mix.base].written for mix in MIXES.values())


def test_of_two_types_with_one_scheme_the_word_decides() -> None:
    words = ("TQ1_0", "tq1-0", "TQ2_0", "mix:TQ1_0", "Q4_K", "Q4_K_M")
    assert [Rule(word).blocks for word in words] == ["TQ1_0", "TQ1_0", "", "TQ1_0", "", ""]
    assert Rule("TQ1_0").scheme == Rule("TQ2_0").scheme


def test_a_name_is_a_mix_where_no_type_has_it() -> None:
    assert [mix_of(word) for word in ("Q4_K_M", "q4-k-m", "Q4_K", "mix:q4_0", "W4A16", None)] == [
        "Q4_K_M", "Q4_K_M", "", "Q4_0", "", "",
    ]  # fmt: skip
    with pytest.raises(SchemeError, match=r"Unknown mix 'Q4_K'.*Q4_K_M"):
        Recipe.simple("mix:Q4_K")
    with pytest.raises(SchemeError, match=r"block sizes of Q4_K_M are.*Drop --group-size"):
        Recipe.simple("Q4_K_M", group_size=64)
    assert [r["mix"] for r in Recipe.simple("Q4_K_M", "gptq").to_dict()["rules"]] == ["Q4_K_M", "Q4_K_M"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_mix_is_made_of_a_model(tied: bool, models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 4, "num_hidden_layers": 4}
    plain, out = models("llama", **wide, tie_word_embeddings=tied), tmp_path / "m.gguf"
    arrondi.quantize(
        plain, "Q4_K_M", method="gptq", out=out, to="gguf", calibration=text, samples=4, seq_len=32, evaluate=False
    )
    types = {t.name: t.tensor_type.name for t in GGUFReader(out).tensors if t.tensor_type.name != "F32"}
    wanted = {WORDS: "Q6_K" if tied else "Q4_K", **({} if tied else {HEAD: "Q6_K"})}
    for i in range(4):
        more = i in (2, 3)
        block = {"attn_q": "Q4_K", "attn_k": "Q4_K", "attn_v": "Q6_K" if more else "Q4_K", "attn_output": "Q4_K"}
        block |= {"ffn_up": "Q4_K", "ffn_gate": "Q4_K", "ffn_down": "Q8_0" if more else "Q5_0"}
        wanted |= {f"blk.{i}.{n}.weight": kind for n, kind in block.items()}
    assert types == wanted


def test_the_smaller_type_of_three_values_is_written_and_stays(models: Callable[..., Path], tmp_path: Path) -> None:
    source = models("llama", hidden_size=256, intermediate_size=512)
    arrondi.quantize(source, "TQ1_0", out=tmp_path / "one.gguf", to="gguf", evaluate=False)
    convert_model(tmp_path / "one.gguf", tmp_path / "again.gguf", "gguf", exact_only=True)
    one, again = ({t.name: t for t in GGUFReader(tmp_path / n).tensors} for n in ("one.gguf", "again.gguf"))
    assert one["blk.0.ffn_up.weight"].tensor_type.name == "TQ1_0"
    assert all(t.tensor_type == one[n].tensor_type and (t.data == one[n].data).all() for n, t in again.items())
