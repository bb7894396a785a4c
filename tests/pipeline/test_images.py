"""Vision-language models: what text does not reach is kept and said so, or calibrated on images and measured by what is said of them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import arrondi
from arrondi.errors import DataError, FileFormatError
from arrondi.measure.images import PROMPT, load_processor, read_images
from arrondi.measure.metrics import kl_divergence
from arrondi.model import OnDisk
from arrondi.pipeline import Recipe, TextOptions, make_plan, quantize_model
from arrondi.sample import sample_path
from tests.cli.conftest import Cli, cli, refused

__all__ = ["cli"]

pillow = pytest.importorskip("PIL.Image")

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # fmt: skip


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaVA with every parameter and buffer of its own, and its processor."""
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = transformers.AutoTokenizer.from_pretrained(sample_path())
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    token = tokenizer.convert_tokens_to_ids("<image>")
    text = transformers.LlamaConfig(
        vocab_size=token + 3, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=token, vision_feature_layer=-1
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for _, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * (0.3 if p.ndim == 1 else 0.15) + (1.0 if p.ndim == 1 else 0.0))
    model.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i in range(12):
        pixels = generator.integers(0, 256, (20 + i, 24, 3), dtype=np.uint8)
        pillow.fromarray(pixels).save(folder / f"{i:02}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_images_are_what_the_processor_makes_of_them(llava: Path, pictures: Path) -> None:
    images = read_images(pictures, llava, 3)
    processor = load_processor(llava)
    assert len(images) == 3 and images.source == pictures.name
    asked = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}], add_generation_prompt=True
    )
    wanted = processor(images=pillow.open(pictures / "01.png"), text=asked, return_tensors="pt")
    for name, value in wanted.items():
        assert torch.equal(images.batches[1][name], value)
    ids = wanted["input_ids"][0]
    behind = processor.tokenizer.decode(ids[images.starts[1] + 1 :])
    assert behind == f"{PROMPT}<assistant>" and (ids == processor.image_token_id).sum() == 16


def test_without_images_the_vision_part_is_kept_and_said_so(llava: Path) -> None:
    plan = make_plan(OnDisk.open(llava), Recipe.simple("w=int4/g16"))
    kept = [t for t in plan.tensors if "vision_tower" in t.name and len(t.shape) == 2]
    assert kept and all(t.status == "kept by rule" for t in kept)
    (note,) = [n for n in plan.notes if "text does not reach" in n]
    assert "weights that text does not reach" in note and "are kept as they are" in note and "vision_tower" in note
    whole = make_plan(OnDisk.open(llava), Recipe.simple("w=int4/g16"), images=True)
    assert {t.name for t in whole.quantized} > {t.name for t in plan.quantized}
    assert any("vision_tower" in t.name and "fc1" in t.name for t in whole.quantized)
    assert not any("are kept as they are" in n for n in whole.notes)


def test_a_run_on_images(llava: Path, pictures: Path, tmp_path: Path) -> None:
    """Towers are calibrated; the KL is that of the text behind the image, as a plain loop of transformers computes it."""
    out = tmp_path / "out"
    report = quantize_model(llava, out, Recipe.simple("w=int4/g16", "gptq"), TextOptions(images=pictures))
    rows = {r["name"]: r for r in report["layers"]}
    tower = {n: r for n, r in rows.items() if "vision_tower" in n}
    assert tower and all(r["method"] == "gptq" for r in tower.values())
    reached = {r["calibration_tokens"] for n, r in tower.items() if "fc1" in n and "layers.0" in n}
    assert reached == {11 * 17}  # 16 patches and a class token
    assert report["calibration"]["images"]["count"] == 11
    measured = report["evaluation"]
    assert "every token behind the image" in measured["protocol"] and measured["windows"] == 1
    original = transformers.LlavaForConditionalGeneration.from_pretrained(llava)
    arrondi.dequantize(out, tmp_path / "plain", "float32")
    rounded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "plain")
    images = read_images(pictures, llava, 12)
    batch, start = images.batches[11], images.starts[11]
    with torch.no_grad():
        a, b = (m(**batch).logits[0, start:-1] for m in (original, rounded))
    assert measured["kl_mean"] == pytest.approx(float(kl_divergence(a, b).mean()), rel=1e-3)
    assert measured["kl_mean"] > 0
    again = quantize_model(llava, out, Recipe.simple("w=int4/g16", "gptq"), TextOptions(images=pictures))
    assert again == report  # finished: the same run is not done twice


