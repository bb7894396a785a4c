"""Numbers that a scheme does not allow are found, and those that it allows are not complained of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from arrondi.errors import FileFormatError
from arrondi.formats import FORMATS, PRESETS, parse_scheme
from arrondi.tensor.nearest import quantize_tensor
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.storage import load_scale
from arrondi.tensor.validate import validate


def rounded(text: str) -> QTensor:
    return quantize_tensor(torch.randn(8, 256, generator=torch.Generator().manual_seed(0)), text)


@pytest.mark.parametrize(
    "text",
    [
        *(name for name, known in PRESETS.items() if known.weights.nearest),
        "w=uint4/g32/offset/s:(uint6/g8/float16)/o:(uint6/g8/float16)",
        "w=int4/g32/unsigned",
    ],
)
def test_what_was_rounded_here_is_valid(text: str) -> None:
    q = rounded(text)
    assert validate(q, "w") is q


@pytest.mark.parametrize("name", FORMATS)
def test_every_byte_is_a_code_or_is_found(name: str) -> None:
    """All 256 bytes of every format, against the format's own list of codes."""
    q = quantize_tensor(torch.ones(1, 1), parse_scheme(f"w={name}").weights)
    for byte in range(256):
        code = torch.tensor([[byte]], dtype=torch.uint8).view(q.codes.dtype)
        format = FORMATS[name]
        fine = format.qmin <= int(code) <= format.qmax
        if fine and format.values is not None:
            fine = abs(format.values[int(code)]) < float("inf")  # false for NaN
        if fine:
            validate(replace(q, codes=code), "w")
        else:
            with pytest.raises(FileFormatError, match=r"^w: .*code.*(is outside|NaN or infinity)"):
                validate(replace(q, codes=code), "w")


def broken(text: str, part: str, value: float, place: tuple[int, int] = (2, 0)) -> QTensor:
    q = rounded(text)
    owner, _, inner = part.rpartition(".")
    target = getattr(q, owner) if owner else q
    changed = getattr(target, inner).clone()
    changed[place] = value
    target = replace(target, **{inner: changed})
    return replace(q, **{owner: target}) if owner else target


@pytest.mark.parametrize(
    ("text", "part", "value", "words"),
    [
        ("TERNARY", "codes", -2, r"code -2 at \[2, 0\] is outside -1 … 1 of ternary"),
        ("W4A16", "codes", 8, r"code 8 at \[2, 0\] is outside -8 … 7 of int4"),
        ("W4A16", "scale", float("nan"), r"scale nan at \[2, 0\]"),
        ("W4A16", "scale", float("-inf"), r"scale -inf at \[2, 0\]"),
        ("w=int4/g128/unsigned", "scale", -0.5, r"scale -0.5 at \[2, 0\] is negative"),
        ("MXFP4A16", "scale", 0.75, r"scale 0.75 at \[2, 0\] is no power of two"),
        ("MXFP4A16", "scale", -0.5, r"scale -0.5 at .* is negative"),
        ("W4A16_ASYM", "zero_point", 8, r"zero point 8 at \[2, 0\] is outside -8 … 7"),
        ("w=uint4/g32/offset", "offset", float("inf"), r"offset inf at \[2, 0\]"),
        ("NVFP4A16", "scale.codes", 127, r"scale: a code at \[2, 0\] means NaN or infinity in fp8_e4m3"),
        ("NVFP4A16", "scale.codes", 0x80 | 0x30, r"scale -.* at \[2, 0\] is negative"),
    ],
)
def test_what_cannot_be_is_found(text: str, part: str, value: float, words: str) -> None:
    with pytest.raises(FileFormatError, match=f"^model.w: {words}"):
        validate(broken(text, part, value), "model.w")


def test_group_indices() -> None:
    q = rounded("W4A16")
    index = torch.arange(256, dtype=torch.int32) // 128
    validate(replace(q, group_index=index), "w")
    for wrong, words in (
        (index + 1, "group index 2 is outside 0 … 1"),
        (index - 1, "group index -1"),
        (index[1:], "255"),
    ):
        with pytest.raises(FileFormatError, match=words):
            validate(replace(q, group_index=wrong), "w")


def test_scales_in_another_type_are_no_numbers() -> None:
    for dtype in (torch.int8, torch.int32, torch.bool):
        with pytest.raises(FileFormatError, match=f"got {dtype}"):
            load_scale(torch.ones(4, dtype=dtype))
