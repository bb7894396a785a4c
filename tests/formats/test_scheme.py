"""Presets against compressed-tensors' own, the compact grammar, and what it says to a typing mistake."""

from __future__ import annotations

import re

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from arrondi.errors import ArrondiError, SchemeError
from arrondi.formats import (
    FORMATS,
    PRESETS,
    ActivationScheme,
    LayerScheme,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Scheme,
    integer,
    parse_scheme,
)
from arrondi.formats.ggml import GGML
from arrondi.tensor.nearest import quantize_tensor

SHARED = sorted(PRESETS.keys() & PRESET_SCHEMES.keys())


def facts(scheme: Scheme | ActivationScheme | None) -> dict[str, object] | None:
    """Our scheme in the words of `QuantizationArgs`."""
    if scheme is None:
        return None
    if isinstance(scheme, ActivationScheme):
        return {**(facts(scheme.scheme) or {}), "dynamic": scheme.dynamic}
    where = scheme.granularity
    strategy = {PerTensor: "tensor", PerChannel: "channel", PerToken: "token", PerBlock: "block", PerGroup: "group"}[
        type(where)
    ]
    if isinstance(where, PerGroup) and isinstance(scheme.scale, Scheme):
        strategy = "tensor_group"
    return {
        "num_bits": scheme.format.bits,
        "type": "int" if scheme.format.kind == "integer" else "float",
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": where.size if isinstance(where, PerGroup) else None,
        "block_structure": [where.rows, where.columns] if isinstance(where, PerBlock) else None,
    }


def their_facts(args: QuantizationArgs | None, of_inputs: bool = False) -> dict[str, object] | None:
    if args is None:
        return None
    return {
        key: getattr(args, key)
        for key in ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure")
    } | ({} if args.dynamic is False and not of_inputs else {"dynamic": args.dynamic})


def test_the_shared_names_are_the_expected_ones() -> None:
    wanted = {f"W{b}A16" for b in range(2, 9)} | {
        "W4A16_ASYM",
        "W8A8",
        "W4A4",
        "W4A8",
        "W4AFP8",
        "FP8",
        "FP8_DYNAMIC",
        "FP8_BLOCK",
    }
    wanted |= {"MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16", "NVFP4", "NVFP4A16"}
    assert set(SHARED) == wanted


@pytest.mark.parametrize("name", SHARED)
def test_a_preset_means_what_compressed_tensors_means(name: str) -> None:
    mine, theirs = PRESETS[name], PRESET_SCHEMES[name]
    assert facts(mine.weights) == their_facts(theirs["weights"])
    assert facts(mine.inputs) == their_facts(theirs.get("input_activations"), of_inputs=True)


@pytest.mark.parametrize(("name", "bits"), [("MXFP4", 4), ("MXFP8", 8), ("MXFP6", 6), ("NVFP4A16", 4)])
def test_block_formats_store_the_scales_of_their_specification(name: str, bits: int) -> None:
    weights = PRESETS[name].weights
    assert weights.format.bits == bits
    if name == "NVFP4A16":
        assert weights.granularity == PerGroup(16)
        assert weights.scale == Scheme(FORMATS["fp8_e4m3"], PerTensor())
    else:
        assert (weights.granularity, weights.scale) == (PerGroup(32), "e8m0")


@pytest.mark.parametrize("name", GGML)
def test_ggml_types_have_the_bits_of_their_blocks(name: str) -> None:
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    q = quantize_tensor(torch.linspace(-1, 1, 1024).reshape(2, 512), PRESETS[name])
    shared = 66 if name == "TQ1_0" else size  # whose codes are those of TQ2_0, five to a byte
    assert q.bits_per_weight == shared * 8 / elements


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_found_in_any_spelling(name: str) -> None:
    for text in (name, name.lower(), name.replace("_", "-"), f" {name} "):
        assert parse_scheme(text) is PRESETS[name]


