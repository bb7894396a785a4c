"""Arrondi: quantize a trained neural network, measure what it cost, run it in few bits.

Names are imported when they are first used, so that `import arrondi` and `arrondi --help` answer at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any, Final

if "torch" not in sys.modules:
    # OpenMP's threads wait for PyTorch's next operator by spinning, on cores that the kernels or a neighbour need: measured
    # on two cores with one busy neighbour, a prompt takes eight times as long. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

_HOME: Final = {
    "ActivationScheme": "formats", "FORMATS": "formats", "PRESETS": "formats", "Format": "formats", "LayerScheme": "formats", "PerBlock": "formats",
    "PerChannel": "formats", "PerGroup": "formats", "PerTensor": "formats", "PerToken": "formats", "Scheme": "formats",
    "codebook": "formats", "get_format": "formats", "parse_scheme": "formats",
    "QTensor": "tensor.qtensor", "dequantize": "tensor.qtensor", "fake_quantize": "tensor.qtensor", "quantize_tensor": "tensor.qtensor",
    "pack": "tensor.packing", "unpack": "tensor.packing",
    "METHODS": "rounding", "gptq": "rounding", "hqq": "rounding", "rtn": "rounding",
    "SecondMoment": "calibration",
    "Recipe": "pipeline", "TextOptions": "pipeline", "dequantize_model": "pipeline", "inspect_model": "pipeline",
    "quantize_model": "pipeline", "load": "runtime.load", "compare_models": "evaluate.compare",
    "ArrondiError": "errors", "DataError": "errors", "FileFormatError": "errors", "OutputError": "errors",
    "SchemeError": "errors", "ShapeError": "errors",
    "sample_path": "sample",
}  # fmt: skip
"""Public name → the module that owns it."""

_RENAMED: Final = {"load": "load_model"}

if TYPE_CHECKING:
    from arrondi.calibration import SecondMoment as SecondMoment
    from arrondi.errors import ArrondiError as ArrondiError
    from arrondi.errors import DataError as DataError
    from arrondi.errors import FileFormatError as FileFormatError
    from arrondi.errors import OutputError as OutputError
    from arrondi.errors import SchemeError as SchemeError
    from arrondi.errors import ShapeError as ShapeError
    from arrondi.evaluate.compare import compare_models as compare_models
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
    from arrondi.pipeline import Recipe as Recipe
    from arrondi.pipeline import TextOptions as TextOptions
    from arrondi.pipeline import dequantize_model as dequantize_model
    from arrondi.pipeline import inspect_model as inspect_model
    from arrondi.pipeline import quantize_model as quantize_model
    from arrondi.rounding import METHODS as METHODS
    from arrondi.rounding.gptq import gptq as gptq
    from arrondi.rounding.hqq import hqq as hqq
    from arrondi.rounding.rtn import rtn as rtn
    from arrondi.runtime.load import load_model as load
    from arrondi.sample import sample_path as sample_path
    from arrondi.tensor.packing import pack as pack
    from arrondi.tensor.packing import unpack as unpack
    from arrondi.tensor.qtensor import QTensor as QTensor
    from arrondi.tensor.qtensor import dequantize as dequantize
    from arrondi.tensor.qtensor import fake_quantize as fake_quantize
    from arrondi.tensor.qtensor import quantize_tensor as quantize_tensor

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"arrondi.{_HOME[name]}"), _RENAMED.get(name, name))
        globals()[name] = value
        return value
    from arrondi.formats import FORMATS

    if name in FORMATS:  # arrondi.int4, arrondi.nf4, …
        return FORMATS[name]
    raise AttributeError(f"module 'arrondi' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
