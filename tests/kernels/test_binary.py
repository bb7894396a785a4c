"""Products of signs against products of matrices of ±1, on every compiled path."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from arrondi.errors import ShapeError
from arrondi.formats import FORMATS
from arrondi.kernels.binary import binary_linear, binary_linear_reference, pack_signs, sign_tiles
from arrondi.native import native
from arrondi.tensor.encoding import decode, encode
from tests.kernels.common import PATHS as COMPILED
from tests.kernels.common import normal

PATHS = ["torch", *COMPILED]
COLUMNS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200, 1000, 4096)
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One compiled path after the other, and the reference in PyTorch's operators."""
    if request.param == "torch":
        monkeypatch.setattr("arrondi.kernels.binary.available", lambda: False)
        yield request.param
        return
    assert native is not None
    before = native.path()
    native.use_path(request.param)
    yield request.param
    native.use_path(before)


def signs(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, 1, -1).double()


def packed(w: torch.Tensor) -> torch.Tensor:
    return sign_tiles(pack_signs(w))


def test_bits_are_the_codes_of_the_binary_format(path: str) -> None:
    for columns, dtype in itertools.product(COLUMNS, TYPES):
        x = normal(3, columns, dtype=dtype)
        x[0, 0], x[1, 0], x[2, 0] = 0.0, -0.0, 2.0**-14
        bits = pack_signs(x)
        assert bits.shape == (3, -(-columns // 32))
        assert bits.dtype == torch.int32
        codes = encode(x.float(), FORMATS["binary"])
        ones = bits[..., None] >> torch.arange(32) & 1
        assert torch.equal(ones.flatten(1)[:, :columns], codes.int()), (columns, dtype)
        assert not ones.flatten(1)[:, columns:].any()
        assert torch.equal(decode(codes, FORMATS["binary"]).double(), signs(x))


def test_nan_is_minus_one(path: str) -> None:
    assert pack_signs(torch.tensor([[torch.nan, 1.0, torch.inf, -torch.inf]])).item() == 0b0110


def test_products_are_exact(path: str) -> None:
    for columns, rows in itertools.product(COLUMNS, (1, 16, 17, 50)):
        w = normal(rows, columns, seed=1)
        for tokens in (1, 2, 5, 13):
            x = normal(tokens, columns)
            y = binary_linear(pack_signs(x), packed(w), (rows, columns))
            assert y.dtype == torch.int32
            assert torch.equal(y.double(), signs(x) @ signs(w).T), (columns, rows, tokens)


def test_scales_are_applied_as_the_reference_does(path: str) -> None:
    x, w = normal(2, 3, 100), normal(37, 100, seed=1)
    scale, token_scale = w.abs().mean(1), x.abs().mean(2)
    bits, tiles = pack_signs(x), packed(w)
    some = ({"scale": scale}, {"token_scale": token_scale}, {"scale": scale, "token_scale": token_scale}, {})
    for dtype, given in itertools.product((torch.float32, torch.bfloat16, torch.float16), some):
        y = binary_linear(bits, tiles, (37, 100), dtype=dtype, **given)
        assert y.dtype == dtype
        assert torch.equal(y, binary_linear_reference(bits, tiles, (37, 100), dtype=dtype, **given))
    assert binary_linear(bits, tiles, (37, 100), scale=scale).dtype == torch.float32


def test_the_mean_is_the_best_scale() -> None:
    """Of Gaussian weights, the sign times the mean keeps 2/π of the energy (the paper's equation 6)."""
    w = normal(64, 4096)
    kept = w.abs().mean(1) ** 2 * w.shape[1] / w.square().sum(1)
    assert kept.mean().item() == pytest.approx(2 / torch.pi, abs=0.01)
    x = torch.eye(4096)
    approximation = binary_linear(pack_signs(x - 0.5), packed(w), w.shape, scale=w.abs().mean(1))
    assert approximation.shape == (4096, 64)


def test_over_threads(path: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        x, w = normal(70, 2048), normal(400, 2048, seed=1)
        assert torch.equal(binary_linear(pack_signs(x), packed(w), (400, 2048)).double(), signs(x) @ signs(w).T)
    finally:
        torch.set_num_threads(before)


def test_any_strides(path: str) -> None:
    x = normal(6, 4, 140)
    for view in (x[:, 1, ::2], x.transpose(0, 1)[:, :, 70:], x[::2], x[:1, :1].expand(3, 5, 140), x[0, 0]):
        assert torch.equal(pack_signs(view), pack_signs(view.clone(memory_format=torch.contiguous_format)))
    bits, tiles = pack_signs(x[:, 0]), packed(x[:, 1])
    wide = torch.stack((bits, bits), dim=-1)[..., 0]
    assert torch.equal(binary_linear(wide, tiles, (6, 140)), binary_linear(bits, tiles, (6, 140)))


def test_no_rows(path: str) -> None:
    tiles = packed(normal(5, 70))
    assert pack_signs(torch.zeros(0, 4, 70)).shape == (0, 4, 3)
    assert binary_linear(pack_signs(torch.zeros(0, 70)), tiles, (5, 70)).shape == (0, 5)
    none = packed(torch.zeros(0, 70))
    assert binary_linear(pack_signs(torch.zeros(2, 70)), none, (0, 70)).shape == (2, 0)


def test_operators_pass_pytorchs_own_checks() -> None:
    bits, tiles, scale = pack_signs(normal(2, 3, 70)), packed(normal(20, 70)), normal(20)
    torch.library.opcheck(torch.ops.arrondi.pack_signs, (normal(2, 3, 70),))
    torch.library.opcheck(torch.ops.arrondi.binary_linear, (bits, tiles, [20, 70], None, None, torch.int32))
    torch.library.opcheck(torch.ops.arrondi.binary_linear, (bits, tiles, [20, 70], scale, normal(2, 3), torch.bfloat16))


def test_bad_input_is_named_with_its_shape() -> None:
    bits, tiles = pack_signs(normal(2, 70)), packed(normal(20, 70))
    with pytest.raises(ShapeError, match=r"\(2, 0\)"):
        pack_signs(torch.zeros(2, 0))
    with pytest.raises(ShapeError, match=r"\(2, 4\) in torch.int64"):
        pack_signs(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"\(20,\)"):
        sign_tiles(torch.zeros(20, dtype=torch.int32))
    with pytest.raises(ShapeError, match=r"\(2, 3, 16\).*Make them with sign_tiles"):
        binary_linear(bits, tiles, (33, 70))
    with pytest.raises(ShapeError, match=r"\(\.\.\., 3\).*\(2, 2\)"):
        binary_linear(bits[:, :2], tiles, (20, 70))
    with pytest.raises(ShapeError, match=r"scale must be \(20,\).*\(19,\)"):
        binary_linear(bits, tiles, (20, 70), scale=torch.ones(19))
    with pytest.raises(ShapeError, match=r"token_scale must be \(2,\)"):
        binary_linear(bits, tiles, (20, 70), token_scale=torch.ones(2, 1))
    with pytest.raises(ShapeError, match=r"torch\.float64"):
        binary_linear(bits, tiles, (20, 70), dtype=torch.float64)
    with pytest.raises(ShapeError, match="one device"):
        binary_linear(bits, tiles.to("meta"), (20, 70))
    with pytest.raises(ShapeError, match=r"\(20, 0\)"):
        binary_linear(bits, tiles, (20, 0))
