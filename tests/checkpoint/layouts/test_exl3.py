"""EXL3: every width and function against a decoder written apart, bytes there and back, refusals; and the decoder of GPTQModel."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from arrondi.checkpoint import LAYOUTS, Checkpoint
from arrondi.errors import ArrondiError, FileFormatError
from arrondi.pipeline.convert import convert_model
from arrondi.tensor.trellis import ring_values
from tests.checkpoint.layouts.plain import decoded

LAYOUT = LAYOUTS["exl3"]
FACTORS = {"mcg": 0xCBAC1FED - 2**32, "mul1": 0x83DCD12D - 2**32}
CONFIG = {"quantization_config": {"quant_method": "exl3", "version": "0.0.6", "bits": 3.0, "head_bits": 6}}
KINDS = {torch.int16: "I16", torch.float16: "F16", torch.int32: "I32", torch.float32: "F32"}
FILES = [
    (1, "mcg", False),
    (2, "mul1", False),
    (3, "3inst", False),
    (4, "mul1", True),
    (5, "mcg", False),
    (7, "3inst", True),
    (8, "mul1", False),
]


def made(bits: int, function: str, signs: bool = False, rows: int = 256, columns: int = 128) -> dict[str, torch.Tensor]:
    """Random words: every stream of bits is a ring."""
    generator = torch.Generator().manual_seed(bits)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int32).to(torch.int16)

    tensors = {"a.trellis": words(columns // 16, rows // 16, 16 * bits)}
    if signs:
        tensors |= {"a.su": words(columns // 16), "a.sv": words(rows // 16)}
    else:
        tensors |= {
            "a.suh": torch.randn(columns, generator=generator).half(),
            "a.svh": torch.randn(rows, generator=generator).half(),
        }
    return (
        tensors
        if function == "3inst"
        else tensors | {f"a.{function}": torch.tensor(FACTORS[function], dtype=torch.int32)}
    )


def found(tensors: dict[str, torch.Tensor]) -> list[object]:
    names = {name: (KINDS[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    return list(LAYOUT.find(CONFIG, names, tensors.__getitem__))


@pytest.mark.parametrize(("bits", "function", "signs"), FILES)
def test_files_are_read_as_a_plain_decoder_reads_them_and_written_again(bits: int, function: str, signs: bool) -> None:
    tensors = made(bits, function, signs)
    (placed,) = found(tensors)
    values = LAYOUT.read(placed, tensors.__getitem__)
    expected = torch.from_numpy(decoded(CONFIG, tensors)["a"])
    torch.testing.assert_close(values.weight.dequantize(), expected, rtol=1e-5, atol=1e-5)
    again = LAYOUT.write(placed, values)
    assert set(again) == set(tensors)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.trellis": torch.zeros(8, 16, 40, dtype=torch.int16)}, "40 words a tile"),
        ({"a.trellis": torch.zeros(8, 12, 48, dtype=torch.int16)}, "no blocks of 128"),
        ({"a.trellis": torch.zeros(8, 768, dtype=torch.int16)}, "should have 3 axes"),
        ({"a.svh": torch.zeros(128, dtype=torch.float16)}, r"a.svh should be F16 \(256,\)"),
        ({"a.suh": None}, "a.suh is missing"),
        ({"a.trellis": None}, "a.trellis is missing"),
        ({"a.mcg": torch.tensor(FACTORS["mcg"], dtype=torch.int32)}, "both stored"),
        ({"a.mul1": torch.tensor([FACTORS["mul1"]], dtype=torch.int32)}, r"a.mul1 should be one number, I32 \(\)"),
        ({"a.weight": torch.zeros(256, 128)}, "beside a quantized weight"),
    ],
)
def test_what_does_not_fit_is_one_sentence(change: dict[str, torch.Tensor | None], message: str) -> None:
    tensors = {name: t for name, t in (made(3, "mul1") | change).items() if t is not None}
    with pytest.raises(FileFormatError, match=message):
        found(tensors)


def test_an_unknown_factor_and_an_unknown_key_are_refused() -> None:
    tensors = made(3, "mul1") | {"a.mul1": torch.tensor(17, dtype=torch.int32)}
    (placed,) = found(tensors)
    with pytest.raises(FileFormatError, match="the only factor that is known is 0x83dcd12d"):
        LAYOUT.read(placed, tensors.__getitem__)
    with pytest.raises(FileFormatError, match="'rotate'"):
        LAYOUT.find({"quantization_config": {**CONFIG["quantization_config"], "rotate": True}}, {}, tensors.__getitem__)


def test_what_gptqmodel_says_of_a_file_is_known_and_what_would_change_it_is_not() -> None:
    tensors = made(2, "mul1")
    theirs = {
        "bits": 2.0, "group_size": -1, "desc_act": False, "lm_head": False, "method": "exl3", "format": "exl3", "checkpoint_format": "exl3",
        "pack_dtype": "int32", "meta": {"fallback": {"strategy": "rtn"}}, "out_scales": "auto", "codebook": "mul1",
        "tensor_storage": {"a": {"bits_per_weight": 2}},
    }  # fmt: skip
    names = {name: (KINDS[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    said = {"quant_method": "exl3", **theirs}
    assert len(LAYOUT.find({"quantization_config": said}, names, tensors.__getitem__)) == 1
    for key, value in {"group_size": 128, "desc_act": True, "format": "gptq", "rotation": "hadamard"}.items():
        with pytest.raises(FileFormatError, match=f"{key} is"):
            LAYOUT.find({"quantization_config": said | {key: value}}, names, tensors.__getitem__)


def test_a_head_that_was_filled_up_to_blocks_is_refused() -> None:
    tensors = {name.replace("a.", "lm_head."): t for name, t in made(2, "mul1").items()}
    names = {name: (KINDS[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    for config in ({"vocab_size": 200}, {"text_config": {"vocab_size": 200}}):
        with pytest.raises(FileFormatError, match="256 outputs for a vocabulary of 200"):
            LAYOUT.find(CONFIG | config, names, tensors.__getitem__)
    assert len(LAYOUT.find(CONFIG | {"vocab_size": 256}, names, tensors.__getitem__)) == 1


def written(folder: Path) -> Path:
    """A small Llama whose seven linear layers have seven widths and functions."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64))
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    layers = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    for name, (bits, function, signs) in zip(layers, FILES, strict=True):
        rows, columns = tensors.pop(f"{name}.weight").shape
        own = made(bits, function, signs, rows, columns)
        tensors |= {f"{name}{key.removeprefix('a')}": t for key, t in own.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | CONFIG))
    return folder


