"""What a run leaves behind besides weights: the facts of `report.json` and `manifest.json`, and the key that identifies a run."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch

from arrondi.checkpoint import Checkpoint, file_sha256
from arrondi.measure.data import Windows
from arrondi.measure.images import Images
from arrondi.native import multiplies_bfloat16, native
from arrondi.pipeline.ledger import Ledger
from arrondi.pipeline.plan import Plan
from arrondi.pipeline.recipe import Recipe
from arrondi.pipeline.texts import TextOptions, Texts


def versions() -> dict[str, str]:
    """The packages whose code decides what is written."""
    import transformers

    from arrondi import __version__

    return {
        "arrondi": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def machine() -> dict[str, str]:
    """What the bytes of a run depend on besides its inputs and versions.

    Sums of floating-point numbers are rounded in another order by another path of the kernels, another instruction set of
    PyTorch, and another number of threads.
    """
    return {
        "kernels": "none" if native is None else f"{native.path()} {_kernels()}",
        "torch": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": "yes" if multiplies_bfloat16() else "no",
        "threads": str(torch.get_num_threads()),
        "processor": platform.machine(),
    }


@functools.cache
def _kernels() -> str:
    """Which build of the kernels this is."""
    assert native is not None
    return file_sha256(Path(native.__file__))[:12]


def run_key(kind: str, ledger: Ledger, *facts: Any) -> str:
    """Identifies a run: same key, same bytes.

    Args:
        kind: the command.
        ledger: the source. Its files are part of the key; its weights are not, the ledger watches them.
        facts: everything else that the bytes depend on, as values of JSON.
    """
    everything = [kind, ledger.files, versions(), machine(), *facts]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def quantize_key(
    checkpoint: Checkpoint,
    ledger: Ledger,
    plan: Plan,
    recipe: Recipe,
    text: TextOptions,
    texts: Texts,
    shard_bytes: int,
    device: str,
) -> str:
    """The key of a run of `quantize_model`."""
    source = checkpoint.folder.fingerprint()
    tensors = [(t.name, t.status, str(t.scheme)) for t in plan.tensors]
    asked = [text.samples, text.seq_len, text.seed, text.evaluate, text.eval_samples, shard_bytes, device]
    windows = [_windows(texts.calibration), _windows(texts.evaluation), _calls(texts.images), _calls(texts.eval_images)]
    layout = [plan.layout.name, plan.config(), texts.importance and texts.importance.facts["sha256"]]
    return run_key("quantize", ledger, source, layout, recipe.to_dict(), tensors, asked, windows)


def _windows(windows: Windows | None) -> list[str] | None:
    """A text and its tokens: another tokenizer makes others of the same text."""
    if windows is None:
        return None
    return [windows.text_hash, hashlib.sha256(windows.ids.contiguous().numpy().tobytes()).hexdigest()]


def _calls(images: Images | None) -> str | None:
    """Images as the model is given them: another processor makes others of the same files."""
    if images is None:
        return None
    digest = hashlib.sha256(images.sha256.encode())
    for batch in images.batches:
        for name, value in sorted(batch.items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _calibration(text: TextOptions, texts: Texts) -> dict[str, Any] | None:
    """What was calibrated on."""
    found: dict[str, Any] = {}
    if texts.calibration is not None:
        windows = texts.calibration
        found = {
            "text": windows.source,
            "sha256": windows.text_hash,
            "windows": len(windows),
            "seed": text.seed,
            **texts.described,
        }
    if texts.images is not None:
        images = texts.images
        found["images"] = {
            "folder": images.source,
            "sha256": images.sha256,
            "count": len(images),
            "tokens": images.tokens,
        }
    return found or None


def facts_of(checkpoint: Checkpoint, plan: Plan, recipe: Recipe, text: TextOptions, texts: Texts) -> dict[str, Any]:
    """The part of the report that is known before the run."""
    summary = plan.to_dict()
    sites = [s.name for t in plan.quantized for s in t.sites]
    importance, told = (None, []) if texts.importance is None else texts.importance.told(sites)
    return {
        "model": str(checkpoint.folder.path),
        "architecture": (checkpoint.folder.config.get("architectures") or [None])[0],
        "fingerprint": checkpoint.folder.fingerprint(),
        "recipe": recipe.to_dict(),
        "layout": plan.layout.name,
        "readers": summary["readers"],
        "bits_per_weight": summary["bits_per_weight"],
        "model_bits_per_weight": summary["model_bits_per_weight"],
        "output_bytes": plan.output_bytes,
        "input_bytes": checkpoint.folder.nbytes,
        "counts": summary["counts"],
        "calibration": _calibration(text, texts),
        "importance": importance,
        "evaluation_text_sha256": texts.evaluation and texts.evaluation.text_hash,
        "notes": [*plan.notes, *texts.notes, *told],
        "versions": versions(),
    }


def manifest_of(key: str, ledger: Ledger, facts: dict[str, Any]) -> dict[str, Any]:
    """What identifies a run for good: contents of model and text, recipe, versions, machine. `publish` adds the files.

    `model` holds the SHA-256 of the model's small files, and the digest of every stored tensor that was read (`digest_pieces`).
    """
    names = ("recipe", "layout", "calibration", "importance", "evaluation_text_sha256", "dtype", "versions")
    return {
        "run": key,
        "model": {"files": ledger.files, "tensors": dict(sorted(ledger.digests.items()))},
        **{name: facts[name] for name in names if name in facts},
        "machine": machine(),
    }


def kept_of(plan: Plan) -> list[dict[str, Any]]:
    """What stays as it is, with the reason."""
    return [{"name": t.name, "status": t.status, "reason": t.reason} for t in plan.tensors if t.status != "quantized"]
