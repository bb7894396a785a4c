"""Real models in the real consumers, row by row of what is written; one wrong tensor in each; greedy tokens of llama.cpp.

ARRONDI_CHECKPOINTS names interpreters with gptqmodel, optimum and bitsandbytes, and, after a colon, with auto-round; ARRONDI_LLAMA_CPP and
ARRONDI_OPENVINO those with these two.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import arrondi
from arrondi.graph import lower, read_graph, write_graph
from arrondi.measure.text import load_tokenizer
from arrondi.pipeline.convert import convert_model
from arrondi.verification.interpreters import Interpreter, variable
from arrondi.verification.process import ask
from tests.graph.nets import Residual, images, perturbed
from tests.verification.damage import halves, in_directory, in_gguf, in_onnx, next_nibbles, one_up, q4_0_one_up

pytestmark = pytest.mark.peer

Sees = Callable[[Path], None]
BOOKS, STORIES, MINILM = "books-llama-6m", "tinystories-656k", "minilm-l6"


def pythons(**needed: int) -> dict[str, str]:
    """Consumer → interpreter, of ARRONDI_CHECKPOINTS by its place, and of the consumers' own variables."""
    found = {}
    for name, place in needed.items():
        consumer = name.replace("_", ".")
        key = "ARRONDI_CHECKPOINTS" if consumer == "transformers" else variable(consumer)
        given = os.environ.get(key, "").split(os.pathsep)
        if not given[0]:
            if os.environ.get("ARRONDI_PEERS"):
                pytest.fail(f"make peers needs {key}, the interpreter of {consumer}")
            pytest.skip(f"{key} names no interpreter of {consumer}")
        found[consumer] = given[place]
    return found


ROWS: dict[str, tuple[str, str, str, float]] = {
    **{s: (BOOKS, s, "compressed-tensors", 1e-5) for s in ("W4A16", "W3A16", "W8A16", "W2A16", "MXFP4A16", "MXFP8A16", "FP8A16")},
    **{s: (BOOKS, s, "compressed-tensors", 0.02) for s in ("W4A16_ASYM", "W8A8", "W4A8", "W4AFP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16")},
    "encoder": (MINILM, "W4A16", "compressed-tensors", 1e-5),
    "small": (STORIES, "W4A16", "compressed-tensors", 1e-5),
    **{f"gptq {s}": (BOOKS, s, "gptq", 0.002) for s in ("w=int2/g32", "w=int3/g32/asym", "w=int4/g32", "w=int4/g32/asym", "w=int8/channel")},
    **{f"awq {s}": (BOOKS, s, "awq", 0.002) for s in ("w=int4/g32", "w=int4/g32/asym")},
    **{f"bitsandbytes {s}": (BOOKS, s, "bitsandbytes", 0.01) for s in ("NF4", "NF4_DQ", "FP4_BNB")},
    "bitsandbytes W8A8": (BOOKS, "W8A8", "bitsandbytes", 0.02),
    "torchao": (BOOKS, "w=int8/channel", "torchao", 1e-5),
    "torchao with inputs": (BOOKS, "W8A8", "torchao", 0.02),
    "auto-round": (BOOKS, "w=int4/g32/asym", "auto-round", 0.002),
}  # fmt: skip
"""What transformers loads: model, scheme, layout, and how far it may be, beside the bound that is computed."""


@pytest.mark.parametrize("row", ROWS)
def test_transformers_reads_it(row: str, data: Path, tmp_path: Path) -> None:
    model, scheme, layout, most = ROWS[row]
    others = {} if layout == "compressed-tensors" else pythons(transformers=-1 if layout == "auto-round" else 0)
    arrondi.quantize(data / model, scheme, out=tmp_path / "out", to=layout)
    found = arrondi.verify(tmp_path / "out", ["transformers"], pythons=others)["consumers"][0]
    assert found["ok"], found
    assert found["relative_difference"] < most, found


@pytest.mark.parametrize(
    ("layout", "scheme", "tensor", "change"),
    [
        ("gptq", "w=int4/g32/asym", "layers.2.mlp.up_proj.qzeros", one_up),
        ("gptq", "w=int4/g32/asym", "layers.4.self_attn.k_proj.qweight", next_nibbles),
        ("awq", "w=int4/g32/asym", "layers.5.self_attn.v_proj.qzeros", one_up),
        ("bitsandbytes", "NF4", "layers.3.self_attn.o_proj.weight", lambda codes: np.roll(codes, 1, 0)),
        ("compressed-tensors", "W4A16_ASYM", "layers.2.mlp.down_proj.weight_zero_point", one_up),
        ("compressed-tensors", "NVFP4A16", "layers.1.mlp.down_proj.weight_global_scale", lambda scale: 1 / scale),
    ],
)
def test_one_wrong_tensor_is_found(
    layout: str, scheme: str, tensor: str, change: Any, data: Path, sees: Sees, tmp_path: Path
) -> None:
    others = {} if layout == "compressed-tensors" else pythons(transformers=0)
    arrondi.quantize(data / BOOKS, scheme, out=tmp_path / "out", to=layout)
    sees(in_directory(tmp_path / "out", tmp_path / "wrong", tensor, change))
    found = arrondi.verify(tmp_path / "out", ["transformers"], pythons=others)["consumers"][0]
    assert not found["ok"], found


