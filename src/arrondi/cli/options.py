"""The types of the options that several commands share, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(help="Model directory (config.json, safetensors files), or a name on the Hub.", show_default=False),
]
Out = Annotated[Path, typer.Option("--output", "-o", help="Directory to write; new or empty.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, messages on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
SchemeName = Annotated[
    str | None,
    typer.Option(
        help="Preset (W4A16, W8A8, NF4, MXFP4A16, …) or grammar (w=int3/g64/asym).", show_default="W4A16"
    ),
]  # fmt: skip
MethodName = Annotated[
    str | None,
    typer.Option(help="How codes are chosen; `arrondi methods` lists all.", show_default="rtn; of a trellis its own"),
]
PresetName = Annotated[
    str | None,
    typer.Option("--preset", help="What is done, instead of --method: best, q8bert or zeroquant.", show_default=False),
]
Rewrites = Annotated[
    list[str] | None,
    typer.Option("--rewrite", help="What is done to the model before, its function unchanged: NAME,NAME. Repeatable."),
]
Repairs = Annotated[
    list[str] | None, typer.Option("--repair", help="What makes up for the rounding afterwards: NAME,NAME. Repeatable.")
]
GroupSize = Annotated[
    int | None, typer.Option(help="Weights that share a scale; -1: a whole row. Default: the scheme's.")
]
Targets = Annotated[
    list[str] | None, typer.Option(help="Modules to quantize: class, exact name or re:PATTERN. Repeatable.")
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(help="Modules to leave alone, same selectors; '' for none. Default: the output head."),
]
Embeddings = Annotated[
    str | None,
    typer.Option(
        "--embeddings",
        help="What the table of words becomes: int8/row, int4/g64; a head tied to it too.",
        show_default="as it is",
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        help="Option of the method as NAME=VALUE, e.g. damping=0.02; of another step as STEP.NAME=VALUE. Repeatable.",
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", help="JSON file of rules, instead of scheme, method, targets, ignore and their options."),
]
LayoutName = Annotated[
    str | None,
    typer.Option(
        "--to",
        help="Layout of the files: compressed-tensors, arrondi, gptq, awq, bitsandbytes, gguf, onnx, … Default: the most widely read that fits.",
    ),
]
KeepMisfits = Annotated[bool, typer.Option("--keep-misfits", help="Leave layers whose shape does not fit as they are.")]
Calibration = Annotated[
    Path | None, typer.Option(help="UTF-8 text to calibrate on; .jsonl, .json and .parquet are read as documents.")
]
NetworkData = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="For ONNX files: samples to measure on, an .npz file with inputs and labels, or a folder of images.",
        show_default=False,
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="For ONNX files: choose the bits of every layer: 4bpw on average, 200KB, 2.5GBOP (bit operations of one sample), or 1.5ms: its time here, some layers in float.",
        show_default=False,
    ),
]
BudgetBy = Annotated[
    str,
    typer.Option(
        "--budget-by",
        help="For ONNX files: what a width costs a layer: loss (of the whole network) or nuclear (norm of the layer's outputs, faster).",
    ),
]
ObserverName = Annotated[
    str, typer.Option("--observer", help="For ONNX files: how ranges are found: min-max, percentile, mse, kl, …")
]
Ends = Annotated[
    str,
    typer.Option(
        "--ends",
        help="For ONNX files: bits of the first and last layers where weights have at most four: 8, or same as all others.",
    ),
]
Faint = Annotated[
    str,
    typer.Option(
        "--faint",
        help="For ONNX files: bits of values whose quiet samples eight bits drown: 16, or same as all others.",
    ),
]
Int32Bias = Annotated[
    bool,
    typer.Option(
        "--int32-bias", help="For ONNX files: write biases as int32 codes of the scale of input times weight."
    ),
]
Rounded = Annotated[
    str | None,
    typer.Option(
        "--rounded",
        help="For ONNX files: round what products read (products), or what sums read too (all); by itself products where attention has under 8 bits.",
    ),
]
Grids = Annotated[
    str | None,
    typer.Option(
        "--grids",
        help="For ONNX files: softmax=twin or softmax=log2, gelu=twin, with a comma between: grids that are not uniform.",
    ),
]
Mean = Annotated[str | None, typer.Option("--mean", help="For folders of images: means of the channels, with commas.")]
Std = Annotated[
    str | None, typer.Option("--std", help="For folders of images: deviations of the channels, with commas.")
]
Column = Annotated[
    str | None,
    typer.Option(help="Field of .jsonl, .json or .parquet that holds text or messages. Default: text, else messages."),
]
Samples = Annotated[int, typer.Option(help="Windows of calibration text.", min=1)]
SeqLen = Annotated[int, typer.Option(help="Tokens in a window; cut, and said, where the model takes fewer.", min=2)]
EvalText = Annotated[
    Path | None, typer.Option(help="Text to measure on. Default: the last tenth of the calibration text, held back.")
]
CalibrationImages = Annotated[
    Path | None,
    typer.Option(
        help="Directory of images to calibrate a vision-language model on, by its own processor; vision parts are then quantized, too."
    ),
]
AllExperts = Annotated[
    bool, typer.Option("--all-experts", help="Calibrate experts that few tokens reach on all tokens of their block.")
]
Imatrix = Annotated[
    Path | None,
    typer.Option(help="Importance matrix of this model (llama.cpp's .gguf or .dat), for methods that take one."),
]
Activations = Annotated[
    str | None,
    typer.Option(
        help="Round the inputs of weight-only linears too, for speed: int8/g128, int8/token. Those of fused experts stay."
    ),
]
KV = Annotated[
    str | None,
    typer.Option(
        "--kv",
        help="Round keys and values of the text: int8, int4, int4-rotated, kivi4, kivi-k4v2, kivi2, and int8-static, pca3, pca2 of models quantized for them; for some layers another: 'kivi2;0-1=int8'; none.",
        show_default="what the model was quantized for",
    ),
]
Consumers = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        help="Programs to open it in: transformers, llama.cpp, onnxruntime, openvino, with commas. Repeatable.",
        show_default="all that are installed and read it",
    ),
]
Pythons = Annotated[
    list[str] | None,
    typer.Option(
        "--python",
        help="Interpreter that has a program to verify with: CONSUMER=PATH. Repeatable; or ARRONDI_LLAMA_CPP=PATH, … in the environment.",
        show_default="this one",
    ),
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Open the output in the programs that it is for; see `arrondi verify`.")
]
Seed = Annotated[int, typer.Option(help="Chooses the calibration windows.", min=0, max=2**63 - 1)]
Device = Annotated[str, typer.Option(help="Where the model is run: cpu, cuda or cuda:0.")]
MaxKl = Annotated[
    float | None,
    typer.Option(help="Exit with status 3 if the mean KL divergence, upper end of its 95 % interval, is larger."),
]
MaxPpl = Annotated[
    float | None,
    typer.Option(
        help="Exit with status 3 if perplexity rises by more than this fraction (0.05: 5 %); the upper end of the 95 % interval counts."
    ),
]
