"""The data of a run: which windows are calibrated on, which are held back and measured.

Owns: `TextOptions` (what the user asks for) and `read_texts`, which gives the `Texts` that a run uses. What is measured was never
calibrated on: it is the last tenth of the calibration data, or what the user gives, and a note says where that was calibrated on
after all. What cannot be measured as asked is refused here,
before the work.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from arrondi.arguments import check_fields
from arrondi.errors import DataError
from arrondi.formats.kv import parse_kv
from arrondi.measure.calling import Calling
from arrondi.measure.compare import BATCH_TOKENS, batch_size, comparison_for, is_causal
from arrondi.measure.data import Data, Windows, check_windows, chosen, read_windows, reads_text, vocabulary_of
from arrondi.measure.describe import describe
from arrondi.measure.images import Images, read_images
from arrondi.measure.limits import Limits, check_limits
from arrondi.measure.text import fit_length, load_tokenizer, positions_of, protocol
from arrondi.model import OnDisk
from arrondi.pipeline.importance import Known, match_imatrix
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
        column: the field of records (`.jsonl`, `.json`, `.parquet`) that holds text; None: `text`, or else a conversation.
        imatrix: an importance matrix of this model, for methods that take importance.
        images: a folder of images to calibrate on, prepared by the model's own processor; what text alone does not reach is then
            quantized, too. Without `eval_text` the last tenth of them is measured on.
    """

    calibration: Data | None = None
    samples: int = 128
    seq_len: int = 512
    eval_text: Data | None = None
    evaluate: bool = True
    eval_samples: int = 32
    seed: int = 0
    limits: Limits = Limits()
    column: str | None = None
    imatrix: str | Path | None = None
    images: str | Path | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("samples", "seq_len", "eval_samples"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} is 1 or more, got {getattr(self, name)}.")


Batch = torch.Tensor | dict[str, torch.Tensor]
"""Token ids, or keyword arguments of the model."""


