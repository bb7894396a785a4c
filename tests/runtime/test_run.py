"""Loading a model and letting it speak."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import arrondi
from arrondi.errors import DataError, FileFormatError, SchemeError
from arrondi.nn import QLinear
from arrondi.runtime.generate import _Streamer, generate
from arrondi.sample import sample_path
from tests.conftest import ARCHITECTURES


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample model in 8 bits."""
    out = tmp_path_factory.mktemp("spoken") / "out"
    arrondi.quantize(sample_path(), "W8A16", out=out, evaluate=False)
    return out


# ── load ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_plain_model_loads_as_in_transformers(name: str, models: Callable[..., Path]) -> None:
    theirs = getattr(transformers, ARCHITECTURES[name][0]).from_pretrained(models(name), dtype=torch.float32).eval()
    ours = arrondi.load(models(name))
    assert type(ours) is type(theirs) and not ours.training
    assert not any(isinstance(m, QLinear) for m in ours.modules())
    state = ours.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(state[key], tensor), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.bfloat16], ids=str)
def test_what_is_not_quantized_has_the_type_asked_for(dtype: Any, spoken: Path) -> None:
    model = arrondi.load(spoken, dtype=dtype)
    wanted = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype, dtype)
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert model(input_ids=torch.arange(6)[None]).logits.dtype == wanted


def test_an_unknown_dtype_is_refused(spoken: Path) -> None:
    with pytest.raises(SchemeError, match=r"Unknown dtype 'bfloat'\. Did you mean 'bfloat16'"):
        arrondi.load(spoken, dtype="bfloat")


def test_weights_of_another_config_are_refused(models: Callable[..., Path], tmp_path: Path) -> None:
    for path in models("llama").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 96', '"intermediate_size": 97'))
    with pytest.raises(FileFormatError, match=r"down_proj\.weight has shape \(64, 96\), config.json says \(64, 97\)"):
        arrondi.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"model_type": "llamma"}', "does not know model_type 'llamma'"),
        ("{}", "no model_type"),
        ('{"model_type": ["llama"]}', "model_type should be a word"),
        ('{"model_type": "mine", "auto_map": {"AutoModel": "x.Y"}}', "code that comes with it"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "config.json does not give"),
        ('{"model_type": "llama", "hidden_size": -4}', "hidden_size cannot be -4"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "config.json does not give"),
        ('{"model_type": "llama", "hidden_act": "none such"}', "config.json does not give"),
        ('{"model_type": "llama", "architectures": ["__version__"]}', "config.json does not give"),
    ],
)
def test_a_config_that_gives_no_model_is_refused(
    config: str, words: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes((models("llama") / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(FileFormatError) as caught:
        arrondi.load(tmp_path)
    assert words in str(caught.value) and str(tmp_path) in str(caught.value)


def test_an_architecture_name_that_is_unknown_falls_back_to_the_base_model(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    for path in models("bert").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"BertModel"', '"BertForSomethingOfMyOwn"'))
    assert type(arrondi.load(tmp_path)).__name__ == "BertModel"


# ── generate ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_likeliest_words_are_those_of_transformers(spoken: Path) -> None:
    found = generate(spoken, "Return a list of", max_new_tokens=20, dtype="float32")
    assert found["text"].startswith("Return a list of") and found["tokens"] == 20
    assert found["tokens_per_second"] > 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(spoken)
    model = transformers.AutoModelForCausalLM.from_pretrained(spoken, dtype=torch.float32).eval()
    ids = torch.tensor(
        [[tokenizer.bos_token_id, *tokenizer("Return a list of", add_special_tokens=False)["input_ids"]]]
    )
    with torch.no_grad():
        for _ in range(20):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert found["text"] == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_a_temperature_draws_and_the_seed_decides(spoken: Path) -> None:
    def draw(seed: int) -> str:
        return str(generate(spoken, "Return", max_new_tokens=12, temperature=1.0, seed=seed)["text"])

    assert draw(1) == draw(1)
    assert len({draw(s) for s in range(4)}) > 1


def test_words_are_printed_as_they_come_and_all_of_them(spoken: Path) -> None:
    class Listening(io.StringIO):
        pieces = 0

        def write(self, text: str) -> int:
            self.pieces += bool(text)
            return super().write(text)

    stream = Listening()
    found = generate(spoken, "Return a list of", max_new_tokens=15, stream=stream)
    assert stream.getvalue() == found["text"] + "\n"
    assert stream.pieces > 8


def test_a_character_of_several_tokens_is_printed_whole() -> None:
    class Bytes:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    out = io.StringIO()
    streamer = _Streamer(Bytes(), out)
    seen = []
    for byte in "aé€b".encode():
        streamer.put(torch.tensor([byte]))
        seen.append(out.getvalue())
    streamer.end()
    assert seen == ["a", "a", "aé", "aé", "aé", "aé€", "aé€b"]
    assert out.getvalue() == "aé€b\n"


def test_generation_ends_where_the_context_does(models: Callable[..., Path]) -> None:
    prompt = " ".join(["word"] * 60)
    found = generate(models("llama"), prompt, max_new_tokens=500)
    assert found["tokens"] < 128
    with pytest.raises(DataError, match=r"context ends there. Shorten"):
        generate(models("llama"), " ".join(["word"] * 200))


def test_a_tokenizer_of_another_model_is_named(models: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(models("llama"), tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": "a word that is in no vocabulary"}))
    with pytest.raises(DataError, match="The prompt has token 2048, but the model knows 2048"):
        generate(tmp_path / "model", "Hello")


def test_an_encoder_does_not_speak(models: Callable[..., Path]) -> None:
    with pytest.raises(SchemeError, match="BertModel does not generate text"):
        generate(models("bert"), "Hello")


def test_an_empty_prompt_starts_from_the_start_token(spoken: Path) -> None:
    assert generate(spoken, "", max_new_tokens=5)["tokens"] == 5
