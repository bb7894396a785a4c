"""Speed of a whole model in llama.cpp, as llama-bench measures it: reading a prompt, and decoding token by token.

Owns: one model loaded through llama-cpp-python's C functions, on the CPU.  Tokens are random: nothing is sampled and
no tokenizer is needed. The prompt is decoded as one batch into an empty cache; decoding then goes on behind it, one
token a call, and asks for the logits of each. One untimed round of both comes first; medians over the rounds, and over
all the decoded tokens. `repack` tells whether llama.cpp may put weights in another order for this CPU, its default.

    VENV/bin/pip install llama-cpp-python==0.3.36 numpy
    VENV/bin/python llamacpp_tokens.py FILE.gguf ... [--prompt 512] [--decode 64] [--threads 2] [--json out.json]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from pathlib import Path

import common
import llama_cpp
import numpy as np


class Session:
    """A model and a context on the CPU with so many threads."""

    def __init__(self, file: Path, room: int, batch: int, threads: int, repack: bool) -> None:
        self.clock = time.perf_counter
        loading = llama_cpp.llama_model_default_params()
        loading.n_gpu_layers, loading.use_extra_bufts = 0, repack
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), loading)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = room, batch, batch
        settings.n_threads = settings.n_threads_batch = threads
        self.context = self.model and llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not load {file}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def forget(self) -> None:
        """Empty the cache."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def seconds(self, tokens: np.ndarray) -> float:
        """Decode these tokens, int32, as one batch behind what is in the cache; wall seconds."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens.tolist())
        start = self.clock()
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError(f"llama.cpp could not decode {len(tokens)} tokens")
        llama_cpp.llama_synchronize(self.context)
        return self.clock() - start

    def close(self) -> None:
        """Free both."""
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


def measure(
    file: Path, prompt: int, decode: int, threads: int, rounds: int, repack: bool, cpu_time: bool = False
) -> dict[str, object]:
    """Medians of one model, and the best round and token."""
    start = time.perf_counter()
    session = Session(file, prompt + decode, prompt, threads, repack)
    loading = time.perf_counter() - start
    if cpu_time:
        session.clock = time.process_time
    ids = np.random.default_rng(0).integers(0, session.vocab, prompt + decode, np.int32)
    prompts: list[float] = []
    steps: list[float] = []
    for turn in range(rounds + 1):
        session.forget()
        read = session.seconds(ids[:prompt])
        said = [session.seconds(ids[at : at + 1]) for at in range(prompt, prompt + decode)]
        if turn:
            prompts.append(read)
            steps += said
    session.close()
    return {
        "peer": "llama.cpp",
        "model": file.parent.name,
        "case": file.stem + (" repack" if repack else ""),
        "threads": threads,
        "gbytes": round(file.stat().st_size / 1e9, 4),
        "load_s": round(loading, 3),
        "prompt_tokens": prompt,
        "prompt_tokens_per_s": round(prompt / statistics.median(prompts), 2),
        "best_prompt_tokens_per_s": round(prompt / min(prompts), 2),
        "decoded_tokens": decode,
        "decode_ms": round(statistics.median(steps) * 1e3, 3),
        "best_decode_ms": round(min(steps) * 1e3, 3),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Speed of a whole model in llama.cpp.")
    parser.add_argument("files", type=Path, nargs="+", help="GGUF files")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="timed after one that is not (3)")
    parser.add_argument("--plain", action="store_true", help="also without repacked weights")
    parser.add_argument(
        "--unpacked",
        action="store_true",
        help="only without repacked weights, whose AMX forms some virtual machines refuse",
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time of one thread, where others use the machine"
    )
    parser.add_argument("--json", type=Path, help="write the list of results here")
    options = parser.parse_args(arguments)
    common.bind_threads()

    @llama_cpp.llama_log_callback
    def silent(level: int, text: bytes, data: int) -> None:
        """Drop what llama.cpp logs."""

    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    results = []
    for file in options.files:
        for repack in (False,) if options.unpacked else (True, False) if options.plain else (True,):
            result = measure(
                file, options.prompt, options.decode, options.threads, options.rounds, repack, options.cpu_time
            )
            results.append(result)
            print(json.dumps(result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
