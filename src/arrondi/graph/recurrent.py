"""Recurrent operators in PyTorch: ONNX's LSTM and GRU, step by step, in its order of gates.

x (steps, batch, in); W (directions, gates · hidden, in); R (directions, gates · hidden, hidden); B (directions, 2 · gates · hidden).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from arrondi.graph.ir import Unusual

Tensor = torch.Tensor


def lstm(
    attrs: Mapping[str, Any], x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, lengths: Tensor | None = None,
    h0: Tensor | None = None, c0: Tensor | None = None, peepholes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gates input, output, forget, cell. Gives every hidden state (steps, directions, batch, hidden), the last one, and the last cell state."""
    _check(attrs, x, lengths, peepholes)
    hidden, (batch, count) = r.shape[-1], (x.shape[1], w.shape[0])
    every, last, cells = [], [], []
    for d in range(count):
        bias = x.new_zeros(4 * hidden) if b is None else b[d, : 4 * hidden] + b[d, 4 * hidden :]
        h = x.new_zeros(batch, hidden) if h0 is None else h0[d]
        c = x.new_zeros(batch, hidden) if c0 is None else c0[d]
        entering, outputs = x @ w[d].T + bias, []
        for t in _order(attrs, d, len(x)):
            i, o, f, g = (entering[t] + h @ r[d].T).chunk(4, -1)
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
    hidden, (batch, count) = r.shape[-1], (x.shape[1], w.shape[0])
    before = not attrs.get("linear_before_reset", 0)
    every, last = [], []
    for d in range(count):
        wb, rb = (x.new_zeros(3 * hidden),) * 2 if b is None else (b[d, : 3 * hidden], b[d, 3 * hidden :])
        h = x.new_zeros(batch, hidden) if h0 is None else h0[d]
        entering, outputs = x @ w[d].T + wb, []
        for t in _order(attrs, d, len(x)):
            zx, rx, hx = entering[t].chunk(3, -1)
            rz, rr, rh = r[d].chunk(3)
            bz, br, bh = rb.chunk(3)
            z, reset = torch.sigmoid(zx + h @ rz.T + bz), torch.sigmoid(rx + h @ rr.T + br)
            inner = (reset * h) @ rh.T + bh if before else reset * (h @ rh.T + bh)
            h = (1 - z) * torch.tanh(hx + inner) + z * h
            outputs.append(h)
        every.append(torch.stack(outputs[::-1] if _back(attrs, d) else outputs))
        last.append(h)
    return torch.stack(every, 1), torch.stack(last)


def _back(attrs: Mapping[str, Any], direction: int) -> bool:
    return attrs.get("direction", "forward") == "reverse" or direction == 1


def _order(attrs: Mapping[str, Any], direction: int, steps: int) -> range:
    return range(steps - 1, -1, -1) if _back(attrs, direction) else range(steps)


def _check(attrs: Mapping[str, Any], x: Tensor, lengths: Tensor | None, peepholes: Tensor | None) -> None:
    own = [k for k in ("activations", "clip", "activation_alpha", "input_forget") if attrs.get(k)]
    usual = (["Sigmoid", "Tanh", "Tanh"], ["Sigmoid", "Tanh"])
    if own == ["activations"] and list(attrs["activations"])[: len(usual[0])] in usual:
        own = []
    whole = lengths is None or bool((lengths == len(x)).all())
    if own or peepholes is not None or attrs.get("layout", 0) or not whole:
        raise Unusual("activations, peepholes, lengths or a layout of its own")
