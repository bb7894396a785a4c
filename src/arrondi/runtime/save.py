"""A loaded quantized model as a checkpoint again: `SavePretrained`.

transformers' own `save_pretrained` would drop every packed weight. A loaded model instead writes the files that it was loaded
from: the same codes to the bit, under the same names. It does so only while it still is that model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arrondi.checkpoint import Checkpoint, ShardPlan, ShardWriter, write_config
from arrondi.errors import FileFormatError, OutputError, SchemeError


class Held:
    """A model that is not kept alive, but whose parts are: in `load(…).save_pretrained(…)` it is gone before the call begins."""

    def __init__(self, model: nn.Module, parts: dict[str, Any] | None = None) -> None:
        self._model, self._kind = weakref.ref(model), type(model)
        self._parts = _parts(model) if parts is None else parts

    def __reduce__(self) -> tuple[Any, ...]:
        model = self()
        return Held, (model, _parts(model))  # a copy of the model has its parts later than this

    def __call__(self) -> Any:
        """The model, or another one of its parts."""
        model = self._model()
        if model is None:
            model = self._kind.__new__(self._kind)
            vars(model).update(self._parts)
        return model


def _parts(model: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(model).items() if name != "save_pretrained"}


class SavePretrained:
    """What `save_pretrained` of a loaded quantized model is.

    Args:
        model: which it belongs to; not kept alive by it.
        path: the directory from which it was loaded.
        fingerprint: of that directory.
        again: loads it again, with nothing fused.
    """

    def __init__(self, model: Held, path: Path, fingerprint: str, again: Callable[[], Any]) -> None:
        self.model, self.path, self.fingerprint, self.again = model, path, fingerprint, again

    def __reduce__(self) -> tuple[Any, ...]:
        return SavePretrained, (self.model, self.path, self.fingerprint, self.again)

    def __call__(self, save_directory: str | Path, **options: Any) -> None:
        """Write the checkpoint into a directory that holds no model yet.

        The model is loaded a second time to compare: nothing is written that is not what `model` computes with.

        Raises:
            SchemeError: the model was changed after it was loaded, or there are options, none of which is known.
            FileFormatError: the directory from which it was loaded is gone or was changed.
            OutputError: a model is there already, or it cannot be written.
        """
        if options:
            raise SchemeError(
                f"save_pretrained of a quantized model writes the checkpoint as it was loaded and takes no {', '.join(sorted(options))}. Give the directory alone."
            )
        out = Path(save_directory)
        model = self.model()
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out} is no directory. Name another one.")
        if (out / "config.json").exists() or any(out.glob("*.safetensors")):
            raise OutputError(f"{out}: a model is there already. Name another directory.")
        checkpoint = Checkpoint.open(self.path)
        if checkpoint.folder.fingerprint() != self.fingerprint:
            raise FileFormatError(f"{self.path}: it was changed since the model was loaded. Load it again.")
        fresh = self.again()
        other = _difference(model, fresh)
        if other:
            raise SchemeError(
                f"{other} was changed after {self.path} was loaded, and only the codes that were loaded can be written. Load the model again, or quantize the changed one."
            )
        _copy(checkpoint, out)
        if fresh.can_generate() and model.generation_config != fresh.generation_config:
            model.generation_config.save_pretrained(out)


def _copy(checkpoint: Checkpoint, out: Path) -> None:
    """All files of a model directory, config.json last."""
    files: dict[str, list[Any]] = {}
    for name, entry in checkpoint.folder.entries.items():
        file = entry.path.name if entry.path.suffix == ".safetensors" else "model.safetensors"
        files.setdefault(file, []).append((name, entry.torch_dtype, entry.shape))
    writer = ShardWriter(out, ShardPlan(files))
    for entry in checkpoint.folder.entries.values():
        writer.copy(entry)
    writer.publish()
    checkpoint.folder.copy_other_files(out)
    write_config(out / "config.json", checkpoint.folder.config)


def _difference(model: nn.Module, fresh: nn.Module) -> str | None:
    """The first tensor that is not what it was."""
    now, then = _numbers(model), _numbers(fresh)
    for name in [*then, *(now.keys() - then.keys())]:
        if name not in now or name not in then or not _same(now[name], then[name]):
            return name
    return None


def _numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, stored buffers, and what packed modules hold."""
    packed = {
        f"{name}.{leaf}" if name else leaf: buffer
        for name, module in model.named_modules()
        for leaf, buffer in module._buffers.items()
        if buffer is not None and type(module).__module__.startswith("arrondi.nn.")
    }
    return model.state_dict() | packed


def _same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """To the bit."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, two)]
    return torch.equal(*bits)
