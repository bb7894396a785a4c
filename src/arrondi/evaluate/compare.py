"""Two models on the same text, followed block by block.

Owns: `compare_models` and `comparison_for`, which picks what can be measured on a kind of model. Only one block of each model is in
memory; logits live for one window.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from arrondi.checkpoint import Checkpoint
from arrondi.errors import FileFormatError
from arrondi.evaluate.metrics import Comparison, EncoderComparison
from arrondi.evaluate.text import load_tokenizer, protocol, read_windows
from arrondi.formats import Scheme
from arrondi.model import Budget, Chain, Skeleton, TreeStore

_BATCH_TOKENS = 2048
_HIDDEN_LIMIT = 512 << 20


def comparison_for(model: Any) -> Comparison | EncoderComparison:
    """Perplexity, KL and agreement for a causal language model; distances of outputs for an encoder."""
    return Comparison() if is_causal(model) else EncoderComparison()


def is_causal(model: Any) -> bool:
    """Whether the model predicts the next token."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return (
        type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING
        and type(model) is MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)]
    )


def activation_schemes(skeleton: Skeleton) -> dict[str, Any]:
    """Module → scheme of its input, where activations are quantized at run time; inputs of fused experts stay as they are."""
    found: dict[str, Any] = {}
    for source in skeleton.checkpoint.placed:
        scheme = skeleton.checkpoint.activations_of(source)
        params = {slot.param for slot in skeleton.slots(source)} if scheme is not None else set()
        for param in params:
            if len(skeleton.empty[param].shape) == 2:
                found |= {name.rpartition(".")[0]: scheme for name in skeleton.names_of(param)}
    return found


def compare_models(
    quantized: str | Path,
    reference: str | Path,
    text: str | Path,
    *,
    seq_len: int = 256,
    samples: int | None = None,
    activations: str | Scheme | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Measure a model against its original.

    Args:
        quantized: directory of the model in question, quantized or plain.
        reference: directory of the original; its tokenizer is used.
        text: UTF-8 file that calibration has not seen.
        seq_len: tokens of a window, special tokens included.
        samples: windows at most; None takes all.
        activations: how inputs of weight-only linears of `quantized` are rounded, as `load_model` does; None: they stay.
        progress: called with (blocks done, blocks, what).

    Returns:
        for causal models perplexity, reference_perplexity, kl_mean, kl_p99, top1_agreement, tokens, intervals; for
        encoders cosine similarities and relative error; the protocol; and the activations.

    Raises:
        FileFormatError: a directory is no model, or the two are not of one shape.
        DataError: the text is shorter than one window.
        SchemeError: there are no activations that can be rounded so.
    """
    skeletons = [Skeleton(Checkpoint.open(reference)), Skeleton(Checkpoint.open(quantized).rounding(activations))]
    shapes = [{n: tuple(p.shape) for n, p in s.empty.items()} for s in skeletons]
    if type(skeletons[0].model) is not type(skeletons[1].model) or shapes[0] != shapes[1]:
        raise FileFormatError(
            f"{quantized} is another model than {reference}: class or shapes differ. Compare a model with its own original."
        )
    seq_len = min(seq_len, getattr(skeletons[0].model.config, "max_position_embeddings", None) or seq_len)
    tokenizer = load_tokenizer(Path(reference))
    windows = read_windows(text, tokenizer, seq_len, "evaluation text")
    ids = list(windows.ids[:samples].split(max(_BATCH_TOKENS // seq_len, 1)))
    chains = [Chain(s, activation_schemes(s)) for s in skeletons]
    report = progress or (lambda done, total, what: None)
    with contextlib.ExitStack() as stack:
        spilled = Path(tempfile.gettempdir())
        stores = [stack.enter_context(TreeStore(Budget(_HIDDEN_LIMIT), spilled, c.begin(ids))) for c in chains]
        for i in range(len(chains[0])):
            report(i, len(chains[0]) + 1, f"block {i + 1} of {len(chains[0])}")
            for chain, store in zip(chains, stores, strict=True):
                chain.fill(i)
                for j in range(len(store)):
                    store[j] = chain.run(i, store[j])
                chain.drop(i)
        report(len(chains[0]), len(chains[0]) + 1, "comparing outputs")
        comparison = comparison_for(chains[0].model)
        with torch.no_grad(), chains[0].outer_loaded(), chains[1].outer_loaded():
            for j, batch in enumerate(ids):
                for k in range(len(batch)):
                    one = batch[k : k + 1]
                    outputs = [c.finish(one, s[j][k : k + 1]) for c, s in zip(chains, stores, strict=True)]
                    comparison.add(outputs[0], outputs[1], one)
    return {
        **comparison.summary().to_dict(),
        "text": windows.source,
        "windows": sum(len(b) for b in ids),
        "protocol": protocol(tokenizer, seq_len),
        "activations": None if activations is None else str(skeletons[1].checkpoint.activations),
    }
