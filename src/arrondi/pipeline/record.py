"""What a run leaves behind besides weights: the facts of `report.json`, `manifest.json`, and the key that identifies a run."""

from __future__ import annotations

import hashlib
import json
import platform
import threading
from collections.abc import Mapping
from typing import Any

import torch

from arrondi.checkpoint import Checkpoint, ModelDir
from arrondi.pipeline.plan import Plan
from arrondi.pipeline.recipe import Recipe
from arrondi.pipeline.texts import TextOptions, Texts

_HASHED = 1 << 22
"""Bytes hashed at a time."""


def run_key(
    checkpoint: Checkpoint, plan: Plan, recipe: Recipe, text: TextOptions, texts: Texts, shard_bytes: int
) -> str:
    """Identifies a run: same key, same bytes."""
    import transformers

    from arrondi import __version__

    facts = [
        checkpoint.folder.fingerprint(), plan.layout.name, recipe.to_dict(), [(t.name, t.status, str(t.scheme)) for t in plan.tensors],
        text.samples, text.seq_len, text.seed, text.evaluate, text.eval_samples, shard_bytes,
        texts.calibration and texts.calibration.text_hash, texts.evaluation and texts.evaluation.text_hash,
        __version__, torch.__version__, transformers.__version__,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def facts_of(checkpoint: Checkpoint, plan: Plan, recipe: Recipe, text: TextOptions, texts: Texts) -> dict[str, Any]:
    """The part of the report that is known before the run."""
    import transformers

    from arrondi import __version__

    summary = plan.to_dict()
    calibration = texts.calibration
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
        "calibration": None
        if calibration is None
        else {
            "text": calibration.source,
            "sha256": calibration.text_hash,
            "windows": len(calibration),
            "tokens": calibration.ids.numel(),
            "seed": text.seed,
        },
        "evaluation_text_sha256": texts.evaluation and texts.evaluation.text_hash,
        "notes": [*plan.notes, *texts.notes],
        "versions": {
            "arrondi": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def manifest_of(facts: dict[str, Any], key: str, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What identifies a run for good: contents of model and text, recipe, versions."""
    names = ("recipe", "layout", "calibration", "evaluation_text_sha256", "versions")
    return {"run": key, "model_sha256": dict(hashes), **{name: facts[name] for name in names}}


class FileHasher:
    """SHA-256 of a model's config and weight files, computed beside the run in a thread that dies with it.

    With one thread for PyTorch there is none to be had: the files are read when the result is asked for.
    """

    def __init__(self, folder: ModelDir) -> None:
        self._paths = sorted({folder.path / "config.json", *(e.path for e in folder.entries.values())})
        self._found: dict[str, str] = {}
        self._thread: threading.Thread | None = None
        if torch.get_num_threads() > 1:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        for path in self._paths:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while part := file.read(_HASHED):
                    digest.update(part)
            self._found[path.name] = digest.hexdigest()

    def result(self) -> dict[str, str]:
        """File name → hash; waits for what is left."""
        if self._thread is None:
            self._run()
        else:
            self._thread.join()
        return self._found


def kept_of(plan: Plan) -> list[dict[str, Any]]:
    """What stays as it is, with the reason."""
    return [{"name": t.name, "status": t.status, "reason": t.reason} for t in plan.tensors if t.status != "quantized"]
