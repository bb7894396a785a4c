"""The text of a run: which windows are calibrated on, which are held back and measured.

Owns: `TextOptions` (what the user asks for) and `read_texts`, which gives the `Texts` that a run uses. What is measured was never
calibrated on: it is another file, or the last tenth of the calibration text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from arrondi.errors import DataError
from arrondi.evaluate.text import Windows, load_tokenizer, protocol, read_windows
from arrondi.model import Skeleton
from arrondi.pipeline.recipe import Recipe
from arrondi.rounding import get_method


@dataclass(frozen=True)
class TextOptions:
    """What text a run uses and how much of it.

    Attributes:
        calibration: file to calibrate on, or None.
        samples: windows taken from it, chosen by `seed`.
        seq_len: tokens of a window, special tokens included; cut to what the model can take.
        eval_text: file to measure on; None takes the last tenth of the calibration text, which is then not calibrated on.
        evaluate: False leaves the measurement out.
        eval_samples: windows measured at most.
        seed: chooses the calibration windows.
    """

    calibration: Path | None = None
    samples: int = 128
    seq_len: int = 512
    eval_text: Path | None = None
    evaluate: bool = True
    eval_samples: int = 32
    seed: int = 0


@dataclass
class Texts:
    """The windows of a run."""

    calibration: Windows | None = None
    evaluation: Windows | None = None
    evaluation_source: str = ""
    protocol: str = ""
    notes: list[str] = field(default_factory=list)


def read_texts(skeleton: Skeleton, options: TextOptions, recipe: Recipe) -> Texts:
    """Tokenize, cut, hold back and choose."""
    needs = [r.method for r in recipe.rules if r.scheme is not None and get_method(r.method).needs_moment]
    if needs and options.calibration is None:
        raise DataError(
            f"Method {needs[0]!r} needs calibration text, and none was given. Add --calibration FILE, or use --method rtn or hqq."
        )
    if options.calibration is None and (options.eval_text is None or not options.evaluate):
        return Texts()
    folder = skeleton.checkpoint.folder.path
    tokenizer = load_tokenizer(folder)
    seq_len = min(options.seq_len, getattr(skeleton.model.config, "max_position_embeddings", None) or options.seq_len)
    texts = Texts(protocol=protocol(tokenizer, seq_len))
    if options.calibration is not None:
        windows = read_windows(options.calibration, tokenizer, seq_len, "calibration text")
        held = max(len(windows) // 10, 1) if options.evaluate and options.eval_text is None and len(windows) > 1 else 0
        pool = windows.ids[: len(windows) - held]
        generator = torch.Generator().manual_seed(options.seed)
        chosen = torch.randperm(len(pool), generator=generator)[: options.samples].sort().values
        texts.calibration = Windows(pool[chosen], windows.source, windows.text_hash)
        if len(chosen) < options.samples:
            texts.notes.append(
                f"{windows.source} gave {len(chosen)} calibration windows of {seq_len} tokens; {options.samples} were asked for."
            )
        if held:
            texts.evaluation = Windows(
                windows.ids[len(pool) :][: options.eval_samples], windows.source, windows.text_hash
            )
            texts.evaluation_source = f"last tenth of {windows.source}, not calibrated on"
    if options.eval_text is not None and options.evaluate:
        windows = read_windows(options.eval_text, tokenizer, seq_len, "evaluation text")
        texts.evaluation = Windows(windows.ids[: options.eval_samples], windows.source, windows.text_hash)
        texts.evaluation_source = windows.source
    _check_ids(skeleton, texts)
    return texts


def _check_ids(skeleton: Skeleton, texts: Texts) -> None:
    vocabulary = getattr(skeleton.model.config, "vocab_size", None)
    for windows in (texts.calibration, texts.evaluation):
        if windows is not None and vocabulary and int(windows.ids.max()) >= vocabulary:
            raise DataError(
                f"The tokenizer gives token {int(windows.ids.max())}, but the model knows {vocabulary}. They do not belong together."
            )
