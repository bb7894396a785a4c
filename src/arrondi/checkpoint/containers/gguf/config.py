"""The config of a GGUF file: transformers' own reading of its header, with what that leaves out.

Owns: `config_of`, and `unsaid`, what a file leaves out of a config that it should describe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from arrondi.checkpoint.containers.config import QUANTIZATION
from arrondi.checkpoint.containers.descriptors import reraise_exhaustion
from arrondi.checkpoint.containers.gguf.families import FAMILIES
from arrondi.checkpoint.containers.gguf.header import Header
from arrondi.checkpoint.containers.gguf.rope import rope_of
from arrondi.checkpoint.containers.gguf.stand_in import readable
from arrondi.errors import ArrondiError, FileFormatError

_MORE: Final[Mapping[str, str]] = MappingProxyType({
    "context_length": "max_position_embeddings",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "feed_forward_length": "n_inner",
})  # fmt: skip
"""Key of an architecture → the word of a config that has one of that name."""
_TOLD_BY_TENSORS: Final = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
"""Word of a config → a tensor that is there if it is true."""
_TOKENS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Numbers of tokens for which a class has others of its own where a file names none."""
_OF_NO_NUMBER: Final = frozenset({
    *_TOKENS, *QUANTIZATION, "architectures", "dtype", "torch_dtype", "_name_or_path", "transformers_version", "initializer_range", "use_cache",
    "attention_dropout", "hidden_dropout", "resid_dropout", "embd_dropout", "attn_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "pretraining_tp", "router_aux_loss_coef",
    "output_router_logits", "summary_first_dropout", "summary_activation", "summary_proj_to_labels", "summary_type", "summary_use_proj", "n_ctx", "id2label", "label2id", "num_labels",
    "feed_forward_length", "problem_type", "return_dict", "output_attentions", "output_hidden_states", "router_jitter_noise", "max_window_layers",
    "use_sliding_window", "intermediate_size_mlp", "chunk_size_feed_forward", "is_encoder_decoder", "decoder_sparse_step", "mlp_only_layers",
})  # fmt: skip
"""Words of configs by which no number of a language model changes, or that its tensors say."""
_FILLED_IN: Final = frozenset({"head_dim", "n_inner", "num_key_value_heads", "sliding_window"})
"""Words that may be left out of a config: sizes that follow from others, which the shapes of tensors are held to, and windows, of which a header says
nothing either then."""
_BY_WIDTH: Final = {"gemma2": 46, "gemma3": 62}
"""Architecture → layers of the one size of it whose scores are divided by another number than the root of a head's width."""


def config_of(header: Header) -> dict[str, Any]:
    """The config of a model.

    Raises:
        FileFormatError: an architecture that transformers does not read of GGUF files, or positions that it has no word for.
    """
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    architecture = header.architecture
    try:
        family = FAMILIES.get(architecture)
        with readable(header) as path:
            config: dict[str, Any] = family.config(header) if family else load_gguf_checkpoint(str(path))["config"]
        if config.get("model_type") == "llama" and header.value(f"{architecture}.expert_count", 0):
            config |= {"model_type": "mixtral", "num_local_experts": header.value(f"{architecture}.expert_count")}
        usual = transformers.CONFIG_MAPPING[config["model_type"]]()
    except Exception as error:  # whatever transformers raises of a header, it is the file that it does not know
        reraise_exhaustion(error)
        reason = str(error).strip().partition("\n")[0]
        raise FileFormatError(
            f"{header.path}: transformers does not read GGUF files of the architecture {architecture!r} ({reason}). Give the original model."
        ) from error
    try:
        return _completed(config, header, usual)
    except (
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:  # of what is computed of the numbers of a header
        if isinstance(error, ArrondiError):
            raise
        raise FileFormatError(
            f"{header.path}: a number of its header is missing, or cannot be ({type(error).__name__}: {error}). Download it again."
        ) from error


def _completed(config: dict[str, Any], header: Header, usual: Any) -> dict[str, Any]:
    """What transformers reads of a header, and what it leaves out.

    Args:
        config: as transformers reads it.
        header: of the file.
        usual: the config that a class of the kind has by itself.
    """
    architecture = header.architecture
    config.pop("_model_name_or_path", None)
    config |= {word: None for word in _TOKENS if word not in config}
    for key, word in _MORE.items():
        value = header.value(f"{architecture}.{key}")
        if value is not None and (word in usual.to_dict() or word in usual.attribute_map):
            config[word] = value
    for word, tensor in _TOLD_BY_TENSORS.items():
        if word in usual.to_dict():
            config[word] = tensor in header.tensors
    if hasattr(usual, "query_pre_attn_scalar"):
        heads, width = config.get("num_attention_heads"), config.get("hidden_size")
        config["query_pre_attn_scalar"] = _scale_of_scores(architecture, header, heads, width)
    return config | rope_of(header, config)


def unsaid(config: Any, header: Header) -> str | None:
    """The first word of a config that a header gives another value, as the start of a sentence; None: it describes the model.

    Args:
        config: of transformers.
        header: made of it.
    """
    read = type(config)(**{k: v for k, v in config_of(header).items() if k != "model_type"}).to_dict()
    for word, value in config.to_dict().items():
        if word in _OF_NO_NUMBER or word not in read or (value is None and word in _FILLED_IN):
            continue
        if not _alike(value, read[word]):
            return f"GGUF says nothing of {word}: {value!r}, which would be read as {read[word]!r}"
    return None


def _alike(one: Any, two: Any) -> bool:
    """Equal, up to the float32 in which headers have numbers."""
    if isinstance(one, dict) and isinstance(two, dict):
        return all(
            _alike(one.get(k), two.get(k))
            for k in (one.keys() | two.keys())
            if one.get(k) is not None and two.get(k) is not None
        )
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(_alike(a, b) for a, b in zip(one, two, strict=True))
    if isinstance(one, int | float) and isinstance(two, int | float):
        return math.isclose(one, two, rel_tol=1e-6)
    return bool(one == two)


def _scale_of_scores(architecture: str, header: Header, heads: Any, width: Any) -> Any:
    """By whose root the scores of Gemma's attention are divided; files do not say it, and every runtime computes it so."""
    layers = header.value(f"{architecture}.block_count")
    if layers == _BY_WIDTH.get(architecture):
        return width // heads
    return header.value(f"{architecture}.attention.key_length", width // heads)
