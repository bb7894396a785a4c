"""The tables of low-bit training.

Owns: `PRODUCTS`, methods that multiply in few bits forward and backward, and `TRAINING_METHODS`, those and the ones of `latent`,
whose weights have one or two bits. To add one: its file, a line here, its test; the tests of all methods run over the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from arrondi.training.hlq import HLQ
from arrondi.training.int4 import INT4, LSQ_ONLY, LUQ
from arrondi.training.int8 import INT8, INT8_ADAPTIVE, INT8_UNIFIED
from arrondi.training.latent import LATENT, Latent
from arrondi.training.lightseq import LIGHTSEQ
from arrondi.training.method import TrainingMethod
from arrondi.training.small_floats import FP8, MXFP4

PRODUCTS: Final[Mapping[str, TrainingMethod]] = MappingProxyType(
    {m.name: m for m in (INT8, INT8_UNIFIED, INT8_ADAPTIVE, LIGHTSEQ, INT4, LUQ, LSQ_ONLY, HLQ, MXFP4, FP8)}
)
"""Methods whose products run in few bits, by name."""

TRAINING_METHODS: Final[Mapping[str, TrainingMethod | Latent]] = MappingProxyType({**PRODUCTS, **LATENT})
"""Every method of `convert_to_lowbit_training`, by name, each with its `source`."""
