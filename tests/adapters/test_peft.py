"""peft over packed layers, against peft over the same numbers in ordinary layers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import arrondi as ar
from arrondi.adapters.layers import PackedEmbedding, PackedLinear
from arrondi.adapters.origin import ORIGIN, read_origin
from arrondi.errors import SchemeError
from tests.conftest import VOCABULARY

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::FutureWarning:transformers.*")

Bases = Callable[[str], tuple[Path, Path]]
IDS = torch.arange(40).reshape(2, 20) * 31 % VOCABULARY
ATTENTION = ["q_proj", "v_proj"]


def wrapped(model: Any, **options: Any) -> Any:
    """With an adapter that already does something."""
    found = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": ATTENTION, **options}))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(found.named_parameters()):
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return found


def plain(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_alike(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], within: float = 1e-4) -> None:
    assert found and found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= within * grad.norm() + 1e-7, name


@pytest.mark.parametrize("scheme", ["NF4_DQ", "W4A16", "MXFP4A16", "W8A16"])
def test_gradients_are_those_over_ordinary_weights(bases: Bases, scheme: str) -> None:
    packed, dense = bases(scheme)
    for training in (True, False):
        ours, theirs = (wrapped(m).train(training) for m in (ar.load(packed), plain(dense)))
        (loss, found), (wanted_loss, wanted) = gradients(ours), gradients(theirs)
        assert loss == pytest.approx(wanted_loss, abs=1e-5)
        assert_alike(found, wanted)


@pytest.mark.parametrize(
    "options", [{"target_modules": "all-linear"}, {"use_dora": True}, {"use_rslora": True}], ids=str
)
def test_other_ways(bases: Bases, options: dict[str, Any]) -> None:
    packed, dense = bases("NF4_DQ")
    ours, theirs = (wrapped(m, **options).train() for m in (ar.load(packed), plain(dense)))
    assert_alike(gradients(ours)[1], gradients(theirs)[1])
    assert any(isinstance(m, PackedLinear) for m in ours.modules())


def test_recomputed_in_bfloat16_and_under_autocast(bases: Bases) -> None:
    packed, dense = bases("NF4_DQ")
    wanted = gradients(wrapped(plain(dense)).train())[1]
    model = wrapped(ar.load(packed))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    assert_alike(gradients(model.train())[1], wanted)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        assert_alike(gradients(model)[1], wanted, 0.1)
    half = wrapped(ar.load(packed, dtype="bfloat16")).train()
    assert_alike(gradients(half)[1], wanted, 0.1)


def test_it_trains_is_saved_and_loads_over_ordinary_weights(bases: Bases, tmp_path: Path) -> None:
    packed, dense = bases("NF4_DQ")
    model = wrapped(ar.load(packed), target_modules="all-linear").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(gradients(model)[0])
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    assert len(read_origin(tmp_path / "adapter")) == sum(isinstance(m, PackedLinear) for m in model.modules())
    with torch.no_grad():
        wanted = model.eval()(input_ids=IDS).logits
        for base in (ar.load(packed), plain(dense)):
            again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
            torch.testing.assert_close(again(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_fused_model_decodes_with_its_adapter(bases: Bases) -> None:
    """A prompt of one token goes the same way as every later one."""
    model = wrapped(ar.load(bases("NF4_DQ")[0])).eval()
    bare = ar.load(bases("NF4_DQ")[0])
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(2, 1, dtype=torch.long)}
    kept, anew = (model.generate(input_ids=IDS[:, 3:4], use_cache=cached, **options) for cached in (True, False))
    assert torch.equal(kept, anew)
    with torch.no_grad():
        one, base = (m(input_ids=IDS[:, 3:4], use_cache=True).logits for m in (model, bare))
        assert not torch.allclose(one, base, atol=1e-2)
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=IDS).logits, bare(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_several_adapters(bases: Bases) -> None:
    model = wrapped(ar.load(bases("NF4_DQ")[0])).eval()
    with torch.no_grad():
        first = model(input_ids=IDS).logits
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
        torch.testing.assert_close(model(input_ids=IDS).logits, first)
        model.set_adapter("second")
        bare = model(input_ids=IDS).logits
        model.base_model.set_adapter(["default", "second"])
        torch.testing.assert_close(model(input_ids=IDS).logits, first)
    assert not torch.allclose(bare, first)


def test_an_embedding_may_have_one(models: Callable[..., Path], tmp_path: Path) -> None:
    ar.quantize(models("llama"), "NF4", out=tmp_path / "packed", evaluate=False, embeddings="int8/row")
    ar.dequantize(tmp_path / "packed", tmp_path / "plain", "float32")
    ours, theirs = (wrapped(m, target_modules=["embed_tokens", "q_proj"]) for m in (ar.load(tmp_path / "packed"), plain(tmp_path / "plain")))  # fmt: skip
    assert any(isinstance(m, PackedEmbedding) for m in ours.modules())
    assert_alike(gradients(ours)[1], gradients(theirs)[1])


def test_bad_input(bases: Bases) -> None:
    base = bases("NF4_DQ")[0]
    with pytest.raises(SchemeError, match="arrondi adapt merge"):
        wrapped(ar.load(base)).merge_and_unload()
    with pytest.raises(SchemeError, match="adapt init MODEL -o OUT --init pissa"):
        wrapped(ar.load(base), init_lora_weights="pissa_niter_4")
    with pytest.raises(SchemeError, match=r"packed codes stay\. Leave it out"):
        wrapped(ar.load(base), init_lora_weights="olora")
    with pytest.raises(SchemeError, match="modules_to_save are trained as they are"):
        wrapped(ar.load(base), modules_to_save=["down_proj"])
    assert wrapped(ar.load(base), modules_to_save=["lm_head"])
    with pytest.raises(SchemeError, match="rank of 4096"):
        wrapped(ar.load(base), r=4096)


def test_peft_may_be_imported_later() -> None:
    """And nobody who does not use it imports it."""
    lines = (
        "import sys, arrondi.api; from arrondi.adapters.register import when_imported; when_imported(); when_imported()",
        "assert 'peft' not in sys.modules; import peft; from arrondi.nn import QLinear",
        "assert QLinear in peft.LoraConfig()._custom_modules and not [f for f in sys.meta_path if type(f).__module__.startswith('arrondi.')]",
    )
    done = subprocess.run([sys.executable, "-c", "; ".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_written_where_nothing_is_packed(bases: Bases, tmp_path: Path) -> None:
    wrapped(plain(bases("NF4_DQ")[1])).save_pretrained(tmp_path)
    assert not (tmp_path / ORIGIN).exists()