TYPES = ("F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4A16", "Q4_K_M")  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_gguf_in_llama_cpp_and_transformers(kind: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    if kind == "F16":
        convert_model(data / BOOKS, out, "gguf")
    else:
        arrondi.quantize(data / BOOKS, kind, out=out, to="gguf")
    found = arrondi.verify(out, ["llama.cpp", "transformers"], pythons=pythons(llama_cpp=0))
    assert found["ok"], found
    near = {row["consumer"]: row["relative_difference"] for row in found["consumers"]}
    assert near["transformers"] < 1e-5 and near["llama.cpp"] < 0.02, near


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("blk.0.attn_q.weight", halves(4)), ("blk.5.attn_k.weight", halves(2)), ("blk.2.attn_v.weight", q4_0_one_up),
        ("blk.5.attn_output.weight", q4_0_one_up), ("blk.5.attn_q.weight", q4_0_one_up),
    ],
    ids=["q halves", "k halves", "v one up", "o one up", "q one up"],
)  # fmt: skip
def test_one_wrong_tensor_in_llama_cpp(tensor: str, change: Any, data: Path, sees: Sees, tmp_path: Path) -> None:
    """Its rounding of inputs is predicted, so that codes that are all off by one show beside it."""
    others = pythons(llama_cpp=0)
    arrondi.quantize(data / BOOKS, "Q4_0", out=tmp_path / "m.gguf", to="gguf")
    sees(in_gguf(tmp_path / "m.gguf", tmp_path / "wrong.gguf", tensor, change))
    found = arrondi.verify(tmp_path / "m.gguf", ["llama.cpp"], pythons=others)["consumers"][0]
    assert not found["ok"], found


PROMPTS = (
    "The old man walked slowly", "When the morning came,", "It is a truth that", '"I do not know," said', "In the year of the great",
)  # fmt: skip


def test_greedy_tokens_of_llama_cpp_are_ours(data: Path, tmp_path: Path) -> None:
    """Along our own continuation it chooses the same token, or one that its rounding of inputs lifts over a narrow gap."""
    python = Interpreter.of("llama.cpp", pythons(llama_cpp=0))
    file = tmp_path / "m.gguf"
    arrondi.quantize(data / BOOKS, "Q4_K_M", out=file, to="gguf")
    model, tokenizer = arrondi.load(file), load_tokenizer(data / BOOKS)
    same = 0
    for prompt in PROMPTS:
        begun = torch.tensor([tokenizer(prompt)["input_ids"]])
        ids = model.generate(begun, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
        with torch.no_grad():
            ours = model(ids).logits[0].numpy()
        request = {"file": str(file), "text": ""}
        answer = ask(python, "ask_llama_cpp.py", request, {"input_ids": ids.numpy()}, 300)
        theirs = answer.values["logits"][0]
        for place in range(begun.shape[1] - 1, ids.shape[1] - 1):
            chosen, other = ours[place].argmax(), theirs[place].argmax()
            gap = ours[place, chosen] - ours[place, other]
            assert gap <= 2 * np.abs(theirs[place] - ours[place]).max(), (prompt, place, gap)
            assert gap < 0.1 * ours[place].std(), "and it is narrow"
            same += chosen == other
    assert same >= 0.95 * 20 * len(PROMPTS)


NETWORKS = {
    "QDQ int8": "W8A8", "QDQ static": "w=int8/channel,a=uint8/tensor/asym/static", "dynamic": "w=int8/channel,a=uint8/tensor/asym",
    "int4 weights": "w=int4/channel", "QOperator": "W8A8",
}  # fmt: skip


@pytest.mark.parametrize("row", NETWORKS)
def test_networks_in_onnx_runtime_and_openvino(row: str, tmp_path: Path) -> None:
    write_graph(read_graph(perturbed(Residual()), images(2)), tmp_path / "float.onnx")
    out = tmp_path / "out.onnx"
    arrondi.quantize(tmp_path / "float.onnx", NETWORKS[row], calibration=images(32), out=out, evaluate=False)
    if row == "QOperator":
        write_graph(lower(read_graph(out)).graph, out)
    names = ["onnxruntime"] if row == "QOperator" else ["onnxruntime", "openvino"]
    found = arrondi.verify(out, names, pythons=pythons(openvino=0))
    assert found["ok"], found
    assert found["consumers"][0]["relative_difference"] < 1e-3, found


@pytest.mark.parametrize("layout", ["onnx", "onnx-qdq"])
@pytest.mark.parametrize("scheme", ["w=int4/g32", "w=uint4/g64/asym", "w=int8/g32"])
def test_language_models_as_graphs(layout: str, scheme: str, data: Path, sees: Sees, tmp_path: Path) -> None:
    """Products with packed weights are predicted by our own reader of them, not by the runtime."""
    arrondi.quantize(data / STORIES, scheme, out=tmp_path / "out")
    convert_model(tmp_path / "out", tmp_path / "graph", layout)
    others = pythons(openvino=0)
    found = arrondi.verify(tmp_path / "graph", ["onnxruntime", "openvino"], pythons=others)
    assert found["ok"] and max(row["relative_difference"] for row in found["consumers"]) < 1e-5, found
    if layout == "onnx":
        name = "model.layers.1.mlp.up_proj.weight_quantized"
        sees(in_onnx(tmp_path / "graph" / "model.onnx", tmp_path / "wrong.onnx", name, next_nibbles))
        assert not arrondi.verify(tmp_path / "graph", ["onnxruntime"])["ok"]