def test_text_and_images_together(llava: Path, pictures: Path, tmp_path: Path) -> None:
    text = TextOptions(sample_path() / "heldout.txt", samples=4, seq_len=24, images=pictures, eval_text=sample_path() / "heldout.txt", eval_samples=2)  # fmt: skip
    report = quantize_model(llava, tmp_path / "out", Recipe.simple("w=int4/g16", "gptq"), text)
    rows = {r["name"]: r for r in report["layers"]}
    images = read_images(pictures, llava, 12)
    tokens = {r["calibration_tokens"] for n, r in rows.items() if "language_model" in n}
    assert report["calibration"]["images"]["count"] == 4  # as many as windows
    assert tokens == {4 * 24 + images.part(0, 4).tokens}
    assert "windows of 23 tokens" in report["evaluation"]["protocol"]


def broken(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(b"\x89PNG and nothing else")
    return tmp_path


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no folder": (lambda p: p / "gone", "no such directory"),
    "no images": (lambda p: p, "no images in it"),
    "no image": (broken, r"a\.png: cannot be read as an image"),
}


@pytest.mark.parametrize("kind", BAD)
def test_folders_that_hold_none(kind: str, llava: Path, tmp_path: Path) -> None:
    make, words = BAD[kind]
    with pytest.raises(FileFormatError, match=words):
        read_images(make(tmp_path), llava, 3)


def test_models_that_see_nothing(llava: Path, pictures: Path, models: Callable[..., Path], tmp_path: Path) -> None:
    recipe = Recipe.simple("w=int4/g16")
    with pytest.raises(FileFormatError, match=r"no processor \(preprocessor_config\.json\).*is then kept"):
        quantize_model(models("llama"), tmp_path / "out", recipe, TextOptions(images=pictures))
    with pytest.raises(DataError, match="BertModel writes no text"):
        quantize_model(models("bert"), tmp_path / "out", recipe, TextOptions(images=pictures))
    copy = tmp_path / "copy"
    shutil.copytree(llava, copy)
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (copy / name).exists():
            (copy / name).write_text(json.dumps({"processor_class": 3}))
    with pytest.raises(FileFormatError, match="processor"):
        read_images(pictures, copy, 3)
    one: Any = tmp_path / "one"
    one.mkdir()
    shutil.copyfile(pictures / "00.png", one / "a.png")
    with pytest.raises(DataError, match="one image, which cannot be both calibrated and measured on"):
        quantize_model(llava, tmp_path / "out", recipe, TextOptions(images=one))


def test_a_plan_says_what_images_reach(cli: Cli, llava: Path, pictures: Path, tmp_path: Path) -> None:
    """`plan` takes the same option as `quantize`, and says the same of it."""
    asked = ("plan", llava, "--scheme", "w=int4/g16", "--method", "gptq")
    without, seen = cli(*asked, "--json").document, cli(*asked, "--calibration-images", pictures, "--json").document
    reached = {t["name"] for t in seen["tensors"] if t["status"] == "quantized"}
    assert reached > {t["name"] for t in without["tensors"] if t["status"] == "quantized"}
    (note,) = [n for n in seen["notes"] if "text does not reach" in n]
    assert "are quantized, too, because the images reach them" in note
    (note,) = [n for n in without["notes"] if "text does not reach" in n]
    assert "are kept as they are" in note
    report = quantize_model(llava, tmp_path / "out", Recipe.simple("w=int4/g16", "gptq"), TextOptions(images=pictures))
    assert {row["name"] for row in report["layers"]} == reached
    api = arrondi.plan(llava, "w=int4/g16", method="gptq", images=pictures)
    assert {t.name for t in api.quantized} == reached
    printed = cli(*asked, "--calibration-images", pictures).out
    assert "because the images reach them" in " ".join(printed.split()), "wherever lines are broken"
    refused(cli(*asked, "--calibration-images", tmp_path / "gone"), "no such directory")
    refused(cli("plan", sample_path(), "--calibration-images", pictures), "no processor")
