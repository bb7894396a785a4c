"""ggml's blocks: random bytes against gguf's own decoder, both ways; the config; damaged numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from arrondi.checkpoint import LAYOUTS, LayerValues, Placed
from arrondi.checkpoint.layouts.ggml import BLOCKS, BlockType, block_type, decode_blocks, encode_blocks
from arrondi.errors import FileFormatError, ShapeError
from arrondi.formats import FORMATS, PerChannel, Scheme, parse_scheme
from arrondi.tensor.nearest import quantize_tensor
from arrondi.tensor.qtensor import QTensor
from tests.checkpoint.layouts.test_layouts import find, same

LAYOUT = LAYOUTS["gguf"]
GRIDS = [name for name, kind in BLOCKS.items() if kind.scheme is not None]
WRITTEN = [name for name in GRIDS if BLOCKS[name].written]
ONLY_HERE = {"I8", "I16", "I32", "I64", "F32", "F16", "BF16", "F64", "Q8_1", "Q8_K"}
"""Types that are no blocks, or of activations only."""


def random_rows(kind: BlockType, rows: int = 33, columns: int = 1024, seed: int = 0) -> torch.Tensor:
    """Any bytes, but scales that are numbers."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows, columns // kind.elements * kind.size), dtype=torch.uint8, generator=generator)
    blocks = raw.view(-1, kind.size)
    for _, at in kind.halves:
        blocks[:, at : at + 2] = torch.randn(len(blocks), 1, generator=generator).half().view(torch.uint8)
    if kind.name == "MXFP4":
        blocks[:, 0] %= 255
    if kind.name == "NVFP4":
        blocks[:, :4] %= 127
    if kind.name == "IQ1_M":
        blocks[:, 55] &= 0xBF  # its scale is in the upper bits of eight bytes
    elif kind.scheme is None:
        blocks[:, :2] = torch.randn(len(blocks), 1, generator=generator).half().view(torch.uint8)
    return raw


def theirs(raw: torch.Tensor, kind: BlockType) -> np.ndarray:
    with np.errstate(all="ignore"):
        return quants.dequantize(raw.numpy(), GGMLQuantizationType(kind.number))


def test_every_type_that_gguf_decodes_is_known() -> None:
    known = {t.name for t in quants._type_traits} - ONLY_HERE
    assert set(BLOCKS) == known - {"Q1_0"}
    for name, kind in BLOCKS.items():
        assert GGMLQuantizationType(kind.number).name == name
        assert GGML_QUANT_SIZES[GGMLQuantizationType(kind.number)] == (kind.elements, kind.size)
        used = sum(p.length * p.bits for p in kind.planes) + 16 * len(kind.halves)
        assert kind.scheme is None or kind.trits or used == 8 * kind.size, "no bit of a block is without a meaning"


@pytest.mark.parametrize("name", [n for n, kind in BLOCKS.items() if kind.scheme is not None])
def test_random_bytes_mean_what_gguf_says(name: str) -> None:
    kind = BLOCKS[name]
    raw = random_rows(kind)
    assert np.array_equal(decode_blocks(raw, kind).dequantize().numpy(), theirs(raw, kind))


@pytest.mark.parametrize("name", WRITTEN)
def test_blocks_come_back_byte_for_byte(name: str) -> None:
    kind = BLOCKS[name]
    raw = random_rows(kind)
    q = decode_blocks(raw, kind)
    again = encode_blocks(q, kind)
    if kind.trits:  # bytes of which several mean the same
        assert not torch.equal(again, raw)
        raw = again
        same(decode_blocks(raw, kind), q)
    assert torch.equal(encode_blocks(decode_blocks(raw, kind), kind), raw)


@pytest.mark.parametrize("name", [n for n in WRITTEN if n in {t.name for t, c in quants._type_traits.items() if c.can_quantize}])  # fmt: skip
def test_what_is_rounded_here_is_read_by_gguf(name: str) -> None:
    kind = BLOCKS[name]
    assert kind.scheme is not None
    q = quantize_tensor(torch.randn(5, 768, generator=torch.Generator().manual_seed(1)), kind.scheme)
    assert np.array_equal(theirs(encode_blocks(q, kind), kind), q.dequantize().numpy())


def placed(name: str, shape: tuple[int, ...] = (16, 512), **facts: object) -> Placed:
    scheme = BLOCKS[name].scheme
    assert scheme is not None
    return Placed(f"model.{name}.weight", shape, parse_scheme(f"w={scheme}"), **facts)  # type: ignore[arg-type]


