"""What is said of transformers is what transformers does: small random models, quantized tensor by tensor, against a plain reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arrondi.checkpoint import LAYOUTS, LayerValues, ModelFacts, Placed, readers_of
from arrondi.checkpoint.verdict import TRANSFORMERS, Verdict
from arrondi.formats import LayerScheme, parse_scheme
from tests.checkpoint.copies import Pick, distance, linears, loaded, logits, quantized_copy, reference

CT = LAYOUTS["compressed-tensors"]
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
"""Blocks of 128 × 128 fit."""
EXACT = 1e-6
ONCE_MORE = 2.0**-6
"""Weights rounded once more to bfloat16, or products in bfloat16."""


def verdict(made: dict[str, tuple[Placed, LayerValues]], facts: ModelFacts = ModelFacts()) -> Verdict:
    return next(v for v in readers_of([p for p, _ in made.values()], CT, facts) if v.reader == TRANSFORMERS)


def apart(source: Path, tmp_path: Path, pick: Pick, dtype: torch.dtype = torch.float32, kind: str = "Linear", rounded: bool = True) -> tuple[float, Verdict]:  # fmt: skip
    """How far transformers is from the reference, and what is said of it."""
    made = quantized_copy(source, tmp_path / "out", pick, kind=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = logits(loaded(tmp_path / "out", dtype))
    wanted = logits(reference(source, tmp_path / "reference", made, rounded))
    return distance(found, wanted), verdict(made)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "scheme",
    [
        "W3A16", "W4A16", "W8A8", "W8A8_STATIC", "W4A8", "W4AFP8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "FP8A16", "w=int8/channel,a=int8/tensor/asym/static",
        "w=int4/g32,a=int8/tensor", "W4A16_ASYM", "NVFP4A16", "MXFP4A16", "w=fp6_e2m3/g32/e8m0",
    ],
)  # fmt: skip
def test_dense_layers_are_computed_as_we_mean_them(
    scheme: str, stored: torch.dtype, models: Callable[..., Path], tmp_path: Path
) -> None:
    error, said = apart(models("llama", stored, **WIDE), tmp_path, linears(parse_scheme(scheme)))
    assert said.ok
    again = "once more" in said.sentence
    assert again == (scheme == "NVFP4A16" or (scheme == "W4A16_ASYM" and stored == torch.bfloat16))
    assert error <= (ONCE_MORE if again else EXACT)


def test_the_last_bit_of_a_sum_may_move_an_input_to_its_next_code(models: Callable[..., Path], tmp_path: Path) -> None:
    """transformers is as far from itself, if one number before the layers changes in its last bit, as from our kernels."""
    import arrondi

    source = models("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=6)
    made = quantized_copy(source, tmp_path / "out", linears(parse_scheme("W8A8")))
    assert "next code" in verdict(made).sentence
    theirs = loaded(tmp_path / "out", torch.float32)
    found = logits(theirs)
    cost = distance(found, logits(reference(source, tmp_path / "reference", made, rounded=False)))
    again = loaded(tmp_path / "out", torch.float32)
    with torch.no_grad():
        again.get_input_embeddings().weight.mul_(1 + 2.0**-22)
    assert EXACT < distance(logits(again), found) <= cost
    assert distance(logits(arrondi.load(tmp_path / "out")), found) <= cost


@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP8", "NVFP4", "w=fp6_e2m3/g32/e8m0,a=fp6_e2m3/g32/e8m0"])
def test_small_floats_with_rounded_inputs_run_in_bfloat16_only(
    scheme: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    source = models("llama", torch.bfloat16, **WIDE)
    made = quantized_copy(source, tmp_path / "out", linears(parse_scheme(scheme)))
    said = verdict(made)
    assert "dtype=bfloat16" in said.sentence
    assert said.ok == (scheme == "NVFP4")
    with pytest.raises(RuntimeError, match="same dtype"):
        logits(loaded(tmp_path / "out", torch.float32))
    original, found = logits(loaded(source, torch.float32)), logits(loaded(tmp_path / "out"))
    ours = logits(reference(source, tmp_path / "reference", made))
    # MX scales of inputs follow another rule there, hence the wide bound: what both lose against the original is of one size.
    assert 0.5 < distance(ours, original) / distance(found, original) < 2


EXPERTS = {
    "W3A16": EXACT, "W4A16": EXACT, "w=int4/channel": EXACT, "FP8A16": EXACT, "FP8_DYNAMIC": EXACT, "W4A8": EXACT, "MXFP4A16": ONCE_MORE,
    "W4A16_ASYM": None, "W8A8": None, "FP8_BLOCK": None, "NVFP4A16": None, "MXFP8A16": None,
}  # fmt: skip
"""Scheme of fused experts → how near transformers comes in float32; None: it does not read them."""


@pytest.mark.parametrize("scheme", EXPERTS)
def test_experts_are_read_or_it_is_said(scheme: str, models: Callable[..., Path], tmp_path: Path) -> None:
    source = models("mixtral", num_attention_heads=4, **WIDE)
    bound = EXPERTS[scheme]
    try:
        error, said = apart(source, tmp_path, linears(parse_scheme(scheme)))
    except RuntimeError:
        error, said = float("inf"), verdict(quantized_copy(source, tmp_path / "again", linears(parse_scheme(scheme))))
    assert said.ok == (bound is not None)
    assert error <= bound if bound is not None else error > 0.1, (
        "if transformers has learnt it, the table is out of date"
    )
    assert ("fused experts in 16 bits" in said.sentence) == (bound == ONCE_MORE)


def test_experts_with_scales_of_16_bits_stay_in_16_bits(models: Callable[..., Path], tmp_path: Path) -> None:
    source = models("mixtral", torch.bfloat16, num_attention_heads=4, **WIDE)
    error, said = apart(source, tmp_path, linears(parse_scheme("W4A16")))
    assert said.ok and "fused experts in 16 bits" in said.sentence
    assert EXACT < error <= ONCE_MORE


def by_part(schemes: dict[str, str]) -> Pick:
    """Linears, each by the first word that its name has."""

    def pick(name: str, shape: tuple[int, ...]) -> LayerScheme | None:
        word = next(w for w in schemes if w in name)
        return linears(parse_scheme(schemes[word]))(name, shape)

    return pick


@pytest.mark.parametrize(
    ("model", "schemes", "says"),
    [
        ("llama", {"down_proj": "W8A16", "q_proj": "FP8_DYNAMIC", "": "W4A16"}, None),
        ("llama", {"down_proj": "W8A8_STATIC", "q_proj": "W4A8", "": "FP8"}, None),
        ("llama", {"down_proj": "W4A16_ASYM", "": "W4A16"}, "this mix"),
        ("mixtral", {"experts": "W8A16", "": "W4A16"}, None),
        ("mixtral", {"experts": "W4A16", "": "W8A16"}, None),
        ("mixtral", {"experts": "MXFP4A16", "": "W4A16_ASYM"}, None),
        ("mixtral", {"w2": "W8A16", "": "W4A16"}, "all experts by one scheme"),
    ],
)
def test_mixes_are_read_or_it_is_said(
    model: str, schemes: dict[str, str], says: str | None, models: Callable[..., Path], tmp_path: Path
) -> None:
    extra = {"num_attention_heads": 4} if model == "mixtral" else {}
    source = models(model, **WIDE, **extra)
    if says is None:
        error, said = apart(source, tmp_path, by_part(schemes))
        assert said.ok and error <= (ONCE_MORE if "16 bits" in said.sentence else EXACT)
        return
    said = verdict(quantized_copy(source, tmp_path / "out", by_part(schemes)))
    assert not said.ok and says in said.sentence
    with warnings.catch_warnings(), pytest.raises((RuntimeError, AssertionError)):
        warnings.simplefilter("ignore")
        error, _ = apart(source, tmp_path, by_part(schemes))
        assert error <= 0.1


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16", "w=int3/g32/asym", "w=int4/channel", "FP8A16", "w=int8/tensor"])
def test_conv1d_is_read_with_groups_along_the_inputs(scheme: str, models: Callable[..., Path], tmp_path: Path) -> None:
    error, said = apart(models("gpt2", n_layer=1, n_embd=128), tmp_path, linears(parse_scheme(scheme)), kind="Conv1D")
    assert said.ok and error <= EXACT


@pytest.mark.parametrize("scheme", ["W8A8", "FP8"])
def test_the_inputs_of_conv1d_stay_as_they_are(scheme: str, models: Callable[..., Path], tmp_path: Path) -> None:
    source = models("gpt2", n_layer=1, n_embd=128)
    error, said = apart(source, tmp_path, linears(parse_scheme(scheme)), kind="Conv1D")
    assert not said.ok and "leaves the inputs of Conv1D" in said.sentence and error > 1e-3
    error, _ = apart(source, tmp_path / "again", linears(parse_scheme(scheme)), kind="Conv1D", rounded=False)
    assert error <= EXACT, "and nothing but the rounding of inputs is apart"


@pytest.mark.parametrize("schemes", [{"": "W4A16"}, {"down_proj": "W8A16", "": "W4A16"}], ids=["one", "two"])
def test_names_without_the_prefix_of_the_model_are_read(
    schemes: dict[str, str], models: Callable[..., Path], tmp_path: Path
) -> None:
    """Targets and ignores name modules of the model, not stored tensors."""
    from safetensors.torch import load_file, save_file

    from arrondi.checkpoint import Checkpoint

    source = tmp_path / "bare"
    source.mkdir()
    original = models("llama", **WIDE)
    (source / "config.json").write_bytes((original / "config.json").read_bytes())
    tensors = {n.removeprefix("model."): t for n, t in load_file(original / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    made = quantized_copy(
        source, tmp_path / "out", by_part(schemes), module_of=lambda name: "model." + name.removesuffix(".weight")
    )
    wanted = logits(reference(source, tmp_path / "reference", made))
    assert distance(logits(loaded(tmp_path / "out", torch.float32)), wanted) <= EXACT
    assert Checkpoint.open(tmp_path / "out").placed == {name: placed for name, (placed, _) in made.items()}


def test_our_own_layout_is_read_by_us_alone(models: Callable[..., Path], tmp_path: Path) -> None:
    placed = [Placed("a.weight", (128, 128), parse_scheme("NF4"))]
    assert LAYOUTS["arrondi"].refuse(placed[0]) is None
    found = {v.reader: v for v in readers_of(placed, LAYOUTS["arrondi"])}
    assert found["arrondi"].ok and not found[TRANSFORMERS].ok
    assert "random weights" in found[TRANSFORMERS].sentence


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8", "W4AFP8", "W3A16", "W4A16_ASYM"])
def test_every_verdict_is_a_sentence(scheme: str) -> None:
    for facts in (ModelFacts(), ModelFacts(dtype="bfloat16", whole=True)):
        for said in readers_of([Placed("a.weight", (128, 128), parse_scheme(scheme))], CT, facts):
            assert said.sentence.endswith(".") and "\n" not in said.sentence
    readers = {v.reader: v.ok for v in readers_of([Placed("a.weight", (128, 128), parse_scheme(scheme))], CT)}
    assert readers["vLLM"] == (scheme != "W3A16")
    assert readers["SGLang"] == (scheme in ("W4A16", "W8A8", "FP8"))
    said = verdict({"a.weight": (Placed("a.weight", (128, 128), parse_scheme(scheme)), None)}, ModelFacts("bfloat16"))
    assert "By default it computes in bfloat16" in said.sentence or not said.ok
