"""A transformers config as the keys of a GGUF header.

Owns: `architecture_of`, `text_of` and `fields_of_config`. The words are those by which transformers reads GGUF files, backwards; what it does not
read and runtimes need is in a table here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from arrondi.checkpoint.containers.gguf.families import FAMILIES
from arrondi.checkpoint.containers.gguf.header import Field
from arrondi.checkpoint.containers.gguf.rope import attention_factor
from arrondi.errors import SchemeError

_UINT32, _FLOAT32, _BOOL, _STRING = 4, 6, 7, 8

_CALLED: Final[Mapping[str, str]] = MappingProxyType({
    "mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "qwen2_5_vl": "qwen2vl", **{f.model_type: name for name, f in FAMILIES.items()},
})  # fmt: skip
"""model_type → architecture in GGUF, where they are not spelled alike."""

_WORDS: Final[Mapping[str, str]] = MappingProxyType({"mixtral": "mistral"})
"""model_type → whose words of transformers' table serve it as well."""

_Get = Callable[[Any], Any]


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: Any, key: str) -> Any:
    """Of positions; where layers have two kinds of them, of those that see everything."""
    found = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention", found).get(key)


def _window(config: Any) -> Any:
    return (
        config.sliding_window
        if getattr(config, "use_sliding_window", True) and hasattr(config, "sliding_window")
        else None
    )


def _scaled(config: Any, key: str) -> Any:
    return _rope(config, key) if _rope(config, "rope_type") in ("linear", "yarn") else None


def _original(config: Any) -> Any:
    return (
        _rope(config, "original_max_position_embeddings")
        if _rope(config, "rope_type") in ("yarn", "longrope")
        else None
    )


def _key_length(config: Any) -> Any:
    return getattr(config, "head_dim", None)


_MORE: Final[Mapping[str, _Get]] = MappingProxyType({
    "context_length": lambda c: getattr(c, "max_position_embeddings", None),
    "feed_forward_length": lambda c: getattr(c, "intermediate_size", None) or getattr(c, "n_inner", None) or 4 * c.hidden_size,
    "attention.head_count_kv": lambda c: getattr(c, "num_key_value_heads", None),
    "attention.key_length": _key_length,
    "attention.value_length": _key_length,
    "attention.sliding_window": _window,
    "attention.layer_norm_epsilon": lambda c: getattr(c, "layer_norm_epsilon", None) or getattr(c, "layer_norm_eps", None) or getattr(c, "norm_eps", None),
    "rope.dimension_count": lambda c: int(_head_dim(c) * (_rope(c, "partial_rotary_factor") or 1)) if _rope(c, "rope_theta") else None,
    "rope.freq_base": lambda c: _rope(c, "rope_theta"),
    "rope.scaling.type": lambda c: _scaled(c, "rope_type"),
    "rope.scaling.factor": lambda c: _scaled(c, "factor"),
    "rope.scaling.original_context_length": _original,
    "rope.scaling.attn_factor": attention_factor,
    "expert_count": lambda c: getattr(c, "num_local_experts", None) or getattr(c, "num_experts", None),
    "expert_used_count": lambda c: getattr(c, "num_experts_per_tok", None),
    "expert_feed_forward_length": lambda c: getattr(c, "moe_intermediate_size", None),
    "expert_shared_feed_forward_length": lambda c: getattr(c, "shared_expert_intermediate_size", None),
    "attn_logit_softcapping": lambda c: getattr(c, "attn_logit_softcapping", None),
    "final_logit_softcapping": lambda c: getattr(c, "final_logit_softcapping", None),
    "vocab_size": lambda c: c.vocab_size,
})  # fmt: skip
"""Key of an architecture → its value in a config; None: it has none."""

_UNSIGNED: Final = re.compile(r".*(_count|_count_kv|_length|\.sliding_window|vocab_size|dimension_count)$")


def text_of(config: Any) -> Any:
    """The config of what reads and writes text, of a model that sees or hears as well."""
    return getattr(config, "text_config", None) or config


def architecture_of(config: Any) -> str:
    """The architecture's name in GGUF.

    Args:
        config: of transformers.

    Raises:
        SchemeError: GGUF has no such architecture.
    """
    from gguf import MODEL_ARCH_NAMES

    kinds = dict.fromkeys((config.model_type, text_of(config).model_type))
    wanted = [_plain(_CALLED.get(kind, kind)) for kind in kinds]
    found = next((n for w in wanted for n in MODEL_ARCH_NAMES.values() if _plain(n) == w), None)
    if found is None:
        raise SchemeError(
            f"GGUF has no architecture for model_type {config.model_type!r}. Give a GGUF file of this model: --template F16.gguf."
        )
    return found


def fields_of_config(config: Any, name: str) -> dict[str, Field]:
    """The keys that describe a model.

    Args:
        config: of transformers.
        name: what the model is called.

    Raises:
        SchemeError: an architecture whose config transformers does not read of GGUF, or positions that GGUF has no word for.
    """
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    architecture, config = architecture_of(config), text_of(config)
    kind = config.model_type
    family = FAMILIES.get(architecture)
    words = (
        family.words
        if family
        else next(
            (GGUF_CONFIG_MAPPING[k] for k in (kind, _WORDS.get(kind), architecture) if k in GGUF_CONFIG_MAPPING), None
        )
    )
    if words is None:
        raise SchemeError(
            f"How GGUF describes a model of the type {kind!r} is not known here. Give a GGUF file of this model: --template F16.gguf."
        )
    rope = _rope(config, "rope_type")
    if rope not in (None, "default", "linear", "yarn", "llama3", "longrope"):
        raise SchemeError(
            f"Positions are scaled by {rope!r}, which is not written here. Give a GGUF file of this model: --template F16.gguf."
        )
    values = {key: getattr(config, own, None) for key, own in words.items() if own is not None}
    more = {**_MORE, **(family.more if family else {})}
    values |= {key: found for key, get in more.items() if (found := get(config)) is not None}
    fields = {
        "general.architecture": Field(_STRING, None, architecture),
        "general.type": Field(_STRING, None, "model"),
        "general.name": Field(_STRING, None, name),
    }
    for key, value in values.items():
        if value is not None:
            fields[f"{architecture}.{key}"] = _field(key, value)
    return fields


def _field(key: str, value: Any) -> Field:
    if isinstance(value, bool):
        return Field(_BOOL, None, value)
    if isinstance(value, str):
        return Field(_STRING, None, value)
    return Field(_UINT32, None, int(value)) if _UNSIGNED.fullmatch(key) else Field(_FLOAT32, None, float(value))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