@dataclass
class Texts:
    """The windows and images of a run; `described` are facts about what is calibrated on, and `importance` what an
    importance matrix says; `calling` is how windows are given to the model."""

    calibration: Windows | None = None
    evaluation: Windows | None = None
    evaluation_source: str = ""
    protocol: str = ""
    notes: list[str] = field(default_factory=list)
    batch_size: int = 1
    described: dict[str, Any] = field(default_factory=dict)
    importance: Known | None = None
    calling: Calling = Calling()
    images: Images | None = None
    eval_images: Images | None = None

    @property
    def calibrates(self) -> bool:
        """Whether there is anything to calibrate on."""
        return self.calibration is not None or self.images is not None

    @property
    def measures(self) -> bool:
        """Whether there is anything to measure on."""
        return self.evaluation is not None or self.eval_images is not None

    @property
    def calibration_batches(self) -> list[Batch]:
        """Windows that are sent through the model together: in turns windows of even and of odd number, so that the text falls
        into two halves of one kind (see `arrondi.calibration.energy`)."""
        found: list[Batch] = [] if self.images is None else list(self.images.batches)
        if self.calibration is None:
            return found
        size = max(BATCH_TOKENS // self.calibration.seq_len, 1)
        pairs = self.calibration.batches(2 * size)
        halves = (rows for pair in pairs for rows in (pair[0::2], pair[1::2]) if len(rows))
        return [*map(self.calling, halves), *found]

    @property
    def evaluation_batches(self) -> list[Batch]:
        """What outputs are compared on: windows, or calls with images."""
        if self.eval_images is not None:
            return list(self.eval_images.batches)
        return [] if self.evaluation is None else [*map(self.calling, self.evaluation.batches(self.batch_size))]

    def measured_from(self, batch: int) -> int:
        """The first position of a batch whose output is compared."""
        return 0 if self.eval_images is None else self.eval_images.starts[batch]


def overlap(texts: Texts, recipe: Recipe) -> list[str]:
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
    """`check_needed`, `read_data`, and what is to be said of this recipe on these data; raises as they do."""
    check_needed(options, recipe)
    texts = read_data(source, options)
    texts.notes += overlap(texts, recipe)
    return texts


def check_needed(options: TextOptions, recipe: Recipe) -> None:
    """Refuse a recipe that needs calibration data where there are none.

    Raises:
        DataError: names the method.
    """
    schemes = [] if recipe.kv is None else [(found := parse_kv(recipe.kv))[0], *found[1].values()]
    if options.calibration is None and any(s is not None and s.static for s in schemes):
        raise DataError(
            f"Keys and values in {recipe.kv} need calibration text, and none was given. Add --calibration FILE, or use --kv int8."
        )
    given = set() if options.imatrix is None else {"importance"}
    needs = [r.method for r in recipe.rules if get_step(r.method).needs - given]
    if needs and options.calibration is None and options.images is None:
        rounding = [r.method for r in recipe.rules if get_step(r.method).kind == "round"]
        asked = next((m for m in rounding if needs[0] in (m, *get_step(m).before, *get_step(m).after)), None)
        what, instead = f"The {get_step(needs[0]).kind} {needs[0]!r}", "leave it out"
        if asked is not None:  # the user never named what comes with a method
            what, instead = f"Method {asked!r}", "use --method rtn or hqq"
        raise DataError(f"{what} needs calibration text, and none was given. Add --calibration FILE, or {instead}.")


def read_data(source: OnDisk, options: TextOptions) -> Texts:
    """Tokenize, cut, hold back and choose: what all recipes have in common.

    Raises:
        DataError: the data do not fit the model.
        SchemeError: the limits cannot be measured on this kind of model.
    """
    importance = None if options.imatrix is None else match_imatrix(Path(options.imatrix), source)
    if options.limits:
        check_limits(comparison_for(source.model).kind, options.limits.kl, options.limits.ppl_increase)
    eval_data = options.eval_text if options.evaluate else None
    images, eval_images = _images(source, options)
    if options.calibration is None and eval_data is None:
        return _with_images(Texts(importance=importance), source, images, eval_images)
    given = [data for data in (options.calibration, eval_data) if data is not None]
    tokenizer = load_tokenizer(source.home) if any(map(reads_text, given)) else None
    seq_len, note = fit_length(options.seq_len, positions_of(source.model))
    calling = Calling.of(source.model)
    notes = [*([note] if note and tokenizer is not None else []), *calling.notes]
    texts = Texts(notes=notes, importance=importance, calling=calling)
    if options.calibration is not None:
        windows = read_windows(options.calibration, tokenizer, seq_len, "calibration text", options.column)
        measured_on_it = options.evaluate and eval_data is None and eval_images is None
        held = max(len(windows) // 10, 1) if measured_on_it and len(windows) > 1 else 0
        pool = replace(windows, ids=windows.ids[: len(windows) - held])
        texts.calibration = chosen(pool, options.samples, options.seed)
        if len(texts.calibration) < options.samples:
            texts.notes.append(
                f"{windows.source} gave {len(texts.calibration)} calibration windows of {windows.seq_len} tokens; {options.samples} were asked for."
            )
        if held:
            texts.evaluation = replace(windows, ids=windows.ids[len(pool) :][: options.eval_samples])
            texts.evaluation_source = f"last tenth of {windows.source}, not calibrated on"
        words = tokenizer if reads_text(options.calibration) else None
        texts.described = describe(texts.calibration, vocabulary_of(source.model), words)
    if eval_data is not None:
        windows = read_windows(eval_data, tokenizer, seq_len, "evaluation text", options.column)
        texts.evaluation = replace(windows, ids=windows.ids[: options.eval_samples])
        texts.evaluation_source = windows.source
    if texts.evaluation is not None:
        texts.batch_size = batch_size(source.model, texts.evaluation.seq_len)
        measured = options.calibration if eval_data is None else eval_data
        by_text = measured is not None and reads_text(measured)
        texts.protocol = protocol(tokenizer if by_text else None, texts.evaluation.seq_len) + calling.protocol
    for read in (texts.calibration, texts.evaluation):
        if read is not None:
            check_windows(read, source.model)
    return _with_images(texts, source, images, eval_images)


def _images(source: OnDisk, options: TextOptions) -> tuple[Images | None, Images | None]:
    """Images to calibrate on, and those to measure on."""
    if options.images is None:
        return None, None
    if not is_causal(source.model):
        raise DataError(
            f"{type(source.model).__name__} writes no text, so images cannot be measured by what it says. Leave --calibration-images out."
        )
    found = read_images(Path(options.images), source.home, options.samples + options.eval_samples)
    if not options.evaluate or options.eval_text is not None:
        return found.part(0, options.samples), None
    if len(found) < 2:
        raise DataError(
            f"{options.images}: one image, which cannot be both calibrated and measured on. Give more, or --no-eval."
        )
    held = max(len(found) // 10, 1)
    return found.part(0, min(len(found) - held, options.samples)), found.part(len(found) - held).part(
        0, options.eval_samples
    )


def _with_images(texts: Texts, source: OnDisk, images: Images | None, eval_images: Images | None) -> Texts:
    texts.images, texts.eval_images = images, eval_images
    for some in (images, eval_images):
        if some is not None:
            for batch in some.batches:
                check_windows(Windows(batch["input_ids"], f"an image of {some.source}", ""), source.model)
    if eval_images is not None:
        texts.evaluation_source = f"last images of {eval_images.source}, not calibrated on"
        texts.protocol = eval_images.protocol
    return texts
