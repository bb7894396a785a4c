"""GPTQ or AWQ by llm-compressor, timed: the peer our own speed, layer losses and quality are set beside.

Owns: one run of `oneshot` with a GPTQ modifier of scheme W4A16 (groups of 128, symmetric) and its defaults, or with its AWQ
modifier before plain rounding, the head left alone, on the same windows as `yardstick.py`.  Runs in llm-compressor's own virtual environment, without the
library under test:

    python -m venv VENV
    VENV/bin/pip install torch==2.13.0                                  # first, so that a CPU build is taken
    VENV/bin/pip install "llmcompressor>=0.14,<0.15" torch==2.13.0
    VENV/bin/python benchmarks/peers/llmcompressor_gptq.py MODEL TEXT OUT [--samples 32] [--seq-len 256] [--threads 1]

Prints one JSON line (llm-compressor's own log goes to standard error). Imports, loading, quantization and saving are
timed apart: wall seconds, and CPU seconds (user + system) of this process. Peak resident memory is of the process up
to the end of quantization; what loading alone took is beside it.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

seconds: dict[str, dict[str, float]] = {}


@contextmanager
def timed(part: str) -> Iterator[None]:
    """Note the wall and CPU seconds of one part of the run in `seconds`."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    yield
    seconds[part] = {"wall_s": round(time.perf_counter() - wall, 3), "cpu_s": round(cpu_seconds() - cpu, 3)}


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_mb() -> float:
    """Peak resident memory of this process so far; `ru_maxrss` counts KiB on Linux and bytes on macOS."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="GPTQ or AWQ by llm-compressor, timed.")
    parser.add_argument("model", type=Path, help="checkpoint with its tokenizer")
    parser.add_argument("text", type=Path, help="calibration text")
    parser.add_argument("out", type=Path, help="directory for the compressed checkpoint")
    parser.add_argument("--method", choices=["gptq", "awq"], default="gptq")
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in a window, BOS included")
    parser.add_argument("--batch-size", type=int, default=1, help="windows per forward pass")
    parser.add_argument("--no-bos", action="store_true", help="windows of text tokens only")
    parser.add_argument("--dtype", default="auto", help="load the weights as this (auto: as stored)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)

    with redirect_stdout(sys.stderr):  # before the imports: the logger keeps the stream it finds then
        result = run(options)
    print(json.dumps(result))


def run(options: argparse.Namespace) -> dict[str, object]:
    """Load, quantize and save; the timings and what they were taken with."""
    with timed("imports"):
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for yardstick, the owner of the windows
        import compressed_tensors
        import llmcompressor
        import torch
        import transformers
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier

        from yardstick import token_windows

    torch.set_num_threads(options.threads)
    if not torch.accelerator.is_available():  # its AWQ pins memory, for which torch wants an accelerator
        torch.Tensor.pin_memory = lambda self, *_: self
    with timed("load"):
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
        windows = token_windows(
            options.model, options.text, options.samples, length=options.seq_len, bos=not options.no_bos
        )
        rows = windows.tolist()
        dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    common: dict[str, object] = {"targets": "Linear", "scheme": options.scheme, "ignore": ["lm_head"]}
    gptq = options.method == "gptq"
    recipe = [GPTQModifier(**common)] if gptq else [AWQModifier(), QuantizationModifier(**common)]
    loaded_mb = peak_mb()
    with timed("quantize"):
        oneshot(
            model=model,
            dataset=dataset,
            recipe=recipe,
            max_seq_length=options.seq_len,
            num_calibration_samples=options.samples,
            shuffle_calibration_samples=False,
            batch_size=options.batch_size,
        )
    quantized_mb = peak_mb()
    with timed("save"):
        model.save_pretrained(options.out, save_compressed=True)
        transformers.AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)

    return {
        **seconds["quantize"],
        "peak_rss_mb": quantized_mb,
        "peak_rss_after_load_mb": loaded_mb,
        **{part: seconds[part] for part in ("imports", "load", "save")},
        "method": options.method,
        "scheme": options.scheme,
        "samples": options.samples,
        "seq_len": options.seq_len,
        "bos": not options.no_bos,
        "batch_size": options.batch_size,
        "weights": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": {m.__name__: m.__version__ for m in (llmcompressor, compressed_tensors, transformers, torch)},
    }


if __name__ == "__main__":
    main()
