"""One scheme in the words of another: the same numbers, or no answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from arrondi import quantize_tensor
from arrondi.formats import Scheme, parse_scheme
from arrondi.tensor.express import expressed


def scheme(text: str) -> Scheme:
    return parse_scheme(f"w={text}").weights


EXACT = [
    ("int4/g128/float16", "uint4/g128/asym/float16"),
    ("uint4/g128/asym/float16", "int4/g128/asym/float16"),
    ("int4/g128/float16", "int4/g32/float16"),
    ("int4/g64/bfloat16", "int4/g64/float32"),
    ("int4/channel", "int4/g64"),
    ("int8/tensor", "int8/channel"),
    ("int3/g32", "int4/g32"),
    ("nf4/g64", "nf4/g32"),
    ("uint4/g32/asym", "uint8/g32/asym"),
]


@pytest.mark.parametrize(("one", "two"), EXACT)
def test_values_stay_and_come_back(one: str, two: str) -> None:
    q = quantize_tensor(torch.randn(64, 256), scheme(one))
    there = expressed(q, scheme(two))
    assert there is not None and there.scheme == scheme(two)
    assert torch.equal(there.dequantize(), q.dequantize())
    back = expressed(there, scheme(one))
    assert back is not None and torch.equal(back.codes, q.codes) and torch.equal(back.real_scale, q.real_scale)
    assert q.zero_point is None or torch.equal(back.zero_point, q.zero_point)


@pytest.mark.parametrize("one", ["uint4/g32/asym/float16", "uint4/g32/asym", "uint8/channel/asym/bfloat16"])
def test_offsets_that_are_zero_points_become_zero_points(one: str) -> None:
    q = quantize_tensor(torch.randn(64, 192), scheme(one))
    there = expressed(q, scheme(one.replace("asym", "offset")))
    assert there is not None and there.offset is not None
    back = expressed(there, scheme(one))
    assert back is not None and torch.equal(back.codes, q.codes) and torch.equal(back.zero_point, q.zero_point)
    there.offset[3, 0] += there.real_scale[3, 0] / 2
    assert expressed(there, scheme(one)) is None


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("uint4/g32/asym", "int4/g32"),  # zero points differ
        ("int4/g32", "int4/g64"),  # scales differ
        ("int4/g32", "int3/g32"),  # codes do not fit
        ("int4/g48", "int4/g32"),  # groups cut each other
        ("nf4/g64", "int4/g64"),
        ("uint4/g32/offset", "uint4/g32/asym"),
        ("int4/g32", "fp4_e2m1/g32"),
    ],
)
def test_what_a_scheme_cannot_say(one: str, two: str) -> None:
    q = quantize_tensor(torch.randn(64, 192), scheme(one))
    assert expressed(q, scheme(two)) is None


def test_offsets_are_rounded_to_their_storage() -> None:
    q = quantize_tensor(torch.randn(64, 256) + 0.3, scheme("uint4/g32/asym/float16"))
    there = expressed(q, scheme("uint4/g32/offset/float16/o:float16"))
    assert there is not None
    step = q.real_scale.max()
    assert (there.dequantize() - q.dequantize()).abs().max() < step / 128


def test_scales_that_a_type_cannot_hold() -> None:
    q = quantize_tensor(torch.randn(8, 64) * 1e9, scheme("int4/g32"))
    assert expressed(q, scheme("int4/g32/float16")) is None


def test_columns_that_share_scattered_groups() -> None:
    q = quantize_tensor(torch.randn(8, 64), scheme("int4/g32"))
    index = torch.arange(64).flip(0) // 32
    from dataclasses import replace

    scattered = replace(q, group_index=index.int())
    there = expressed(scattered, scheme("uint4/g32/asym"))
    assert there is not None and torch.equal(there.dequantize(), scattered.dequantize())
    assert expressed(scattered, scheme("int4/g16")) is None


def test_offsets_that_are_multiples_of_scales_become_zero_points() -> None:
    """Q4_1 made of a grid with zero points is that grid again; an offset between two codes is none."""
    q = quantize_tensor(torch.randn(8, 64), scheme("uint4/g32/asym/float16"))
    q = replace(q, scale=torch.full_like(q.real_scale, 2.0**-7))  # times any code it is a float16, too
    there = expressed(q, scheme("uint4/g32/offset/float16/o:float16"))
    assert there is not None and isinstance(there.offset, torch.Tensor)
    back = expressed(there, q.scheme)
    assert back is not None and back.zero_point is not None and q.zero_point is not None
    assert torch.equal(back.dequantize(), q.dequantize()) and torch.equal(back.zero_point, q.zero_point)
    assert expressed(replace(there, offset=there.offset + 2.0**-9), q.scheme) is None
