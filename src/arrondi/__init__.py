"""Arrondi: quantize a trained neural network, measure what it cost, run it in few bits.

Names are imported when they are first used, so that `import arrondi` and `arrondi --help` answer at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

__version__ = "0.1.0"

_HOME: Final = {
    "compare": "api", "dequantize": "api", "evaluate": "api", "inspect": "api", "load": "api", "plan": "api", "quantize": "api", "save": "api", "verify": "api",
    "Recipe": "pipeline", "Rule": "pipeline", "STEPS": "pipeline", "Step": "pipeline",
    "Limits": "measure.limits",
    "allow_torch_load": "checkpoint.containers.torch_file",
    "KV_KINDS": "formats.kv", "CacheScheme": "formats.kv", "QuantizedCache": "runtime.kv", "calibrate_cache": "runtime.kv", "calibrate_clips": "runtime.kv", "kv_cache": "runtime.kv",
    "ActivationScheme": "formats", "FORMATS": "formats", "Format": "formats", "LayerScheme": "formats", "PRESETS": "formats",
    "PerBlock": "formats", "PerChannel": "formats", "PerGroup": "formats", "PerTensor": "formats", "PerToken": "formats",
    "Scheme": "formats", "codebook": "formats", "get_format": "formats", "parse_scheme": "formats",
    "QTensor": "tensor.qtensor", "fake_quantize": "tensor.nearest", "quantize_tensor": "tensor.nearest",
    "pack": "tensor.packing", "unpack": "tensor.packing",
    "METHODS": "rounding", "gptq": "rounding", "hqq": "rounding", "rtn": "rounding",
    "SecondMoment": "calibration",
    "ArrondiError": "errors", "DataError": "errors", "FileFormatError": "errors", "OutputError": "errors",
    "SchemeError": "errors", "ShapeError": "errors",
    "TRAINING_METHODS": "training", "convert_to_lowbit_training": "training", "follow_deviation": "training", "restore_training": "training",
    "training_report": "training",
    "GRADIENT_SCHEMES": "distributed.schemes", "compress_fsdp": "distributed.fsdp", "compress_gradients": "distributed.ddp",
    "compress_saved_activations": "training.saved",
    "sample_path": "sample",
}  # fmt: skip
"""Public name → the module that owns it."""

if TYPE_CHECKING:
    from arrondi import optim as optim
    from arrondi.api import compare as compare
    from arrondi.api import dequantize as dequantize
    from arrondi.api import evaluate as evaluate
    from arrondi.api import inspect as inspect
    from arrondi.api import load as load
    from arrondi.api import plan as plan
    from arrondi.api import quantize as quantize
    from arrondi.api import save as save
    from arrondi.api import verify as verify
    from arrondi.calibration import SecondMoment as SecondMoment
    from arrondi.checkpoint.containers.torch_file import allow_torch_load as allow_torch_load
    from arrondi.distributed.ddp import compress_gradients as compress_gradients
    from arrondi.distributed.fsdp import compress_fsdp as compress_fsdp
    from arrondi.distributed.schemes import GRADIENT_SCHEMES as GRADIENT_SCHEMES
    from arrondi.errors import ArrondiError as ArrondiError
    from arrondi.errors import DataError as DataError
    from arrondi.errors import FileFormatError as FileFormatError
    from arrondi.errors import OutputError as OutputError
    from arrondi.errors import SchemeError as SchemeError
    from arrondi.errors import ShapeError as ShapeError
    from arrondi.formats import FORMATS as FORMATS
    from arrondi.formats import PRESETS as PRESETS
    from arrondi.formats import ActivationScheme as ActivationScheme
    from arrondi.formats import Format as Format
    from arrondi.formats import LayerScheme as LayerScheme
    from arrondi.formats import PerBlock as PerBlock
    from arrondi.formats import PerChannel as PerChannel
    from arrondi.formats import PerGroup as PerGroup
    from arrondi.formats import PerTensor as PerTensor
    from arrondi.formats import PerToken as PerToken
    from arrondi.formats import Scheme as Scheme
    from arrondi.formats import codebook as codebook
    from arrondi.formats import get_format as get_format
    from arrondi.formats import parse_scheme as parse_scheme
    from arrondi.formats.kv import KV_KINDS as KV_KINDS
    from arrondi.formats.kv import CacheScheme as CacheScheme
    from arrondi.measure.limits import Limits as Limits
    from arrondi.pipeline import STEPS as STEPS
    from arrondi.pipeline import Recipe as Recipe
    from arrondi.pipeline import Rule as Rule
    from arrondi.pipeline import Step as Step
    from arrondi.rounding import METHODS as METHODS
    from arrondi.rounding.gptq import gptq as gptq
    from arrondi.rounding.hqq import hqq as hqq
    from arrondi.rounding.rtn import rtn as rtn
    from arrondi.runtime.kv import QuantizedCache as QuantizedCache
    from arrondi.runtime.kv import calibrate_cache as calibrate_cache
    from arrondi.runtime.kv import calibrate_clips as calibrate_clips
    from arrondi.runtime.kv import kv_cache as kv_cache
    from arrondi.sample import sample_path as sample_path
    from arrondi.tensor.nearest import fake_quantize as fake_quantize
    from arrondi.tensor.nearest import quantize_tensor as quantize_tensor
    from arrondi.tensor.packing import pack as pack
    from arrondi.tensor.packing import unpack as unpack
    from arrondi.tensor.qtensor import QTensor as QTensor
    from arrondi.training import TRAINING_METHODS as TRAINING_METHODS
    from arrondi.training import convert_to_lowbit_training as convert_to_lowbit_training
    from arrondi.training import follow_deviation as follow_deviation
    from arrondi.training import restore_training as restore_training
    from arrondi.training import training_report as training_report
    from arrondi.training.saved import compress_saved_activations as compress_saved_activations

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"arrondi.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name == "optim":
        return importlib.import_module("arrondi.optim")
    from arrondi.formats import FORMATS

    if name in FORMATS:  # arrondi.int4, arrondi.nf4, …
        return FORMATS[name]
    raise AttributeError(f"module 'arrondi' has no attribute {name!r}")


def __dir__() -> list[str]:
    from arrondi.formats import FORMATS

    return sorted([*__all__, *FORMATS])