@pytest.mark.parametrize(("alias", "name"), [("INT8", "W8A8"), ("int8-dynamic", "W8A8")])
def test_aliases(alias: str, name: str) -> None:
    assert parse_scheme(alias) is PRESETS[name]


INT3_G64_ASYM = Scheme(integer(3), PerGroup(64), "integer")
TOKEN8 = ActivationScheme(Scheme(integer(8), PerToken()))
STATIC8 = ActivationScheme(Scheme(integer(8), PerTensor()), dynamic=False)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("w=int4", LayerScheme(Scheme(integer(4), PerChannel()))),
        ("w=int3/g64/asym", LayerScheme(INT3_G64_ASYM)),
        ("w=int3/asym/g64", LayerScheme(INT3_G64_ASYM)),
        ("W = INT3/G64/ASYM", LayerScheme(INT3_G64_ASYM)),
        ("w=int3/g64/asym,a=int8", LayerScheme(INT3_G64_ASYM, TOKEN8)),
        ("w=int3/g64/asym,a=int8/token/dynamic", LayerScheme(INT3_G64_ASYM, TOKEN8)),
        (
            "a=int8/tensor/static, w=int3/g64/asym",
            LayerScheme(INT3_G64_ASYM, STATIC8),
        ),
        ("w=fp8_e4m3/b128x64/float16", LayerScheme(Scheme(FORMATS["fp8_e4m3"], PerBlock(128, 64), scale="float16"))),
        ("w=fp4/g32/e8m0", LayerScheme(Scheme(FORMATS["fp4_e2m1"], PerGroup(32), scale="e8m0"))),
        (
            "w=uint4/g32/offset/bfloat16",
            LayerScheme(Scheme(integer(4, signed=False), PerGroup(32), "float", "bfloat16")),
        ),
        ("w=int8/channel1", LayerScheme(Scheme(integer(8), PerChannel(1)))),
        ("w=nf4/tensor", LayerScheme(Scheme(FORMATS["nf4"], PerTensor()))),
    ],
)
def test_the_grammar(text: str, wanted: LayerScheme) -> None:
    assert parse_scheme(text) == wanted


SPELLED = {
    **PRESETS,
    "bfloat16 scales": PRESETS["W4A16"].with_scale("bfloat16"),
    "float16 offset": LayerScheme(Scheme(integer(4, signed=False), PerGroup(64), "float", "float16")),
    "input channels": LayerScheme(Scheme(integer(8), PerChannel(1))),
    "static activations": LayerScheme(Scheme(integer(8)), STATIC8),
}


@pytest.mark.parametrize("name", SPELLED)
def test_a_scheme_reads_back_from_its_own_text(name: str) -> None:
    assert parse_scheme(str(SPELLED[name])) == SPELLED[name]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("W4A16", "w=int4/g128"),
        ("W4A16_ASYM", "w=int4/g128/asym"),
        ("W8A8", "w=int8/channel,a=int8/token"),
        ("FP8_BLOCK", "w=fp8_e4m3/b128x128,a=fp8_e4m3/g128"),
        ("MXFP4A16", "w=fp4_e2m1/g32/e8m0"),
        ("T158", "w=ternary/tensor"),
    ],
)
def test_the_text_of_a_scheme(name: str, text: str) -> None:
    assert str(PRESETS[name]) == text


