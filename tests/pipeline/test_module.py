"""Modules in memory: what is replaced computes as before but for the rounding, and what cannot be replaced is left alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import arrondi
from arrondi.errors import ArrondiError, DataError, SchemeError
from arrondi.nn import QConv, QLinear, QStack

D = 32
GROUPS = "w=int4/g16"


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Turned(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Written(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Adapted(nn.Linear):
    def __init__(self) -> None:
        super().__init__(D, D)
        self.down = nn.Parameter(torch.randn(D, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.down.T


class Padded(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(functional.pad(x, (1, 1, 1, 1)))


class Then(nn.Module):
    """A layer, and something after it."""

    def __init__(self, first: nn.Module, then: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.then = first, then or nn.Linear(D, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.then(torch.relu(y[0] if isinstance(y, tuple) else y))


class Elsewhere(Then):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.then(functional.linear(x, self.first.weight, self.first.bias))


class Named(Then):
    def forward(self, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"y": super().forward(x["x"])}


class InPlace(Then):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.then(self.first(x) + self.first(x.mul_(2)))


class Recurrent(Then):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(x.shape[0], D)
        for t in range(x.shape[1]):
            state = self.first(x[:, t], state)
        return self.then(state)


class Images(nn.Sequential):
    def __init__(self) -> None:
        plain = nn.Conv2d(16, D, 3, padding=1, padding_mode="reflect"), nn.Conv2d(D, D, 3, groups=4, dilation=2)
        super().__init__(*plain, nn.ReLU(), nn.Conv2d(D, D, 1, groups=D), nn.Flatten(2), nn.Linear(16, 8))


def rows() -> list[Any]:
    return [torch.randn(24, D), torch.randn(8, D)]


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]], set[str]]] = {
    "mlp": (lambda: Then(nn.Linear(D, D)), rows, {"first", "then"}),
    "float64": (lambda: Then(nn.Linear(D, D)).double(), lambda: [x.double() for x in rows()], {"first", "then"}),
    "bfloat16 chain": (lambda: nn.Sequential(*(nn.Linear(D, D) for _ in range(3))).bfloat16(), lambda: [x.bfloat16() for x in rows()], {"0", "1", "2"}),
    "convolutions": (Images, lambda: [torch.randn(4, 16, 8, 8)], {"0", "1", "3", "5"}),
    "scaled": (lambda: Then(Scaled(D, D)), rows, {"then"}),
    "turned": (lambda: Then(Turned(D, D)), rows, {"then"}),
    "written out": (lambda: Then(Written(D, D)), rows, {"first", "then"}),
    "adapter": (lambda: Then(Adapted()), rows, {"then"}),
    "padded": (lambda: Then(Padded(16, 16, 3), nn.Linear(8, 8)), lambda: [torch.randn(2, 16, 8, 8)], {"then"}),
    "weight norm": (lambda: Then(nn.utils.parametrizations.weight_norm(nn.Linear(D, D))), rows, {"then"}),
    "used elsewhere": (lambda: Elsewhere(nn.Linear(D, D)), rows, {"then"}),
    "dictionaries": (lambda: Named(nn.Linear(D, D)), lambda: [({"x": x},) for x in rows()], {"first", "then"}),
    "in place": (lambda: InPlace(nn.Linear(D, D)), rows, {"first", "then"}),
    "lstm": (lambda: Then(nn.LSTM(D, D, batch_first=True)), lambda: [torch.randn(4, 6, D)], {"then"}),
    "cells": (lambda: Recurrent(nn.GRUCell(D, D)), lambda: [torch.randn(4, 6, D)], {"then"}),
    "attention": (lambda: nn.TransformerEncoderLayer(D, 4, 48, batch_first=True), lambda: [torch.randn(2, 6, D)], {"linear1", "linear2"}),
    "token ids": (lambda: Then(nn.Embedding(64, D)), lambda: torch.randint(0, 64, (12, 6)), {"then"}),
}  # fmt: skip
TARGETS = {"convolutions": ["Linear", "Conv2d"], "padded": ["Linear", "Conv2d"], "lstm": ["Linear", "LSTM"], "cells": ["Linear", "GRUCell"]}  # fmt: skip


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[name][0]().eval()


def run(model: nn.Module, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(*copy.deepcopy(batch)) if isinstance(batch, tuple) else model(batch.clone())
    return out["y"] if isinstance(out, dict) else out


def packed(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QLinear | QConv)}


@torch.no_grad()
def reference(name: str, model: nn.Module) -> nn.Module:
    """The original with the weights that the packed layers hold, and whatever else was rounded."""
    plain = made(name)
    values = dict(model.named_parameters())
    for n, parameter in plain.named_parameters():
        if n in values:
            parameter.copy_(values[n])
    for n, layer in packed(model).items():
        own = plain.get_submodule(n).weight
        own.copy_(layer.unpack().dequantize().reshape(own.shape))
    return plain


def quantized(name: str, method: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    data = CASES[name][1]()
    model = made(name)
    given = data if method == "gptq" else None
    arrondi.quantize(model, GROUPS, method=method, calibration=given, targets=TARGETS.get(name, ["Linear"]))
    return model, data


@pytest.mark.parametrize("name", CASES)
def test_a_module_computes_with_the_weights_that_its_layers_hold(name: str, tmp_path: Path) -> None:
    untouched = copy.deepcopy(quantized(name, "rtn")[1])
    model, data = quantized(name, "gptq")
    assert all(torch.equal(a, b) for a, b in zip(data, untouched, strict=True) if isinstance(a, torch.Tensor))
    assert set(packed(model)) - {"self_attn.out_proj"} == CASES[name][2]
    batch = data[0]
    y, expected = run(model, batch), run(reference(name, model), batch)
    limit = 0.02 if y.dtype == torch.bfloat16 else 1e-5
    assert y.dtype == expected.dtype and (y - expected).norm() < limit * expected.norm()
    assert 1e-4 < (y - run(made(name), batch)).norm() / expected.norm() < 0.5

    assert torch.equal(run(copy.deepcopy(model), batch), y)
    said = arrondi.save(model, tmp_path / "saved")
    assert said["readers"] == arrondi.inspect(tmp_path / "saved")["readers"]
    assert torch.equal(run(arrondi.load(tmp_path / "saved", model=made(name)), batch), y)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("written out", "used elsewhere")])
def test_without_batches_the_same_layers_are_replaced(name: str) -> None:
    model, data = quantized(name, "rtn")
    assert set(packed(model)) - {"self_attn.out_proj"} == CASES[name][2]
    y, expected = run(model, data[0]), run(reference(name, model), data[0])
    assert (y - expected).norm() < (0.02 if y.dtype == torch.bfloat16 else 1e-5) * expected.norm()


def test_recurrent_weights_are_rounded_with_their_inputs() -> None:
    errors = {}
    for method in ("rtn", "gptq"):
        model, data = quantized("lstm", method)
        changed = dict(model.first.named_parameters())
        assert not torch.equal(changed["weight_ih_l0"], made("lstm").first.weight_ih_l0)
        errors[method] = (run(model, data[0]) - run(made("lstm"), data[0])).norm()
    assert errors["gptq"] < errors["rtn"]


def test_each_layer_is_rounded_as_gptq_alone_rounds_it_on_what_enters_it() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(D, 48), nn.ReLU(), nn.Linear(48, D), nn.ReLU(), nn.Linear(D, 16))
    model, batches = copy.deepcopy(plain), rows()
    arrondi.quantize(model, GROUPS, method="gptq", calibration=batches)
    entered = [batches]
    for layer in model:
        entered.append([layer(x) for x in entered[-1]])
    for i in (0, 2, 4):
        moment = arrondi.SecondMoment(entered[i][0].shape[1])
        for x in entered[i]:
            moment.update(x)
        alone = arrondi.gptq(plain[i].weight, model[i].meta.scheme, moment)
        assert torch.equal(model[i].unpack().codes, alone.codes)


def test_hooks_and_copies_live_on() -> None:
    model = Then(nn.Linear(D, D)).eval()
    seen: list[torch.Tensor] = []
    handle = model.first.register_forward_hook(lambda module, args, out: seen.append(out))
    arrondi.quantize(model, "w=int8/channel,a=int8/token")
    x = torch.randn(3, D)
    y = run(model, x)
    assert len(seen) == 1 and isinstance(model.first, QLinear)
    handle.remove()
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), x), y) and len(seen) == 1
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        cast = run(copy.deepcopy(model).to(dtype), x.to(dtype))
        assert cast.dtype == dtype and (cast.float() - y).norm() < 0.03 * y.norm()


class Experts(nn.Module):
    """Matrices of which each token meets one, read in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.router, self.then, self.way = nn.Linear(D, 4), nn.Linear(D, 16), way
        self.stack = nn.Module()
        self.stack.num_experts = 4
        self.stack.weights = nn.Parameter(0.2 * torch.randn(4, D, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen, w, token = self.router(x).argmax(-1), self.stack.weights, torch.arange(len(x))
        match self.way:
            case "einsum":
                y = torch.einsum("ti,eoi->teo", x, w)[token, chosen]
            case "bmm":
                y = torch.bmm(x[None].expand(4, -1, -1), w.transpose(1, 2))[chosen, token]
            case "unbind":
                y = torch.stack([w.unbind(0)[int(e)] @ v for v, e in zip(x, chosen, strict=True)])
            case _:
                y = torch.stack([w[int(e)] @ v for v, e in zip(x, chosen, strict=True)])
        return self.then(torch.relu(y))


@pytest.mark.parametrize("way", ["one by one", "einsum", "bmm", "unbind"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_experts_that_are_not_read_one_by_one_are_kept(way: str, method: str) -> None:
    torch.manual_seed(0)
    model, x = Experts(way).eval(), torch.randn(24, D)
    expected = run(model, x)
    arrondi.quantize(model, GROUPS, method=method, calibration=[x] if method == "gptq" else None)
    packed_stack = isinstance(getattr(model.stack, "weights"), QStack)  # noqa: B009
    assert packed_stack is (way == "one by one" and method == "gptq")
    assert isinstance(model.then, QLinear) and (run(model, x) - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("inputs", ["int8/tensor/static", "uint8/tensor/asym/static", "int8/tensor/offset/static", "fp8_e4m3/tensor/static", "int8/tensor"])  # fmt: skip
@pytest.mark.parametrize("grouped", [1, 4])
def test_static_inputs_of_a_convolution_span_what_entered_it(inputs: str, grouped: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, conv = torch.rand(4, 16, 24), nn.Sequential(nn.Conv1d(16, D, 3, padding=1, groups=grouped))
    expected = conv(x)
    arrondi.quantize(conv, f"w=int8/channel,a={inputs}", calibration=[x], targets=["Conv1d"])
    y = conv(x)
    assert (y - expected).norm() < (0.06 if "fp8" in inputs else 0.02) * expected.norm()
    fresh = nn.Sequential(nn.Conv1d(16, D, 3, padding=1, groups=grouped))
    arrondi.save(conv, tmp_path / "saved")
    assert torch.equal(arrondi.load(tmp_path / "saved", model=fresh)(x), y)


def test_unsigned_static_inputs_are_not_written_as_signed_ones(tmp_path: Path) -> None:
    model, x = Then(nn.Linear(D, D)).eval(), torch.rand(6, D)
    arrondi.quantize(model, "w=int8/channel,a=uint8/tensor/asym/static", calibration=[x])
    arrondi.save(model, tmp_path / "saved")
    loaded = arrondi.load(tmp_path / "saved", model=Then(nn.Linear(D, D)))
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(SchemeError, match="cannot say that activations become uint8"):
        arrondi.save(model, tmp_path / "other", to="compressed-tensors")


UNUSED = nn.ModuleDict({"used": nn.Linear(D, D), "not": nn.Linear(D, D)})
UNUSED.forward = lambda x: UNUSED["used"](x)


@pytest.mark.parametrize(
    ("model", "options", "error", "words"),
    [
        (nn.Linear(D, D), {}, SchemeError, "Wrap it"),
        (nn.Sequential(nn.LazyLinear(D)), {}, DataError, "Run the module once"),
        (nn.Sequential(nn.Linear(D, D, device="meta")), {}, DataError, "meta device"),
        (nn.Sequential(nn.Linear(D, D)), {"method": "gptq"}, DataError, "calibration"),
        (nn.Sequential(nn.Linear(D, D)), {"method": "gptq", "calibration": "text.txt"}, DataError, "batches"),
        (nn.Sequential(nn.Linear(D, D)), {"method": "gptq", "calibration": [torch.ones(2, D + 1)]}, SchemeError, "does not run"),
        (nn.Sequential(nn.Linear(D, D)), {"method": "gptq", "calibration": [(torch.ones(2, D), torch.ones(2))]}, SchemeError, "does not run"),
        (nn.Sequential(nn.Linear(D, D)), {"calibration": ["a text"]}, DataError, "batches"),
        (nn.Sequential(nn.Linear(D, D)), {"out": "somewhere"}, SchemeError, "takes no out"),
        (nn.Sequential(nn.Linear(D, D)), {"evaluation": [torch.ones(2, D)], "device": "cuda:1"}, SchemeError, "no evaluation, device"),
        (torch.jit.trace(nn.Sequential(nn.Linear(D, D)), torch.ones(2, D)), {}, SchemeError, "compiled"),
        (nn.Sequential(nn.Conv1d(16, 16, 3)), {"scheme": "W8A8", "targets": ["Conv1d"]}, SchemeError, "one scale for a tensor"),
        (nn.Sequential(nn.LSTM(D, D)), {"scheme": "W8A8", "targets": ["LSTM"]}, SchemeError, "recurrent"),
        (UNUSED, {"scheme": "W8A8_STATIC", "calibration": [torch.ones(2, D)]}, DataError, "no calibration data reaches it"),
    ],
)  # fmt: skip
def test_what_cannot_be_quantized_is_refused_in_a_sentence(
    model: nn.Module, options: dict[str, Any], error: type[ArrondiError], words: str
) -> None:
    with pytest.raises(error, match=words):
        arrondi.quantize(model, options.pop("scheme", GROUPS), **options)


def test_whole_numbers_are_no_input_of_a_packed_layer() -> None:
    model = nn.Sequential(nn.Linear(D, D))
    arrondi.quantize(model, GROUPS)
    with pytest.raises(DataError, match=r"\.float\(\)"):
        model(torch.ones(2, D, dtype=torch.int8))
