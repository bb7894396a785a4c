"""Architectures of GGUF that transformers has in another way, or not at all: their words, and how their rows lie.

Owns: the table `FAMILIES`. A family says under which keys the words of its config are, what its tensors tell of it, and what is done to rows on
their way into the model; whatever is said here is used for reading and for writing.

Source: the GGUF specification; llama.cpp's converters and loaders (MIT).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np

from arrondi.checkpoint.containers.gguf.header import Header

_SIZES: Final = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
}
_USUAL: Final = {
    **_SIZES, "feed_forward_length": "intermediate_size", "attention.head_count_kv": "num_key_value_heads", "rope.freq_base": "rope_theta",
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What is known of an architecture.

    Attributes:
        model_type: of transformers.
        words: key of the header → word of the config.
        told: words that the tensors of a file tell.
        more: keys that are computed of a config.
        processor: what becomes of a stored tensor, as transformers' own processors say it; None: nothing.
    """

    model_type: str
    words: Mapping[str, str]
    told: Callable[[Header], dict[str, Any]] = lambda header: {}
    more: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    processor: Callable[[Mapping[str, Any]], Any] | None = None

    def config(self, header: Header) -> dict[str, Any]:
        """The config that a header describes."""
        architecture = header.architecture
        found = {w: header.value(f"{architecture}.{k}") for k, w in self.words.items()}
        tokens = header.value("tokenizer.ggml.tokens") or ()
        size = header.value(f"{architecture}.vocab_size", len(tokens) or None)
        ids = {f"{t}_token_id": header.value(f"tokenizer.ggml.{k}_token_id") for t, k in _TOKENS.items()}
        said = {**found, **ids, "vocab_size": size, **self.told(header)}
        return {"model_type": self.model_type, **{w: v for w, v in said.items() if v is not None}}


_TOKENS: Final = {"bos": "bos", "eos": "eos", "pad": "padding"}


class _Tensor(NamedTuple):
    weights: np.ndarray


class _Falcon:
    """Queries, keys and values of one tensor: the model has them by groups of heads, a file all queries first."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.heads = int(config["num_attention_heads"])
        grouped = config.get("new_decoder_architecture") or not config.get("multi_query", True)
        self.groups = int(config.get("num_kv_heads") or self.heads) if grouped else 1

    def preprocess_name(self, name: str) -> str:
        return name

    def perform_fallback_tensor_mapping(self, *_: Any) -> None:
        """Every name is in the tables."""

    def process(self, weights: np.ndarray, name: str, **_: Any) -> _Tensor:
        if ".attn_qkv." not in name:
            return _Tensor(weights)
        each, rest = self.heads // self.groups, weights.shape[1:]
        size = weights.shape[0] // (self.heads + 2 * self.groups)
        queries, keys, values = np.split(weights, [self.heads * size, (self.heads + self.groups) * size])
        parts = [queries.reshape(self.groups, each, size, *rest)]
        parts += [p.reshape(self.groups, 1, size, *rest) for p in (keys, values)]
        return _Tensor(np.concatenate(parts, axis=1).reshape(weights.shape))


def _of_falcon(header: Header) -> dict[str, Any]:
    two = "blk.0.attn_norm_2.weight" in header.tensors
    heads, groups = (header.value(f"falcon.attention.head_count{end}") for end in ("", "_kv"))
    return {
        "new_decoder_architecture": two,
        "multi_query": two or groups == 1,
        "num_kv_heads": groups if two else heads,
        "num_ln_in_parallel_attn": 2 if two else None,
        "tie_word_embeddings": _shared(header)["tie_word_embeddings"],
    }


def _groups_of_falcon(config: Any) -> int:
    grouped = config.new_decoder_architecture or not config.multi_query
    return int(config.num_kv_heads if grouped else 1)


def _shared(header: Header) -> dict[str, Any]:
    return {"tie_word_embeddings": "output.weight" not in header.tensors}


FAMILIES: Final[Mapping[str, Family]] = MappingProxyType({
    "gemma": Family("gemma", {**_USUAL, "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps"}, _shared),
    "phi2": Family("phi", {**_USUAL, "attention.layer_norm_epsilon": "layer_norm_eps"}, _shared),
    "falcon": Family(
        "falcon", {**_SIZES, "feed_forward_length": "ffn_hidden_size", "rope.freq_base": "rope_theta", "attention.layer_norm_epsilon": "layer_norm_epsilon"},
        _of_falcon, {"attention.head_count_kv": _groups_of_falcon}, _Falcon,
    ),
})  # fmt: skip
"""Architecture, as GGUF calls it → what is known of it."""
