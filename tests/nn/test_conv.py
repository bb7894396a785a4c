"""QConv against PyTorch's convolutions with the dequantized weight."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from arrondi.errors import SchemeError, ShapeError
from arrondi.nn import QConv, conv_matrix, conv_weight
from arrondi.tensor.nearest import fake_quantize, quantize_tensor
from arrondi.tensor.ranges.grid import Grid
from tests.kernels.common import assert_same, inputs, normal

CONVOLUTIONS = {
    "1d-groups": lambda: nn.Conv1d(8, 12, 3, padding=1, groups=2),
    "1d-depthwise": lambda: nn.Conv1d(8, 16, 4, groups=8, bias=False),
    "2d": lambda: nn.Conv2d(8, 12, (3, 2), stride=2, dilation=2, padding=1, padding_mode="reflect"),
    "2d-same": lambda: nn.Conv2d(8, 12, 3, padding="same"),
    "2d-1x1": lambda: nn.Conv2d(8, 12, 1),
    "3d": lambda: nn.Conv3d(8, 4, (1, 2, 3)),
    "1d-transposed": lambda: nn.ConvTranspose1d(8, 12, 3, bias=False),
    "2d-transposed-groups": lambda: nn.ConvTranspose2d(8, 12, 3, stride=2, output_padding=1, groups=4),
    "3d-transposed": lambda: nn.ConvTranspose3d(8, 4, 2, padding=1, dilation=2),
}


def built(name: str) -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = CONVOLUTIONS[name]()
    return conv, normal(2, 8, *(9, 10, 11)[: len(conv.kernel_size)])


def test_a_kernel_as_a_matrix():
    """Row o holds what makes output channel o: zeros in it silence that channel and no other."""
    for name in CONVOLUTIONS:
        conv, _ = built(name)
        matrix = conv_matrix(conv.weight.detach(), conv)
        assert torch.equal(conv_weight(matrix, conv), conv.weight)
        assert matrix.shape == (conv.out_channels, conv.weight.numel() // conv.out_channels)
        x = normal(1, 8, *(9, 10, 11)[: len(conv.kernel_size)])
        for channel in range(conv.out_channels):  # a row of zeros silences its channel and no other
            changed = copy.deepcopy(conv)
            rows = matrix.clone()
            rows[channel] = 0
            changed.weight.data = conv_weight(rows, conv)
            moved = (changed(x) - conv(x)).abs().flatten(2).amax(dim=(0, 2)) > 0
            assert moved.nonzero().flatten().tolist() == [channel]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_it_is_the_convolution_with_the_dequantized_weight(name: str):
    conv, x = built(name)
    for scheme in ("w=int8/channel", "w=int4/g2/asym", "w=int8/tensor"):
        q = quantize_tensor(conv_matrix(conv.weight.detach(), conv), scheme)
        mine, plain = QConv(q, conv), copy.deepcopy(conv)
        plain.weight.data = conv_weight(q.dequantize(), conv)
        assert torch.equal(mine(x), plain(x))
        assert torch.equal(mine(x[0]), plain(x[0]))
        for same in (mine, copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), copy.deepcopy(mine).half().double()):
            assert_same(same.unpack(), q)
        assert copy.deepcopy(mine).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        assert mine.weight.shape == conv.weight.shape
        assert torch.equal(torch.add(mine.weight, 0), plain.weight)
        assert list(mine.state_dict()) == ([] if conv.bias is None else ["bias"])
        assert mine.weight_nbytes < 4 * conv.weight.numel()


def test_the_size_of_the_output_can_be_asked_for():
    conv = nn.ConvTranspose2d(3, 4, 3, stride=2)
    mine = QConv(quantize_tensor(conv_matrix(conv.weight.detach(), conv), "w=int8/channel"), conv)
    x = normal(1, 3, 5, 5)
    assert mine(x).shape == conv(x).shape
    assert mine(x, output_size=[12, 12]).shape == conv(x, output_size=[12, 12]).shape


def test_inputs_are_rounded():
    conv, x = built("2d")
    q = quantize_tensor(conv_matrix(conv.weight.detach(), conv), "w=int8/channel")
    plain = copy.deepcopy(conv)
    plain.weight.data = conv_weight(q.dequantize(), conv)
    for text, grid in (("int8/tensor", None), ("int8/tensor/static", Grid(torch.tensor(0.02)))):
        rounding = inputs(text)
        rounded = fake_quantize(x, rounding.scheme, grid)
        assert torch.equal(QConv(q, conv, inputs=rounding, input_grid=grid)(x), plain(rounded))
    with pytest.raises(SchemeError, match="one scale for a tensor"):
        QConv(q, conv, inputs=inputs("int8/token"))


def test_what_it_does_not_stand_in_for():
    class Own(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    conv = Own(3, 4, 3)
    q = quantize_tensor(conv_matrix(conv.weight.detach(), conv), "w=int8/channel")
    with pytest.raises(SchemeError, match=r"got Own\. Keep this layer unquantized"):
        QConv(q, conv)
    with pytest.raises(ShapeError, match=r"as a matrix is \(4, 12\), got shape \(4, 27\)"):
        QConv(q, nn.Conv2d(3, 4, 2))
