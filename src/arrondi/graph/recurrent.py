"""Recurrent operators in PyTorch: ONNX's LSTM and GRU, step by step, in its order of gates; and `Recurrent`, one with constant weights.

x (steps, batch, in); W (directions, gates · hidden, in); R (directions, gates · hidden, hidden); B (directions, 2 · gates · hidden).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from arrondi.graph.codes import rounded
from arrondi.graph.ir import DYNAMIC, Unusual

Tensor = torch.Tensor
Products = tuple[Callable[[int, Tensor], Tensor], Callable[[int, Tensor], Tensor]]
"""(direction, x) → what enters the gates; (direction, hidden state) → what comes back to them."""


def lstm(
    attrs: Mapping[str, Any], x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, lengths: Tensor | None = None,
    h0: Tensor | None = None, c0: Tensor | None = None, peepholes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gates input, output, forget, cell. Gives every hidden state (steps, directions, batch, hidden), the last one, and the last cell state."""
    _check(attrs, x, lengths, peepholes)
    return lstm_by(attrs, x, _products(w, r), r.shape[-1], w.shape[0], b, h0, c0)


def dynamic_lstm(
    attrs: Mapping[str, Any], x: Tensor, w: Tensor, r: Tensor, b: Tensor | None, lengths: Tensor | None, h0: Tensor | None, c0: Tensor | None,
    peepholes: Tensor | None, w_scale: Tensor, w_zero: Tensor, r_scale: Tensor, r_zero: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """ONNX Runtime's DynamicQuantizeLSTM: x is rounded over its own range once, hidden states of the whole batch at every step.

    With one thread, that is: with several, the runtime gives each of them a part of the batch, which it rounds over its own range.

    w, r: codes (directions, in, 4 · hidden); scales and zero points for each direction, or for each column of it too.
    """
    _check(attrs, x, lengths, peepholes)
    known = [_weights(*part) for part in ((w, w_scale, w_zero), (r, r_scale, r_zero))]
    enter, again = _products(*known)
    x = rounded({"codes": "uint8"}, x)
    products = enter, lambda d, h: again(d, rounded({"codes": "uint8"}, h))
    return lstm_by(attrs, x, products, r.shape[1], w.shape[0], b, h0, c0)


def _weights(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes (directions, in, out) → numbers (directions, out, in)."""
    parts = [p.reshape(len(codes), 1, -1) for p in (scale, zero)]
    return ((codes.int() - parts[1].int()) * parts[0]).mT


def lstm_by(
    attrs: Mapping[str, Any], x: Tensor, products: Products, hidden: int, count: int, b: Tensor | None, h0: Tensor | None, c0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same with the products as functions."""
    enter, again = products
    batch = x.shape[1]
    every, last, cells = [], [], []
    for d in range(count):
        bias = x.new_zeros(4 * hidden) if b is None else b[d, : 4 * hidden] + b[d, 4 * hidden :]
        h = x.new_zeros(batch, hidden) if h0 is None else h0[d]
        c = x.new_zeros(batch, hidden) if c0 is None else c0[d]
        entering, outputs = enter(d, x) + bias, []
        for t in _order(attrs, d, len(x)):
            i, o, f, g = (entering[t] + again(d, h)).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        every.append(torch.stack(outputs[::-1] if _back(attrs, d) else outputs))
        last.append(h)
        cells.append(c)
    return torch.stack(every, 1), torch.stack(last), torch.stack(cells)


def gru(
    attrs: Mapping[str, Any], x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, lengths: Tensor | None = None,
    h0: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gates update, reset, hidden. Gives every hidden state and the last one."""
    _check(attrs, x, lengths, None)
    return gru_by(attrs, x, _products(w, r), r.shape[-1], w.shape[0], b, h0)


def gru_by(
    attrs: Mapping[str, Any], x: Tensor, products: Products, hidden: int, count: int, b: Tensor | None, h0: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same with the products as functions, which needs the reset gate behind them."""
    enter, again = products
    batch = x.shape[1]
    before = not attrs.get("linear_before_reset", 0)
    every, last = [], []
    for d in range(count):
        wb, rb = (x.new_zeros(3 * hidden),) * 2 if b is None else (b[d, : 3 * hidden], b[d, 3 * hidden :])
        h = x.new_zeros(batch, hidden) if h0 is None else h0[d]
        entering, outputs = enter(d, x) + wb, []
        for t in _order(attrs, d, len(x)):
            zx, rx, hx = entering[t].chunk(3, -1)
            zh, rh, hh = (again(d, h) + rb).chunk(3, -1)
            z, reset = torch.sigmoid(zx + zh), torch.sigmoid(rx + rh)
            inner = (again(d, reset * h) + rb).chunk(3, -1)[2] if before else reset * hh
            h = (1 - z) * torch.tanh(hx + inner) + z * h
            outputs.append(h)
        every.append(torch.stack(outputs[::-1] if _back(attrs, d) else outputs))
        last.append(h)
    return torch.stack(every, 1), torch.stack(last)


def _products(w: Tensor, r: Tensor) -> Products:
    return lambda d, x: x @ w[d].T, lambda d, h: h @ r[d].T


class Recurrent(torch.nn.Module):
    """A recurrent layer with constant weights: for each direction the linear layer of its inputs and that of its hidden states.

    Args:
        op: LSTM or GRU.
        w, r, b: see above.
    """

    def __init__(self, op: str, attrs: Mapping[str, Any], w: Tensor, r: Tensor, b: Tensor | None) -> None:
        super().__init__()
        self.op, self.attrs, self.hidden = op, attrs, r.shape[-1]
        self.enter, self.again = (torch.nn.ModuleList(map(_linear, part)) for part in (w, r))
        self.register_buffer("bias", b, persistent=False)

    def forward(self, x: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
        """x and what follows the bias among the operator's inputs: lengths, and the first states."""
        lengths, h0, c0, peepholes = (*rest, *[None] * 4)[:4]
        _check(self.attrs, x, lengths, peepholes)
        still = not self.attrs.get(DYNAMIC)
        products = (lambda d, v: self.enter[d](v)), (lambda d, v: self.again[d](v if still else rounded({"codes": "uint8"}, v)))  # fmt: skip
        bias: Any = self.bias
        if self.op == "LSTM":
            return lstm_by(self.attrs, x, products, self.hidden, len(self.enter), bias, h0, c0)
        return gru_by(self.attrs, x, products, self.hidden, len(self.enter), bias, h0)


def _linear(weight: Tensor) -> torch.nn.Module:
    with torch.device("meta"):
        made = torch.nn.Linear(weight.shape[1], weight.shape[0], False)
    made.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    return made


def _back(attrs: Mapping[str, Any], direction: int) -> bool:
    return attrs.get("direction", "forward") == "reverse" or direction == 1


def _order(attrs: Mapping[str, Any], direction: int, steps: int) -> range:
    return range(steps - 1, -1, -1) if _back(attrs, direction) else range(steps)


def usual(attrs: Mapping[str, Any]) -> bool:
    """Whether a layer has the usual activations, and its time first."""
    own = {k for k in ("clip", "activation_alpha", "activation_beta", "input_forget", "layout") if attrs.get(k)}
    activations = list(attrs.get("activations") or [])
    pattern = ["Sigmoid", "Tanh", "Tanh"] if len(activations) % 3 == 0 else ["Sigmoid", "Tanh"]
    return not own and activations == pattern * (len(activations) // len(pattern))


def _check(attrs: Mapping[str, Any], x: Tensor, lengths: Tensor | None, peepholes: Tensor | None) -> None:
    whole = lengths is None or bool((lengths == len(x)).all())
    if not usual(attrs) or peepholes is not None or not whole:
        raise Unusual("activations, peepholes, lengths or a layout of its own")
