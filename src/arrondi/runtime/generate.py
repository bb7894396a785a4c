"""Continue a prompt with a model directory: `generate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, TextIO

import torch

from arrondi.checkpoint import Checkpoint
from arrondi.errors import DataError, SchemeError
from arrondi.measure.data import check_vocabulary
from arrondi.measure.text import load_tokenizer, special_tokens
from arrondi.model import stored_in_16_bits
from arrondi.native import multiplies_bfloat16
from arrondi.runtime.decoding import check_cache, refuse_decoding, tokens
from arrondi.runtime.fuse import is_fused
from arrondi.runtime.generation_config import end_tokens
from arrondi.runtime.kv.cache import stored_kind
from arrondi.runtime.load import load


def generate(
    path: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 60,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str = "auto",
    activations: str | None = None,
    kv: str | None = None,
    device: str = "cpu",
    stream: TextIO | None = None,
) -> dict[str, Any]:
    """Generate text.

    Args:
        path: model directory, quantized or plain.
        prompt: text to continue; its special start token is added.
        max_new_tokens: tokens at most.
        temperature: 0 takes the likeliest token; above, tokens are sampled from the tempered distribution with `seed`.
        dtype: type of activations; "auto" is bfloat16 where the checkpoint has no more digits and the CPU or our own kernels
            compute all of its products in it, else float32.
        activations: see `load`.
        kv: what keys and values become: int8, int4, kivi2, … (`arrondi.KV_KINDS`), "none"; None: what the
            model was quantized for.
        device: where the model runs: cpu, cuda or cuda:0.
        stream: prompt and words are printed there as they come.

    Returns:
        text (prompt included), tokens, seconds, tokens_per_second over all of it, prompt_tokens_per_second up to the first
        new token, decode_ms_per_token of those after it.

    Raises:
        SchemeError: the model does not generate text, or `load` refuses dtype or activations.
        FileFormatError: not a model directory, or its generation_config.json is none.
        DataError: the prompt leaves no room in the model's context, or has tokens that the model does not know.
    """
    checkpoint = Checkpoint.open(path)
    tokenizer = load_tokenizer(checkpoint.folder.home)
    if dtype == "auto":
        model = load_fast(checkpoint, activations, device)
    else:
        model = load(path, dtype=dtype, activations=activations, device=device)
    reason = refuse_decoding(model)
    if reason:
        raise SchemeError(f"{path}: {reason}")
    stop = end_tokens(model, tokenizer)
    ids = special_tokens(tokenizer)[0] + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise DataError("The prompt is empty and the tokenizer has no start token. Give a prompt.")
    check_vocabulary(max(ids), "The prompt", model)
    kv = stored_kind(model) if kv is None else kv
    if kv is not None:
        check_cache(model, kv, ids[0])
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    room = (context or len(ids) + max_new_tokens) - len(ids)
    if room < 1:
        raise DataError(f"The prompt takes {len(ids)} tokens and the model's context ends there. Shorten the prompt.")
    streamer = _Streamer(tokenizer, stream) if stream is not None else None
    if streamer is not None:
        streamer.put(ids)
    new: list[int] = []
    started = time.monotonic()
    first = started
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for token in tokens(model, ids, min(max_new_tokens, room), temperature=temperature, stop=stop, kv=kv):
            if not new:
                first = time.monotonic()
            new.append(token)
            if streamer is not None:
                streamer.put([token])
    seconds, decoding = time.monotonic() - started, time.monotonic() - first
    if streamer is not None:
        streamer.end()
    return {
        "text": tokenizer.decode([*ids, *new], skip_special_tokens=True),
        "tokens": len(new),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(len(new) / max(seconds, 1e-9), 2),
        "prompt_tokens_per_second": round(len(ids) / max(first - started, 1e-9), 2),
        "decode_ms_per_token": round(decoding * 1e3 / (len(new) - 1), 2) if len(new) > 1 else None,
    }


def load_fast(checkpoint: Checkpoint, activations: str | None, device: str = "cpu") -> Any:
    """The model in bfloat16 where that pays: our products of it are fast on every CPU and GPU, PyTorch's only on some CPUs."""
    path = checkpoint.folder.path
    if stored_in_16_bits(checkpoint):
        model = load(path, dtype="bfloat16", activations=activations, device=device)
        if device != "cpu" or multiplies_bfloat16() or is_fused(model):
            return model
    return load(path, dtype="float32", activations=activations, device=device)


class _Streamer:
    """Prints text as far as it can no longer change: the pieces of one character come in several tokens."""

    def __init__(self, tokenizer: Any, out: TextIO) -> None:
        self.tokenizer, self.out = tokenizer, out
        self.ids: list[int] = []
        self.printed = 0

    def put(self, ids: list[int]) -> None:
        self.ids += ids
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            self._print(text)

    def end(self) -> None:
        self._print(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        self.out.write("\n")
        self.out.flush()

    def _print(self, text: str) -> None:
        self.out.write(text[self.printed :])
        self.out.flush()
        self.printed = len(text)
