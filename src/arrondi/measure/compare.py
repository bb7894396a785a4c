"""Two models on the same text, followed unit by unit.

Owns: `compare_models` and `comparison_for`, which picks what can be measured on a kind of model. Only one unit of each model is in
memory; outputs live for one batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from arrondi.arguments import check_arguments
from arrondi.checkpoint import Checkpoint
from arrondi.errors import FileFormatError
from arrondi.formats import ActivationScheme
from arrondi.measure.calling import Calling, predicted
from arrondi.measure.comparison import Comparison, EncoderComparison
from arrondi.measure.data import Data, check_windows, read_windows, reads_text
from arrondi.measure.limits import Limits, check_limits
from arrondi.measure.text import fit_length, load_tokenizer, positions_of, protocol
from arrondi.model import Budget, OnDisk, Stream, confirm, device_named, settle, walk

BATCH_TOKENS = 2048
"""Tokens sent through a unit at once."""
_HIDDEN_LIMIT = 512 << 20
_OUTPUT_BYTES = 64 << 20
"""Outputs of one model that are in memory at once."""


def comparison_for(model: Any) -> Comparison | EncoderComparison:
    """Perplexity, KL and agreement for a causal language model; distances of outputs for an encoder."""
    return Comparison() if is_causal(model) else EncoderComparison()


def is_causal(model: Any) -> bool:
    """Whether the model predicts the next token: its class is one of a language model over a vocabulary."""
    import transformers

    tables = (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    )
    kinds = [table.get(type(model.config), None) for table in tables]
    return any(type(model) is k or (isinstance(k, tuple) and type(model) in k) for k in kinds)


def batch_size(model: Any, seq_len: int) -> int:
    """Windows in a batch: enough to keep the machine busy, few enough that outputs fit in memory."""
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0) if is_causal(model) else 0
    by_output = _OUTPUT_BYTES // max(4 * vocabulary * seq_len, 1)
    return max(min(BATCH_TOKENS // seq_len, by_output), 1)


def compare_models(
    quantized: str | Path,
    reference: str | Path,
    text: Data,
    *,
    seq_len: int = 256,
    samples: int | None = None,
    column: str | None = None,
    activations: str | ActivationScheme | None = None,
    limits: Limits | None = None,
    device: str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Measure a model against its original.

    Args:
        quantized: directory of the model in question, quantized or plain.
        reference: directory of the original; its tokenizer is used.
        text: data that calibration has not seen: a path, texts, token ids, or batches of them.
        seq_len: tokens of a window, special tokens included.
        samples: windows at most; None takes all.
        column: the field of records (`.jsonl`, `.json`, `.parquet`) that holds text; None: `text`, or else a conversation.
        activations: how inputs of weight-only linears of `quantized` are rounded, as `load` does; None: they stay.
        limits: what the result will be held to; refused before the work where the model has no such measure.
        device: where units are run, as torch names devices.
        progress: called with (blocks done, blocks, what).

    Returns:
        for causal models perplexity, reference_perplexity, kl_mean, kl_p99, top1_agreement, tokens, intervals; for
        encoders cosine similarities and relative error; the protocol; and the activations.

    Raises:
        FileFormatError: a directory is no model, tensors are missing, or the two are not of one shape.
        DataError: the text is shorter than one window.
        SchemeError: there are no activations that can be rounded so, the model does not run on text, or a file asks for what is
            not computed here.
    """
    check_arguments(compare_models, locals())
    where = device_named(device)
    sources = [OnDisk.open(reference), OnDisk(Checkpoint.open(quantized).rounding(activations))]
    for source in sources:
        source.check_computed()
    shapes = [{n: tuple(p.shape) for n, p in s.names.params.items()} for s in sources]
    added = shapes[1].keys() - shapes[0].keys()  # biases that a repair gave it
    same = all(shapes[1].get(n) == shape for n, shape in shapes[0].items()) and all(
        len(shapes[1][n]) == 1 for n in added
    )
    if type(sources[0].model) is not type(sources[1].model) or not same:
        raise FileFormatError(
            f"{quantized} is another model than {reference}: class or shapes differ. Compare a model with its own original."
        )
    model = sources[0].model
    if limits:
        check_limits(comparison_for(model).kind, limits.kl, limits.ppl_increase)
    seq_len, note = fit_length(seq_len, positions_of(model))
    tokenizer = load_tokenizer(sources[0].home) if reads_text(text) else None
    windows = read_windows(text, tokenizer, seq_len, "evaluation text", column)
    check_windows(windows, model)
    calling = Calling.of(model)
    batches = [calling(ids) for ids in windows.ids[:samples].split(batch_size(model, windows.seq_len))]
    notes = [*([note] if note and tokenizer is not None else []), *calling.notes]
    notes += settle(sources[0], batches[0])
    if sources[0].whole:
        sources[1].run_as_whole(sources[0].facts)
    report = progress or (lambda done, total, what: None)
    comparison = comparison_for(model)
    _follow(sources, batches, comparison, where, report)
    return {
        **comparison.summary().to_dict(),
        "text": windows.source,
        "windows": sum(len(predicted(b)) for b in batches),
        "protocol": protocol(tokenizer, windows.seq_len) + calling.protocol,
        "notes": notes,
        "activations": None if activations is None else str(sources[1].checkpoint.activations),
    }


@torch.no_grad()
def _follow(
    sources: list[OnDisk],
    batches: list[torch.Tensor | dict[str, torch.Tensor]],
    comparison: Comparison | EncoderComparison,
    device: torch.device,
    report: Callable[[int, int, str], None],
) -> None:
    """Send both models through all batches and collect what they compute."""
    instances = [s.instance(device=device) for s in sources]
    for source, instance in zip(sources, instances, strict=True):
        rounding = source.rounded_inputs()
        instance.round_inputs(rounding)
        instance.spread_inputs({name: scheme.spread for name, (scheme, *_) in rounding.items() if scheme.spread})
    units = [s.units_of(i) for s, i in zip(sources, instances, strict=True)]
    total, budget, folder = len(units[0]) + 1, Budget(_HIDDEN_LIMIT), Path(tempfile.gettempdir())
    with Stream(units[0], batches, budget, folder) as first, Stream(units[1], batches, budget, folder) as second:
        first.begin()
        second.begin()
        for i in walk([[first], [second]]):
            report(i, total, f"block {i + 1} of {len(units[0])}")
        report(total - 1, total, "comparing outputs")
        with units[0].outer_loaded(), units[1].outer_loaded():
            for j, rows in first.pieces():
                comparison.add(first.output(j, rows), second.output(j, rows), predicted(batches[j])[rows])
            confirm(sources[0], first)