def test_quantized_scales_are_shown_in_parentheses() -> None:
    assert str(PRESETS["NVFP4A16"]) == "w=fp4_e2m1/g16/s:(fp8_e4m3/tensor)"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("W4A17", "Unknown scheme 'W4A17'. Did you mean 'W4A16'"),
        ("mxpf4", "Did you mean 'MXFP4'"),
        ("w=int4/g128/asim", "Did you mean 'asym'"),
        ("w=int4/grp128", "'grp128'"),
        ("w=int4/g-1", "'g-1'"),
        ("w=int4/g", "'g'"),
        ("w=int4/g" + "1" * 5000, "Unknown word in scheme"),
        ("w=int4/g٣٢", "Unknown word in scheme"),
        ("w=itn4/g128", "Unknown number format 'itn4'. Did you mean 'int4'"),
        ("w=", "Cannot read 'w='"),
        ("w=int4,", "Cannot read ''"),
        ("a=int8", "A scheme has 'w=…'"),
        ("w=int4,k=int8", "A scheme has 'w=…'"),
        ("w=int4,w=int8", "A scheme has 'w=…'"),
        ("w=nf4/asym", "A zero point needs an integer format"),
        ("w=int4/g32/asym/e8m0", "go with symmetric formats only"),
        ("w=int4/g0", "group_size=0"),
        ("w=int4/b0x4", "A block has at least one element"),
        ("w=int4/channel/g128", "'channel' and 'g128' contradict each other"),
        ("w=int4/g64/g128", "contradict each other"),
        ("w=int4/asym/offset", "contradict each other"),
        ("w=int4/s:float16/bfloat16", "contradict each other"),
        ("w=int8,a=int8/dynamic/static", "contradict each other"),
        ("w=NVFP4", "NVFP4 is a scheme, not a number format"),
        ("", "The scheme is empty"),
        (" ", "The scheme is empty"),
    ],
)
def test_a_mistake_is_answered_with_what_to_write(text: str, words: str) -> None:
    with pytest.raises(ArrondiError) as caught:
        parse_scheme(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Q4_K_M", "GGUF.*nearest in meaning is Q4_K"),
        ("iq3_m", "GGUF.*nearest in meaning is Q3_K"),
        ("int4", "W4A16.*W4A8"),
        ("4-bit", "W4A16"),
        ("8", "W8A16.*W8A8"),
        ("int3_weight_only", "W3A16"),
        ("16", "2 to 8"),
        ("W4A16-G32", "w=int4/g32"),
        ("W4A16_SYM", "W4A16 is symmetric"),
        ("gptq", "--method"),
        ("bnb-4bit", "NF4"),
        ("LLM.int8", "W8A8"),
        ("e4m3", "FP8_DYNAMIC"),
        ("bf16", "plain type"),
        ("1.58bit", "T158"),
        ("W4A4_MX", "NVFP4"),
        ("W16A16", "plain type"),
        ("W1A16", "BINARY"),
        ("UD-Q4_K_XL", "Q4_K"),
        ("q4f16_1", "W4A16"),
        ("8da4w", "W4A8"),
        ("W8A8-INT8", "W8A8"),
        ("W8A8_FP8", "FP8_DYNAMIC"),
        ("FP8_STATIC", "FP8 has stored scales"),
        ("int4/g64", "w=int4/g64"),
        ("W4A16/g64", "--group-size 64 .*w=int4/g128"),
        ("W4A16,a=int8", "w=int4/g128"),
        ("smoothquant", "W8A8"),
        ("nvfp4_awq", "the scheme is NVFP4"),
        ("W4A16_GPTQ", "--method gptq --scheme W4A16"),
        ("exl3", "ExLlama"),
        ("bitsandbytes", "NF4"),
        ("torchao", "a library"),
        ("FP6", "MXFP6"),
        ("MXFP4_MOE", "MXFP4"),
        ("mxint8", "w=int8/g32/e8m0"),
    ],
)
def test_names_of_other_tools_are_answered_with_the_nearest_in_meaning(text: str, words: str) -> None:
    with pytest.raises(SchemeError, match=f"^Unknown scheme '{text}'.*{words}.*Known: BINARY"):
        parse_scheme(text)


def test_every_scheme_that_a_hint_names_exists() -> None:
    for text in ("Q3_K_S", "Q5_K_M", "Q4_0_4_4", "IQ1_S", "IQ2_M", "IQ3_M", "IQ4_K", "TQ1_1", "TQ2_1", "Q9_K"):
        with pytest.raises(SchemeError) as caught:
            parse_scheme(text)
        parse_scheme(str(caught.value).split("nearest in meaning is ")[1].split(". ")[0])
    for bits in range(2, 9):
        with pytest.raises(SchemeError) as caught:
            parse_scheme(f"{bits}bit")
        for word in re.findall(r"w=\S+|W\dA\d+", str(caught.value).split(" Known:")[0]):
            parse_scheme(word.rstrip("."))


