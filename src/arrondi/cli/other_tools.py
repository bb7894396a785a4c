"""What the options of other tools are called here: data for the sentences of `arrondi.cli.hints`.

Owns: `meaning_of`. An advice names an option only where the command has it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple


class Advice(NamedTuple):
    """What to write instead, and the option that the command needs for it ("" if none)."""

    sentence: str
    option: str = ""


_ADVICE: Final[Mapping[str, Advice]] = MappingProxyType({
    "bits": Advice("The scheme says the bits: --scheme W4A16 is 4 bits for weights, --scheme w=int3/g64 is 3 in groups of 64.", "--scheme"),
    "quantization": Advice("What weights become is --scheme, such as W4A16.", "--scheme"),
    "method": Advice("How codes are chosen is --method: rtn, hqq or gptq.", "--method"),
    "output": Advice("The output is named with -o DIR.", "--output"),
    "gguf": Advice("No GGUF files are written yet. `arrondi plan` says what is written and who reads it."),
    "texts": Advice("Calibration text is a file: --calibration FILE.", "--calibration"),
    "imatrix": Advice("The inputs are looked at with --method gptq --calibration FILE.", "--calibration"),
    "samples": Advice("Windows of text are --samples N.", "--samples"),
    "length": Advice("Tokens in a window are --seq-len N.", "--seq-len"),
    "model": Advice("The model is an argument without an option: arrondi COMMAND MODEL."),
    "prompt": Advice('The prompt is an argument without an option: arrondi run MODEL "Once upon a time".', "--max-new-tokens"),
    "new tokens": Advice("Tokens to generate are --max-new-tokens N.", "--max-new-tokens"),
    "sampling": Advice("Sampling has --temperature and --seed alone.", "--temperature"),
    "symmetry": Advice("The scheme says it: --scheme W4A16 is symmetric, W4A16_ASYM is not.", "--scheme"),
    "order": Advice("Act-order is --option order=static (or none).", "--option"),
    "damping": Advice("Damping is --option damping=0.01 with --method gptq.", "--option"),
    "dtype": Advice("This command has no --dtype: `dequantize` and `run` do."),
    "torch dtype": Advice("The type is --dtype.", "--dtype"),
    "gpu": Advice("A GPU is named with --device cuda:0.", "--device"),
    "threads": Advice("Threads are set in the environment: OMP_NUM_THREADS=2."),
    "batch": Advice("The number of windows in a batch is chosen by itself."),
    "ignore": Advice("What stays as it is, is named with --ignore, once for each selector.", "--ignore"),
    "targets": Advice("What is quantized is named with --targets, once for each selector.", "--targets"),
    "cache": Advice("Keys and values are rounded with --kv int8, int4 or kivi2.", "--kv"),
    "overwrite": Advice("A finished output is replaced with --overwrite.", "--overwrite"),
    "resume": Advice("No option is needed: the same command continues where it stopped."),
    "code": Advice("Code that comes with a model is not run here. Use a model that transformers itself knows."),
    "revision": Advice("A Hub name is read at its main revision. Download another one and give its directory."),
    "layout": Advice("The layout of the files is --to compressed-tensors, gptq, awq, bitsandbytes, …", "--to"),
    "recipe": Advice("Rules are read from a file with --recipe FILE.", "--recipe"),
})  # fmt: skip

_NAMES: Final[Mapping[str, str]] = MappingProxyType({
    "bits": "bits wbits w-bits weight-bits num-bits bit nbits b w",
    "quantization": "quant quantization quantize qtype quant-type load-in-4bit load-in-8bit precision weights-dtype q",
    "method": "algo algorithm quant-method quantization-method quant-algo",
    "output": "out output-dir out-dir save-dir save output-path outfile out-file output-file export-dir save-path",
    "gguf": "gguf outtype ftype",
    "texts": "dataset data calib calibration-data calib-data calibration-dataset calib-dataset calibration-file calib-file",
    "imatrix": "imatrix",
    "samples": "nsamples num-samples n-samples num-calibration-samples calib-samples num-calib n-calib calib-size limit",
    "length": "max-length max-seq-length max-seq-len seqlen seq-length sequence-length ctx-size context-length max-sequence-length",
    "model": "model model-path model-id model-name pretrained m",
    "prompt": "prompt p",
    "new tokens": "max-tokens n-predict n num-tokens tokens max-length-new",
    "sampling": "top-p top-k min-p do-sample temp",
    "symmetry": "sym asym symmetric no-symmetric asymmetric zero-point no-zero-point",
    "order": "desc-act act-order actorder",
    "damping": "damp damping damp-percent percdamp",
    "dtype": "dtype",
    "torch dtype": "torch-dtype",
    "gpu": "gpu cuda n-gpu-layers ngl gpus",
    "threads": "threads t num-threads n-threads jobs j",
    "batch": "batch-size bs batch",
    "ignore": "exclude exclude-layers skip skip-layers modules-to-not-convert ignore-layers ignored-layers exclude-modules",
    "targets": "include layers modules target target-modules",
    "cache": "kv-bits kv-cache-dtype kv-cache cache-type-k cache-type-v ctk ctv kv-cache-quantization",
    "overwrite": "force f yes y overwrite-output-dir",
    "resume": "resume resume-from continue",
    "code": "trust-remote-code",
    "revision": "revision branch",
    "layout": "layout format export save-format packing",
    "recipe": "config rules scheme-file",
})  # fmt: skip
"""Meaning → the names that options with it have elsewhere, without their dashes."""

_MEANINGS: Final = {name: meaning for meaning, names in _NAMES.items() for name in names.split()}


def meaning_of(option: str, known: Collection[str]) -> str | None:
    """What to write instead of an option of another tool, for a command that has the options `known`.

    >>> meaning_of("--w_bits", ["--scheme"])
    'The scheme says the bits: --scheme W4A16 is 4 bits for weights, --scheme w=int3/g64 is 3 in groups of 64.'
    """
    advice = _ADVICE.get(_MEANINGS.get(option.lower().replace("_", "-").lstrip("-"), ""))
    return None if advice is None or (advice.option and advice.option not in known) else advice.sentence
