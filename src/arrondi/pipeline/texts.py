"""The data of a run: which windows are calibrated on, which are held back and measured.

Owns: `TextOptions` (what the user asks for) and `read_texts`, which gives the `Texts` that a run uses. What is measured was never
calibrated on: it is the last tenth of the calibration data, or what the user gives, and a note says where that was calibrated on
after all. What cannot be measured as asked is refused here,
before the work.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from arrondi.arguments import check_fields
from arrondi.errors import DataError
from arrondi.measure.compare import BATCH_TOKENS, batch_size, comparison_for
from arrondi.measure.data import Data, Windows, check_windows, read_windows, reads_text
from arrondi.measure.limits import Limits, check_limits
from arrondi.measure.text import fit_length, load_tokenizer, positions_of, protocol
from arrondi.model import OnDisk
from arrondi.pipeline.recipe import Recipe
from arrondi.pipeline.steps import get_step


@dataclass(frozen=True)
class TextOptions:
    """What data a run uses and how much of them.

    Attributes:
        calibration: what to calibrate on (a path, texts, token ids, batches of them), or None.
        samples: windows taken from it, chosen by `seed`.
        seq_len: tokens of a window of text, special tokens included; as many as the model can take if those are fewer, which
            the report then notes. Token ids keep the length that they have.
        eval_text: what to measure on; None takes the last tenth of the calibration data, which is then not calibrated on.
        evaluate: False leaves the measurement out.
        eval_samples: windows measured at most.
        seed: chooses the calibration windows.
        limits: what the result will be held to; refused before the work where the model has no such measure.
    """

    calibration: Data | None = None
    samples: int = 128
    seq_len: int = 512
    eval_text: Data | None = None
    evaluate: bool = True
    eval_samples: int = 32
    seed: int = 0
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("samples", "seq_len", "eval_samples"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} is 1 or more, got {getattr(self, name)}.")


@dataclass
class Texts:
    """The windows of a run."""

    calibration: Windows | None = None
    evaluation: Windows | None = None
    evaluation_source: str = ""
    protocol: str = ""
    notes: list[str] = field(default_factory=list)
    batch_size: int = 1

    @property
    def calibration_batches(self) -> list[torch.Tensor]:
        """Windows that are sent through the model together."""
        return (
            []
            if self.calibration is None
            else self.calibration.batches(max(BATCH_TOKENS // self.calibration.seq_len, 1))
        )

    @property
    def evaluation_batches(self) -> list[torch.Tensor]:
        """Windows whose outputs are compared together."""
        return [] if self.evaluation is None else self.evaluation.batches(self.batch_size)


def _overlap(texts: Texts, recipe: Recipe) -> list[str]:
    """Say it where the result is measured on what it was calibrated on."""
    calibrated = any(
        get_step(r.method).calibrated
        or (r.scheme is not None and r.scheme.inputs is not None and r.scheme.inputs.dynamic is not True)
        for r in recipe.rules
    )
    if not calibrated or texts.calibration is None or texts.evaluation is None:
        return []
    seen = {tuple(row) for row in texts.calibration.ids.tolist()}
    shared = sum(tuple(row) in seen for row in texts.evaluation.ids.tolist())
    if not shared:
        return []
    return [
        f"{shared} of {len(texts.evaluation.ids)} evaluation windows were calibrated on, so the numbers flatter. "
        "Measure on a text that calibration did not see."
    ]


def read_texts(source: OnDisk, options: TextOptions, recipe: Recipe) -> Texts:
    """Tokenize, cut, hold back and choose.

    Raises:
        DataError: a method needs calibration and there is none, or the data do not fit the model.
        SchemeError: the limits cannot be measured on this kind of model.
    """
    needs = [r.method for r in recipe.rules if get_step(r.method).calibrated]
    if needs and options.calibration is None:
        raise DataError(
            f"Method {needs[0]!r} needs calibration text, and none was given. Add --calibration FILE, or use --method rtn or hqq."
        )
    if options.limits:
        check_limits(comparison_for(source.model).kind, options.limits.kl, options.limits.ppl_increase)
    eval_data = options.eval_text if options.evaluate else None
    if options.calibration is None and eval_data is None:
        return Texts()
    given = [data for data in (options.calibration, eval_data) if data is not None]
    tokenizer = load_tokenizer(source.where) if any(map(reads_text, given)) else None
    seq_len, note = fit_length(options.seq_len, positions_of(source.model))
    texts = Texts(notes=[note] if note and tokenizer is not None else [])
    if options.calibration is not None:
        windows = read_windows(options.calibration, tokenizer, seq_len, "calibration text")
        held = max(len(windows) // 10, 1) if options.evaluate and eval_data is None and len(windows) > 1 else 0
        pool = windows.ids[: len(windows) - held]
        generator = torch.Generator().manual_seed(options.seed)
        chosen = torch.randperm(len(pool), generator=generator)[: options.samples].sort().values
        texts.calibration = replace(windows, ids=pool[chosen])
        if len(chosen) < options.samples:
            texts.notes.append(
                f"{windows.source} gave {len(chosen)} calibration windows of {windows.seq_len} tokens; {options.samples} were asked for."
            )
        if held:
            texts.evaluation = replace(windows, ids=windows.ids[len(pool) :][: options.eval_samples])
            texts.evaluation_source = f"last tenth of {windows.source}, not calibrated on"
    if eval_data is not None:
        windows = read_windows(eval_data, tokenizer, seq_len, "evaluation text")
        texts.evaluation = replace(windows, ids=windows.ids[: options.eval_samples])
        texts.evaluation_source = windows.source
    if texts.evaluation is not None:
        texts.batch_size = batch_size(source.model, texts.evaluation.seq_len)
        measured = options.calibration if eval_data is None else eval_data
        by_text = measured is not None and reads_text(measured)
        texts.protocol = protocol(tokenizer if by_text else None, texts.evaluation.seq_len)
    texts.notes += _overlap(texts, recipe)
    for read in (texts.calibration, texts.evaluation):
        if read is not None:
            check_windows(read, source.model)
    return texts
