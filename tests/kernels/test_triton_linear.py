"""Products on a GPU, in Triton: on a GPU, or without one in Triton's own interpreter, which needs a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from arrondi.formats import tile_shape
from arrondi.kernels import KERNELS, Meta, choose
from arrondi.kernels.triton_linear.words import PLANES, lanes_of, pack_words, unpack_words
from tests.kernels.common import assert_same, normal
from tests.kernels.test_differential import SCHEMES, SHAPES, by_hand, wide_weight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNS = torch.cuda.is_available() or INTERPRETED
LARGEST = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
TRITON = KERNELS["triton"]


@pytest.mark.parametrize("bits", PLANES)
def test_words_come_back(bits: int) -> None:
    for columns, lanes in ((1, 16), (513, 16), (1024, 32), (1500, 32)):
        codes = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8)
        words = pack_words(codes, bits, lanes)
        assert words.shape == (5, -(-columns // (32 * lanes)), bits, lanes)
        assert torch.equal(unpack_words(words, bits, columns), codes)


def test_rows_are_padded_by_less_than_a_chunk_of_512() -> None:
    for columns in range(1, 5000, 7):
        lanes = lanes_of(columns, columns)
        assert -columns % (32 * lanes) < 512
    assert lanes_of(4096, 16) == 16


@pytest.mark.parametrize("name", SCHEMES)
def test_what_was_packed_comes_back(name: str) -> None:
    for shape in SHAPES:
        q = wide_weight(shape, SCHEMES[name])
        width = tile_shape(q.scheme.granularity, shape)[1]
        if width < shape[1] and width % 16:
            continue
        assert_same(TRITON.unpack(TRITON.prepack(q, torch.bfloat16), Meta(q.scheme, shape, torch.bfloat16)), q)
    for q in by_hand().values():
        assert_same(TRITON.unpack(TRITON.prepack(q, torch.bfloat16), Meta(q.scheme, (50, 256), torch.bfloat16)), q)


def test_it_says_why_not() -> None:
    scheme, cuda = SCHEMES["W4A16"], torch.device("cuda")
    if not INTERPRETED:
        assert TRITON.refuse(scheme, (16, 256), torch.float32, torch.device("cpu")) == "It runs on a GPU, got cpu."
    if importlib.util.find_spec("triton") is None:
        assert "Triton is not installed" in str(TRITON.refuse(scheme, (16, 256), torch.float32, cuda))
        assert choose(scheme, (16, 256), torch.float32, "cuda").name == "reference"
        return
    assert TRITON.refuse(scheme, (16, 256), torch.float32, cuda) is None
    assert "groups" in str(TRITON.refuse(SCHEMES["int4-per-input"], (16, 256), torch.float32, cuda))
    assert "scales" in str(TRITON.refuse(SCHEMES["nf4-double"], (16, 256), torch.float32, cuda))


@pytest.mark.full
@pytest.mark.skipif(RUNS or importlib.util.find_spec("triton") is None, reason="Triton is not installed, or runs here")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.skipif(not RUNS, reason="there is no GPU, and Triton does not interpret")
@pytest.mark.parametrize("name", SCHEMES)
def test_products(name: str) -> None:
    """Against float64, few tokens and some, with and without bias, ragged rows and columns."""
    turn = list(SCHEMES).index(name)
    cases = [(torch.float32, (1, 9)), (torch.float16, (1, 3)), (torch.bfloat16, (1, 3))]
    if INTERPRETED:  # its products of tiles of bfloat16 are wrong
        cases = [(torch.float32, (1, 9)) if turn % 2 else (torch.float16, (1, 3)), (torch.bfloat16, (1,))]
    else:
        cases = [(dtype, (*tokens, 40, 200)) for dtype, tokens in cases]
    for i, (dtype, counts) in enumerate(cases):
        shape = SHAPES[(turn + 3 * i) % len(SHAPES)]
        if TRITON.refuse(SCHEMES[name], shape, dtype, DEVICE) is not None:
            continue
        q = wide_weight(shape, SCHEMES[name]).to(DEVICE)
        bias = None if i % 2 else normal(shape[0], seed=1).to(DEVICE, dtype)
        tensors, meta = TRITON.prepack(q, dtype), Meta(q.scheme, shape, dtype)
        for tokens in counts:
            x = (normal(tokens, shape[1], seed=tokens) + 0.5).to(DEVICE, dtype)
            y = TRITON.linear(x, tensors, meta, bias)
            exact = x.double() @ q.dequantize(torch.float64).T + (0 if bias is None else bias.double())
            assert y.dtype == dtype and y.shape == exact.shape
            size = x.double().abs() @ q.dequantize(torch.float64).abs().T
            assert bool(((y.double() - exact).abs() <= LARGEST[dtype] * (size + exact.abs())).all()), (dtype, tokens)


@pytest.mark.skipif(not RUNS, reason="there is no GPU, and Triton does not interpret")
def test_no_tokens_many_axes_and_gradients() -> None:
    q = wide_weight((20, 128), SCHEMES["W4A16"]).to(DEVICE)
    tensors, meta = TRITON.prepack(q, torch.float32), Meta(q.scheme, (20, 128), torch.float32)
    assert TRITON.linear(torch.empty(0, 3, 128, device=DEVICE), tensors, meta, None).shape == (0, 3, 20)
    x = normal(2, 3, 128).to(DEVICE)
    turned = TRITON.linear(x.transpose(0, 1), tensors, meta, None)
    torch.testing.assert_close(turned, TRITON.linear(x, tensors, meta, None).transpose(0, 1))
    x.requires_grad_()
    TRITON.linear(x, tensors, meta, None).square().sum().backward()
    wanted = (2 * (x.detach() @ q.dequantize().T)) @ q.dequantize()
    torch.testing.assert_close(x.grad, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not RUNS, reason="there is no GPU, and Triton does not interpret")
def test_shares_of_a_row_add_up_in_any_order() -> None:
    """However rows are cut, and again and again with the same counters."""
    from arrondi.kernels.triton_linear.launch import Blocks, _Product

    q = wide_weight((33, 2100), SCHEMES["W4A16_ASYM"]).to(DEVICE)
    product = _Product(TRITON.prepack(q, torch.float16), Meta(q.scheme, (33, 2100), torch.float16), None)
    for tokens, blocks in ((1, Blocks(1, 16, 2, 4)), (1, Blocks(1, 8, 3, 4)), (3, Blocks(16, 32, 2, 4, 1))):
        x = normal(tokens, 2100).to(DEVICE, torch.float16)
        exact = x.double() @ q.dequantize(torch.float64).T
        first = product(x, blocks)
        torch.testing.assert_close(first.double(), exact, rtol=2e-3, atol=2e-3 * float(exact.abs().max()))
        assert torch.equal(product(x, blocks), first)
