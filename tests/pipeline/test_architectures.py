"""Architectures with something unusual, beyond those of `test_coverage`: what transformers builds is quantized by structure."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.errors import SchemeError
from arrondi.evaluate.compare import compare_models
from arrondi.model import Chain
from arrondi.pipeline import TextOptions, quantize_model
from arrondi.sample import sample_path
from tests.conftest import _COMMON, _DECODER, VOCABULARY

_ENCODER = {**_COMMON, "intermediate_size": 96}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}

UNUSUAL: dict[str, tuple[str, dict[str, Any]]] = {
    # classes that reach for the weights of packed layers when they are built
    "falcon": ("FalconForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", _GPT),
    "modernbert": ("ModernBertModel", {**_ENCODER, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "cls_token_id": 0, "sep_token_id": 0}),
    "t5-encoder": ("T5EncoderModel", {"vocab_size": VOCABULARY, "d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4, "d_kv": 16}),
    "mamba": ("MambaForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 32}),
    # linears before the first block
    "opt-projected": ("OPTForCausalLM", {**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": 32, "pad_token_id": 1}),
    "electra": ("ElectraModel", {**_ENCODER, "embedding_size": 32}),
    # a weight that is used without calling its module
    "deberta": ("DebertaV2Model", {**_ENCODER, "relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]}),
    # a stored buffer, shared experts, low-rank attention
    "deepseek-v3": ("DeepseekV3ForCausalLM", {**_DECODER, "num_hidden_layers": 2, "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16, "n_shared_experts": 1}),
    # heads of two kinds
    "bert-masked": ("BertForMaskedLM", _ENCODER),
    "bert-classifier": ("BertForSequenceClassification", _ENCODER),
}  # fmt: skip
REPEATED = {"albert": ("AlbertModel", {**_ENCODER, "embedding_size": 32})}
IDS = torch.randint(2, 2048, (2, 20), generator=torch.Generator().manual_seed(3))
W4 = arrondi.Recipe.simple("W4A16", "gptq", group_size=32)


@pytest.fixture(scope="module")
def unusual(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            class_name, settings = {**UNUSUAL, **REPEATED}[name]
            cls = getattr(transformers, class_name)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = cls(cls.config_class(**settings))
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.ndim >= 2:
                            parameter.mul_(3)
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(sample_path() / file, made[name] / file)
        return made[name]

    return get


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result = model(input_ids=IDS)
    return result.logits if hasattr(result, "logits") else result[0]  # type: ignore[no-any-return]


def of_transformers(name: str, folder: Path) -> Any:
    return getattr(transformers, {**UNUSUAL, **REPEATED}[name][0]).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", UNUSUAL)
def test_it_is_quantized_measured_and_loaded(
    name: str, unusual: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    source, out = unusual(name), tmp_path / "out"
    options = TextOptions(text, samples=4, seq_len=24, eval_text=text, eval_samples=2)
    report = quantize_model(source, out, W4, options)
    assert report["layout"] == "compressed-tensors" and report["notes"] == []
    theirs = outputs(of_transformers(name, out))
    torch.testing.assert_close(outputs(arrondi.load(out)), theirs, rtol=1e-4, atol=2e-5 * float(theirs.abs().max()))
    again = compare_models(out, source, text, seq_len=24, samples=2)
    key = "kl_mean" if "kl_mean" in again else "relative_error"
    assert report["evaluation"][key] == again[key] > 0, "what `quantize` followed is what it wrote"


@pytest.mark.parametrize("name", ["opt-projected", "electra"])
def test_a_linear_before_the_blocks_is_calibrated_and_the_blocks_see_it_rounded(
    name: str, unusual: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    source = unusual(name)
    options = TextOptions(text, samples=4, seq_len=24, evaluate=False)
    recipe = arrondi.Recipe.simple("W2A16", "gptq", group_size=32)
    report = quantize_model(source, tmp_path / "out", recipe, options)
    early = next(r for r in report["layers"] if "project" in r["name"] and "out" not in r["name"])
    assert early["calibration_tokens"] == 4 * 24 and early["output_error"] > 0
    # The first block's inputs are what the rounded projection gives: keep the projection, and its weights come out otherwise.
    keeping = arrondi.Recipe.simple("W2A16", "gptq", group_size=32, ignore=[early["name"].removesuffix(".weight")])
    quantize_model(source, tmp_path / "kept", keeping, options)
    one, two = Checkpoint.open(tmp_path / "out"), Checkpoint.open(tmp_path / "kept")
    first = next(n for n in two.placed if ".0." in n)
    assert not torch.equal(one.dense(first), two.dense(first))


def test_blocks_that_run_more_than_once_are_refused_not_miscounted(
    unusual: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    source, out = unusual("albert"), tmp_path / "out"
    with pytest.raises(SchemeError, match=r"not run once each in order.*--method rtn or hqq without text"):
        quantize_model(source, out, W4, TextOptions(text, samples=2, seq_len=24, eval_samples=1))
    quantize_model(source, tmp_path / "blind", arrondi.Recipe.simple("W4A16", group_size=32))
    theirs = outputs(of_transformers("albert", tmp_path / "blind"))
    torch.testing.assert_close(outputs(arrondi.load(tmp_path / "blind")), theirs, rtol=1e-4, atol=1e-4)


def test_a_model_that_wants_other_inputs_is_refused_with_text_only(text: Path, tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(sample_path() / file, tmp_path / "t5" / file)
    options = TextOptions(text, samples=2, seq_len=24, eval_samples=1)
    with pytest.raises(SchemeError, match=r"does not run on token ids alone.*rtn or hqq without text"):
        quantize_model(tmp_path / "t5", tmp_path / "out", W4, options)
    assert quantize_model(tmp_path / "t5", tmp_path / "blind", arrondi.Recipe.simple("W4A16", group_size=32))["layers"]


def test_nothing_stays_loaded_of_a_model_that_wants_all_at_once(unusual: Callable[[str], Path]) -> None:
    chain = Chain(OnDisk.open(unusual("deberta")))
    hidden = list(chain.begin([IDS]))
    assert all(p.device.type == "meta" for p in chain.model.parameters())
    for i in range(len(chain)):
        chain.fill(i)
        hidden = [chain.run(i, h) for h in hidden]
        chain.drop(i)
    with chain.outer_loaded(), torch.no_grad():
        found = chain.finish(IDS, hidden[0])
    torch.testing.assert_close(found, outputs(of_transformers("deberta", unusual("deberta"))), rtol=1e-4, atol=1e-4)
    assert all(p.device.type == "meta" for p in chain.model.parameters())


def test_a_class_that_needs_its_weights_is_marked(unusual: Callable[[str], Path], models: Callable[..., Path]) -> None:
    for folder, starts in ((unusual("modernbert"), False), (unusual("t5-encoder"), False), (models("llama"), True), (models("bert"), True)):  # fmt: skip
        skeleton = OnDisk.open(folder)
        linears = [n for n, m in skeleton.model.named_modules() if isinstance(m, torch.nn.Linear)]
        before = {n: b.clone() for n, b in skeleton.model.named_buffers()}
        state = torch.random.get_rng_state()
        assert skeleton.starts_without(linears) == starts
        assert torch.equal(state, torch.random.get_rng_state())
        assert all(torch.equal(before[n], b) for n, b in skeleton.model.named_buffers())
        assert all("weight" in skeleton.model.get_submodule(n)._parameters for n in linears)