def test_types_of_all_kinds_in_one_directory() -> None:
    many = [placed(name) for name in WRITTEN if name != "TQ1_0"]
    many += [replace(placed("TQ1_0"), storage="TQ1_0"), placed("Q8_0", (3, 8, 64), module="else.where")]
    many[-1] = replace(many[-1], name="stack", kind="Embedding")
    many.append(replace(placed("Q4_0", (64, 8), kind="Conv1D", transposed=True), name="turned.weight"))
    files = {}
    for p in many:
        q = quantize_tensor(torch.randn(p.matrix_shape), p.scheme.weights)
        written = LAYOUT.write(p, LayerValues(q))
        assert {n: (t.dtype, tuple(t.shape)) for n, t in written.items()} == {n: (d, s) for n, d, s in LAYOUT.specs(p)}
        same(LAYOUT.read(p, written.__getitem__).weight, q)
        files |= written
    config = json.loads(json.dumps(LAYOUT.config(many, ["lm_head"])))
    assert find(LAYOUT, config, files) == many
    view = {
        n: (config["types"][n] if isinstance(config["types"][n], str) else "U8", tuple(t.shape))
        for n, t in files.items()
    }
    assert LAYOUT.find({"quantization_config": config}, view, files.__getitem__) == many, "as a GGUF file shows itself"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2 of the layout gguf"),
        ({"extra": 1}, "the key 'extra'"),
        ({"types": []}, "types should be an object"),
        ({"ignore": "lm_head"}, "ignore should be a list"),
        ({"types": {"a.weight": "Q4_L"}}, "Unknown type of blocks 'Q4_L'. Did you mean 'IQ4_NL'"),
        ({"types": {"a.weight": "IQ2_XXS"}}, "plain numbers only"),
        ({"types": {"a.weight": "Q8_0"}}, "blocks of 34 bytes, found U8"),
        ({"types": {"a.weight": {"type": "Q4_K", "rows": 3}}}, "has rows: 3"),
        ({"types": {"a.weight": 12}}, "described by a type"),
        ({"types": {"a.weight": "Q4_K", "b.weight": "Q4_K"}}, "b.weight has a type, and is not stored"),
        ({"types": {}}, "a.weight is stored as U8 and has no type"),
    ],
)
def test_a_config_that_does_not_describe_the_files_is_refused(change: dict[str, object], words: str) -> None:
    p = replace(placed("Q4_K"), name="a.weight")
    files = LAYOUT.write(p, LayerValues(quantize_tensor(torch.randn(16, 512), p.scheme.weights)))
    config = LAYOUT.config([p], [])
    assert find(LAYOUT, config, files) == [p]
    with pytest.raises(FileFormatError, match="^" + ".*" + words.replace("(", r"\(")):
        find(LAYOUT, config | change, files)


@pytest.mark.parametrize(
    ("name", "at", "bytes_", "words"),
    [
        ("Q4_K", 0, (0, 0x7C), "scale is NaN or infinite"),
        ("Q4_K", 0, (0, 0xB8), "scale is negative"),
        ("Q4_K", 2, (1, 0x7E), "offset"),
        ("Q4_1", 2, (0, 0xFC), "an offset is NaN or infinite"),
        ("Q8_0", 0, (0, 0x7E), "scale is NaN"),
        ("TQ2_0", 0, (3,), "ternary has no code 2"),
        ("MXFP4", 0, (255,), "scale is NaN"),
        ("NVFP4", 0, (0x7F,), "scale"),
    ],
)
def test_numbers_that_cannot_be_are_refused(name: str, at: int, bytes_: tuple[int, ...], words: str) -> None:
    p, kind = placed(name, storage="NVFP4" if name == "NVFP4" else ""), BLOCKS[name]
    raw = torch.full((16, 512 // kind.elements * kind.size), 0x11, dtype=torch.uint8)
    LAYOUT.read(p, lambda _: raw)
    raw[3, kind.size + at : kind.size + at + len(bytes_)] = torch.tensor(bytes_, dtype=torch.uint8)
    with pytest.raises(FileFormatError, match=words):
        LAYOUT.read(p, lambda _: raw)


def test_what_cannot_be_stored_is_refused_with_a_reason() -> None:
    assert "do not divide 384 inputs" in (LAYOUT.refuse(placed("Q4_K", (8, 384))) or "")
    assert LAYOUT.refuse(placed("Q4_0", (8, 384))) is None
    assert "they hold Q4_0, Q4_1" in (LAYOUT.refuse(Placed("a.weight", (8, 256), parse_scheme("W4A16"))) or "")
    assert "inputs" in (LAYOUT.refuse(Placed("a.weight", (8, 256), parse_scheme("MXFP4"))) or "")
    assert "Conv2d" in (LAYOUT.refuse(placed("Q4_0", (8, 8, 2, 2), kind="Conv2d")) or "")
    assert "order=dynamic" in (LAYOUT.refuse(placed("Q4_0", indexed=True)) or "")
    q = quantize_tensor(torch.randn(4, 256), Scheme(FORMATS["int4"], PerChannel()))
    with pytest.raises(ShapeError, match="blocks of Q4_0 hold"):
        encode_blocks(q, BLOCKS["Q4_0"], "w")
    with pytest.raises(FileFormatError, match=r"w: rows of Q4_K are whole blocks of 144 bytes, got .*145"):
        decode_blocks(torch.zeros(2, 145, dtype=torch.uint8), BLOCKS["Q4_K"], "w")
    assert block_type("q4_k") is BLOCKS["Q4_K"]


def test_an_empty_matrix() -> None:
    q = decode_blocks(torch.zeros(0, 144, dtype=torch.uint8), BLOCKS["Q4_K"])
    assert q.shape == (0, 256) and isinstance(q.scale, QTensor)
    assert encode_blocks(q, BLOCKS["Q4_K"]).shape == (0, 144)