def test_fp8_is_a_scheme_and_no_spelling_mistake() -> None:
    assert parse_scheme("fp8") is PRESETS["FP8"]


def test_another_group_size() -> None:
    assert PRESETS["W4A16"].with_group_size(32).weights.granularity == PerGroup(32)
    assert PRESETS["W4A16"].with_group_size(-1).weights.granularity == PerChannel()
    assert PRESETS["W4A8"].with_group_size(32).inputs == PRESETS["W4A8"].inputs
    for name in ("MXFP4", "NVFP4A16"):
        with pytest.raises(SchemeError, match="fixed by the format"):
            PRESETS[name].with_group_size(64)


def test_another_scale_type_is_for_plain_scales_only() -> None:
    assert PRESETS["W4A16"].with_scale("bfloat16").weights.scale == "bfloat16"
    assert PRESETS["MXFP4"].with_scale("bfloat16") == PRESETS["MXFP4"]
    assert PRESETS["NVFP4A16"].with_scale("bfloat16") == PRESETS["NVFP4A16"]
    assert PRESETS["W8A8"].with_scale("bfloat16").inputs == PRESETS["W8A8"].inputs, "scales that follow each input"
    static = PRESETS["W8A8_STATIC"].with_scale("bfloat16").inputs
    assert static is not None and static.scheme.scale == "bfloat16"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("w=int4/static", "Weights have no 'static' scales"),
        ("w=int8,a=int8/token/static", "cannot follow single tokens"),
        ("w=int8,a=int8/g32/static", "cannot follow single tokens"),
        ("w=int8,a=int8/tensor/local", "those of int8/tensor are not quantized"),
        ("w=fp4/g16/s:(fp8/tensor/static)", "said of activations as a whole"),
        ("w=int4/asym/o:float16", "need 'offset'"),
        ("w=fp4/g32/e8m0/signed", "have no sign"),
        ("w=nf4/asym", "A zero point needs an integer format"),
    ],
)
def test_what_does_not_go_together(text: str, words: str) -> None:
    with pytest.raises(SchemeError, match=words):
        parse_scheme(text)


@pytest.mark.parametrize(
    "text",
    [
        "w=int8/channel,a=int8/tensor/asym/static,o=int8/tensor/static,kv=fp8_e4m3/tensor/static",
        "w=fp4_e2m1/g16/s:(fp8_e4m3/tensor),a=fp4_e2m1/g16/s:(fp8_e4m3/tensor)/local",
        "w=uint4/g32/offset/s:(uint6/g8/float16)/o:(uint6/g8/float16)",
        "w=int6/g16/s:(int8/g16/float16)/signed",
        "w=int4/g32/unsigned",
        "w=nf4/g64/offset/bfloat16/o:float16",
        "w=int4/g16/s:(int8/g4/s:(fp8_e4m3/tensor))",
    ],
)
def test_all_that_a_scheme_can_say_is_written_and_read(text: str) -> None:
    assert str(parse_scheme(text)) == text
    assert parse_scheme(text.upper().replace("W=", " w = ")) == parse_scheme(text)


def test_one_meaning_has_one_value() -> None:
    assert Scheme(integer(4), signed=True) == Scheme(integer(4))
    assert Scheme(integer(4), scale="e8m0", signed=False) == Scheme(integer(4), scale="e8m0")
    assert [Scheme(integer(4), scale=s).signed_scales for s in ("float32", "float16", "e8m0", Scheme(integer(8)))] == [
        True, True, False, False,
    ]  # fmt: skip


def test_symmetric_means_that_no_zero_is_stored() -> None:
    assert [Scheme(integer(4), PerChannel(), z).symmetric for z in ("none", "integer", "float")] == [True, False, False]
