"""Adapters on disk, in peft's own files and without peft: `Adapter`, read and written.

`adapter_config.json` says what they are, `adapter_model.safetensors` holds `base_model.model.MODULE.lora_A.weight` (r, in) and
`…lora_B.weight` (out, r). What changes a layer otherwise than by B A, or by DoRA, is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.adapters.origin import read_origin
from arrondi.arguments import said
from arrondi.checkpoint import ShardPlan, ShardWriter, read_header, read_tensor, write_json
from arrondi.checkpoint.containers.json_file import read_json
from arrondi.errors import FileFormatError
from arrondi.repair.low_rank import Factors

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_COPY: Final = ".base_layer.weight"
_UNKNOWN: Final = (
    "modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication", "lora_bias", "use_qalora", "use_bdlora", "arrow_config",
    "alora_invocation_tokens", "kasa_config", "velora_config", "monteclora_config", "megatron_config",
)  # fmt: skip
"""Settings of peft under which a layer is more than W + B A."""

STARTS: Final = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is; under all others peft changes it where the adapter is put on, again at every loading."""


@dataclass(frozen=True)
class Delta:
    """What an adapter does to one weight.

    Attributes:
        factors: B A, the adapter's scaling in it.
        magnitude: (out,), the lengths of the rows of the result (DoRA); None: as they come.
    """

    factors: Factors
    magnitude: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.factors.b.shape[0], self.factors.a.shape[1]

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """W + B A, (out, in); with DoRA m · (W + B A) / ‖W + B A‖ row by row."""
        merged = weight + self.factors.product
        if self.magnitude is None:
            return merged
        return merged * (self.magnitude / merged.norm(dim=1))[:, None]


@dataclass(frozen=True)
class Adapter:
    """An adapter that was read.

    Attributes:
        deltas: module → what is done to its weight.
        origin: module → digest of the packed layer that it was made for; empty where that is not known.
        copies: module → its weight (out, in) without the adapter, which peft saves along for output layers.
    """

    deltas: Mapping[str, Delta]
    origin: Mapping[str, str]
    copies: Mapping[str, torch.Tensor]

    @classmethod
    def read(cls, path: str | Path) -> Adapter:
        """Read a directory.

        Raises:
            FileFormatError: no adapter, one of another kind than LoRA, or files that do not go together.
        """
        folder = Path(path)
        config = read_json(folder / CONFIG, "Name a directory that peft's save_pretrained wrote.")
        if str(config.get("peft_type", "")).upper() != "LORA":
            raise FileFormatError(
                f"{folder}: holds an adapter of the kind {config.get('peft_type')}, and LoRA is merged here. Merge it with peft, over the dequantized model."
            )
        start = config.get("init_lora_weights", True)
        if start not in STARTS:
            raise FileFormatError(
                f"{folder}: it was started by init_lora_weights={start!r}, which changes the weights under it, so its factors belong to others than its base holds. Save it with path_initial_model_for_weight_conversion, which makes an ordinary adapter of it."
            )
        used = [name for name in _UNKNOWN if config.get(name)]
        if config.get("bias", "none") != "none":
            used.append("bias")
        if used:
            raise FileFormatError(
                f"{folder}: its {' and '.join(used)} changes more than weights by B A. Merge it with peft, over the dequantized model."
            )
        _check_numbers(folder, config)
        if not (folder / WEIGHTS).is_file():
            raise FileFormatError(f"{folder}: has no {WEIGHTS}. Save the adapter with safe_serialization.")
        tensors = {n: read_tensor(e) for n, e in read_header(folder / WEIGHTS).items()}
        copied = [n for n in tensors if n.endswith(_COPY)]
        copies = {n.removeprefix(_PREFIX).removesuffix(_COPY): tensors.pop(n) for n in copied}
        return cls(_deltas(folder, {n: t.float() for n, t in tensors.items()}, config), read_origin(folder), copies)


def _deltas(folder: Path, tensors: dict[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, Delta]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise FileFormatError(
                f"{folder}: {name} holds NaN or infinity. The training failed; take an earlier state."
            )
        module, _, what = name.removeprefix(_PREFIX).rpartition(".lora_")
        part = what.removesuffix(".weight")
        if not module or part not in ("A", "B", "magnitude_vector", "embedding_A", "embedding_B"):
            raise FileFormatError(
                f"{folder}: holds {name}, which is no part of LoRA. Merge it with peft, over the dequantized model."
            )
        parts.setdefault(module, {})[part] = tensor
    found = {}
    for module, given in parts.items():
        if "embedding_A" in given:
            raise FileFormatError(
                f"{folder}: adapts the table {module}, and only linear layers are merged here. Merge it with peft, over the dequantized model."
            )
        a, b = given.get("A"), given.get("B")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in given.items())
            raise FileFormatError(
                f"{folder}: {module} needs A (r, in) and B (out, r), got {shapes}. The files do not go together."
            )
        found[module] = Delta(Factors(b * _scaling(config, module, a.shape[0]), a), given.get("magnitude_vector"))
    if not found:
        raise FileFormatError(f"{folder}: holds no adapter weights.")
    return found


def _check_numbers(folder: Path, config: Mapping[str, Any]) -> None:
    patterns = config.get("alpha_pattern") or {}
    values = [config.get("lora_alpha", 1), *(patterns.values() if isinstance(patterns, Mapping) else [None])]
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        raise FileFormatError(
            f"{folder / CONFIG}: lora_alpha is a number and alpha_pattern gives one for each of its patterns, got {said(values)}. Save the adapter again."
        )


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """As peft computes it: α / r, or α / √r; α may be another for some layers, by patterns for the end of their paths, and r is that of the file."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next(
        (v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), config.get("lora_alpha", rank)
    )
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def write_adapter(
    folder: Path, factors: Mapping[str, Factors], *, alpha: float, base: str, task: str | None, dropout: float = 0.0
) -> None:
    """Write an adapter that plain peft loads.

    Args:
        folder: is made.
        factors: module → B A without the scaling α / r; of one rank.
        alpha: the adapter's α.
        base: the directory of its base, for readers.
        task: peft's name of what the model is for; None: not said.
    """
    tensors = {}
    for module, one in factors.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = one.a.float().contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = one.b.float().contiguous()
    writer = ShardWriter(folder, ShardPlan({WEIGHTS: [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]}))
    for name, tensor in tensors.items():
        writer.put(name, tensor)
    writer.publish()
    (rank,) = {one.a.shape[0] for one in factors.values()}
    config = {
        "peft_type": "LORA", "task_type": task, "base_model_name_or_path": base, "r": rank, "lora_alpha": alpha, "lora_dropout": dropout,
        "target_modules": sorted(factors), "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    write_json(folder / CONFIG, config)