def test_conversion_to_our_own_layout_and_back_is_exact(tmp_path: Path) -> None:
    source = written(tmp_path / "exl3")
    (source / "quantization_config.json").write_text("{}")  # ExLlamaV3's description of these files, and of no others
    for to, at, into in (("arrondi", source, "ours"), ("exl3", tmp_path / "ours", "back")):
        result = convert_model(at, tmp_path / into, to, exact_only=True)
        assert {row["verdict"] for row in result["tensors"] if "verdict" in row} <= {"exact", "copied"}
    assert not (tmp_path / "ours" / "quantization_config.json").exists()
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(new[name], t) for name, t in old.items() if not name.endswith((".su", ".sv")))
    with pytest.raises(ArrondiError):
        convert_model(source, tmp_path / "awq", "awq", exact_only=True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    with pytest.raises(FileFormatError, match="quantized"):
        Checkpoint.open(source)


_ASK = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from gptqmodel.nn_modules.exllamav3_torch import ExllamaV3TorchLinear as Linear
tensors, found = load_file(sys.argv[1]), {}
for path in {name.rpartition(".")[0] for name in tensors if name.endswith(".trellis")}:
    own = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.rpartition(".")[0] == path}
    columns, rows = (16 * n for n in own["trellis"].shape[:2])
    layer = Linear.from_tensors(in_features=columns, out_features=rows, name=path, tensors=own)
    found |= {path + ".inner": layer.get_inner_weight_tensor().contiguous(), path + ".weight": layer.get_weight_tensor().contiguous()}
save_file(found, sys.argv[2])
"""


@pytest.mark.peer
def test_gptqmodel_decodes_what_we_write_to_the_values_that_we_read(tmp_path: Path) -> None:
    """Its tables are the float32 numbers before the format's rounding to float16."""
    pythons = os.environ.get("ARRONDI_CHECKPOINTS", "").split(os.pathsep)
    if not pythons[0]:
        (pytest.fail if os.environ.get("ARRONDI_PEERS") else pytest.skip)(
            "ARRONDI_CHECKPOINTS names no interpreter with gptqmodel"
        )
    convert_model(written(tmp_path / "old"), tmp_path / "ours", "arrondi")  # signs stay packed from EXL3 to EXL3
    convert_model(tmp_path / "ours", tmp_path / "new", "exl3")
    checkpoint = Checkpoint.open(tmp_path / "new")
    command = [pythons[0], "-c", _ASK, tmp_path / "new" / "model.safetensors", tmp_path / "theirs"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = load_file(tmp_path / "theirs")
    assert len(checkpoint.placed) == len(FILES)
    for name in checkpoint.placed:
        q, path = checkpoint.layer(name).weight, name.removesuffix(".weight")
        assert q.scheme.format.trellis is not None
        assert torch.equal(ring_values(q.codes, q.scheme.format.trellis).T, theirs[f"{path}.inner"].half().float())
        weight = theirs[name].T
        assert float((q.dequantize() - weight).abs().max()) < 1e-3 * float(weight.abs().max())
