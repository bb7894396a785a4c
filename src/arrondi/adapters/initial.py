"""A quantized base and the adapter that starts on it: `initialize`.

The base is written by the ordinary run: only the weights that it rounds are others, W less what the adapter begins with. They are put into a
plain copy of the model first, so method, format, layout and files are those of `arrondi quantize`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.adapters.files import Delta, write_adapter
from arrondi.adapters.moments import input_moments
from arrondi.adapters.origin import digest, write_origin
from arrondi.adapters.places import Place, places, published, rewritten, scratch
from arrondi.checkpoint import Checkpoint, read_report, write_json
from arrondi.errors import OutputError, SchemeError, ShapeError, unknown
from arrondi.formats import LayerScheme
from arrondi.measure.compare import compare_models, is_causal
from arrondi.measure.data import Data
from arrondi.model import OnDisk
from arrondi.pipeline import Recipe, TextOptions, make_plan, quantize_model
from arrondi.pipeline.task import original
from arrondi.repair.low_rank import Factors, Start, alternate, compensate, nuclear_norm, principal, zero
from arrondi.rewrite.spread import spread, unspread
from arrondi.rounding import METHODS
from arrondi.tensor.qtensor import QTensor

INITS: Final = ("lora", "pissa", "qpissa", "loftq", "eora")
"""Where adapters can start."""

ADAPTER: Final = "adapter"
"""The folder of the adapter inside the output."""

STEPS: Final = 5
"""How often QPiSSA and LoftQ fit their factors."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Init:
    """How an adapter starts.

    Attributes:
        name: one of `INITS`. `lora`: B = 0, so the base alone is the model. `pissa`: the principal part of W goes into the adapter, the rest is
            rounded (or kept, without a recipe). `qpissa`: the same, refitted to what rounding lost. `loftq`: rounding and fitting in turns from B A = 0.
            `eora`: W is rounded, and the factors make up for what that costs on the calibration text.
        rank, alpha: of the adapter; α = None is the rank, so that B A counts as it is.
        steps: how often factors are fitted; QPiSSA and LoftQ.
        iterations: of fast singular value decompositions; None: exact ones.
        seed: of random numbers.
    """

    name: str = "lora"
    rank: int = 16
    alpha: float | None = None
    steps: int = STEPS
    iterations: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in INITS:
            raise unknown("init", self.name, INITS)
        if self.rank < 1 or self.steps < 1 or (self.alpha is not None and not 0 < self.alpha < math.inf):
            raise SchemeError(
                f"Rank, steps and alpha are finite and more than 0, got {self.rank}, {self.steps} and {self.alpha}."
            )

    @property
    def scaling(self) -> float:
        """By what peft multiplies B A."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def start(self, weight: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor]) -> Start:
        """What is rounded of a weight (out, in), and the factors beside it."""
        if self.name in ("lora", "eora"):
            return Start(weight, zero(weight, self.rank, self._generator(weight)), 0.0)
        if self.name == "loftq":
            return alternate(weight, rounded, self.rank, steps=self.steps, iterations=self.iterations)
        first = principal(
            weight, self.rank, iterations=self.iterations, generator=torch.Generator().manual_seed(self.seed)
        )
        if self.name == "pissa":
            return Start(weight.float() - first.product, first, 0.0)
        return alternate(weight, rounded, self.rank, steps=self.steps, start=first, iterations=self.iterations)

    def _generator(self, weight: torch.Tensor) -> torch.Generator:
        # Layers of one shape must not start alike.
        return torch.Generator().manual_seed(self.seed + int(weight.double().abs().sum() * 1e6) % (1 << 40))


def initialize(
    model: str | Path,
    out: str | Path,
    init: Init,
    recipe: Recipe | None = None,
    *,
    text: TextOptions | None = None,
    measured_on: Data | None = None,
    measured_windows: int = 32,
    seq_len: int = 256,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a base into a directory, and into its folder `adapter` the adapter that starts on it, which plain peft loads.

    Args:
        model: directory or Hub name of the original, not quantized.
        out: directory to write.
        init: where the adapter starts.
        recipe: what the base becomes; None leaves it in ordinary numbers, which only `pissa` changes.
        text: calibration data, for `eora` and methods that look at inputs.
        measured_on: text on which base and adapter are compared with the original; None: they are not.
        measured_windows, seq_len: windows at most, tokens of each.
        overwrite: a finished output of arrondi may be replaced.
        progress: called with (layers done, layers, what).

    Returns:
        for every layer the errors ‖W - Q‖ and ‖W - Q - B A‖ relative to ‖W‖ and the nuclear norm's reduction, their means, and where it was
        measured KL and perplexity of the base alone and with its adapter.

    Raises:
        SchemeError, ShapeError, DataError, OutputError, FileFormatError: see their sentences.
    """
    out, text = Path(out), text or TextOptions(evaluate=False)
    checkpoint = original(model, out)
    source = OnDisk(checkpoint)
    if recipe is None and init.name != "pissa":
        raise SchemeError(
            f"--init {init.name} starts on rounded weights. Add --scheme, such as NF4, or use --init pissa."
        )
    if init.name == "eora" and text.calibration is None:
        raise SchemeError("--init eora weighs errors by the inputs of layers. Add --calibration FILE.")
    chosen = _chosen(source, recipe, init.rank)
    if (out / ADAPTER).exists() and not overwrite:
        raise OutputError(f"{out / ADAPTER}: is there already. Choose a new directory or add --overwrite.")
    work = _Work(checkpoint, source, init, chosen, progress or (lambda done, total, what: None))
    with scratch(out) as folder:
        if recipe is None:
            published(checkpoint, out, work.changes, work.places, None, overwrite=overwrite)
        elif init.name in ("lora", "eora"):
            quantize_model(model, out, recipe, text, overwrite=overwrite)
        else:
            rewritten(checkpoint, folder / "rest", work.changes, work.places, torch.float32)
            quantize_model(folder / "rest", out, recipe, replace(text, evaluate=False), overwrite=overwrite)
            _name_original(out, checkpoint.folder.path)
        base = Checkpoint.open(out)
        if init.name == "eora":
            work.compensated(base, recipe, text, out)
        rows = work.rows(base)
        _write(out, work, base, source)
        result: dict[str, Any] = {
            "init": init.name,
            "rank": init.rank,
            "alpha": init.alpha or init.rank,
            "layers": rows,
            **_means(rows),
        }
        if measured_on is not None:
            rewritten(base, folder / "together", work.together, work.places, torch.float32)
            for what, directory in (("base", out), ("start", folder / "together")):
                said = compare_models(directory, model, measured_on, seq_len=seq_len, samples=measured_windows)
                result[what] = {k: said[k] for k in ("kl_mean", "perplexity", "reference_perplexity") if k in said}
    return result


class _Work:
    """Factors of every place, computed as the weights are read."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: OnDisk,
        init: Init,
        chosen: Mapping[str, tuple[Place, LayerScheme | None]],
        progress: Progress,
    ) -> None:
        self.checkpoint, self.source, self.init, self.chosen, self.progress = checkpoint, source, init, chosen, progress
        self.factors: dict[str, Factors] = {}
        self.moments: dict[str, torch.Tensor] = {}
        self.places = [place for place, _ in chosen.values()]

    @property
    def changes(self) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """What is rounded instead of a weight."""

        def rest(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda weight: self._start(name, weight).rest

        return {name: rest(name) for name in self.chosen}

    @property
    def together(self) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """Base and adapter as one weight."""
        return {name: Delta(one) for name, one in self.factors.items()}

    def _start(self, name: str, weight: torch.Tensor) -> Start:
        self.progress(len(self.factors), len(self.chosen), name)
        start = self.init.start(weight, _rounding(self.chosen[name][1], name))
        self.factors[name] = start.factors
        return start

    def compensated(self, base: Checkpoint, recipe: Recipe | None, text: TextOptions, out: Path) -> None:
        """Factors that make up for what rounding cost on the calibration text."""
        assert recipe is not None
        for name, moment in input_moments(self.source, out, list(self.chosen), text, recipe):
            place = self.chosen[name][0]
            self.progress(len(self.factors), len(self.chosen), name)
            self.factors[name] = compensate(place.weight(self.checkpoint) - place.weight(base), moment, self.init.rank)

    def rows(self, base: Checkpoint) -> list[dict[str, Any]]:
        """What the report says of every layer, of the weights that were written."""
        rows = []
        for name, (place, scheme) in self.chosen.items():
            weight, written = place.weight(self.checkpoint), place.weight(base)
            if name not in self.factors:
                self._start(name, weight)
            plain = weight - _rounding(scheme, name)(weight)
            left = weight - written - self.factors[name].product
            size, whole = float(weight.norm()), nuclear_norm(plain)
            rows.append({
                "name": name,
                "rounded_error": float(plain.norm()) / size,
                "error": float(left.norm()) / size,
                "nuclear_reduction": 1 - nuclear_norm(left) / whole if whole else None,
            })  # fmt: skip
        return rows


def _chosen(source: OnDisk, recipe: Recipe | None, rank: int) -> dict[str, tuple[Place, LayerScheme | None]]:
    """Module → its place and what its weight becomes."""
    known = places(source)
    plan = make_plan(source, recipe or Recipe.simple("W8A16"))
    becomes = {t.name: t.scheme for t in plan.quantized}
    chosen = {
        name: (place, becomes[place.site.tensor] if recipe else None)
        for name, place in known.items()
        if place.site.tensor in becomes
    }
    if not chosen:
        raise SchemeError(
            "No linear layer is quantized, so there is nothing for an adapter to start on. Look at --targets and --ignore."
        )
    small = next((n for n, (p, _) in chosen.items() if min(p.site.matrix_shape) < rank), None)
    if small is not None:
        shape = chosen[small][0].site.matrix_shape
        raise ShapeError(
            f"{small}: a rank of {rank} is more than a matrix of {shape[0]} × {shape[1]} has. Choose --rank {min(shape)} or less."
        )
    return chosen


def _rounding(scheme: LayerScheme | None, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A weight as its scheme rounds it to nearest, which is what factors are fitted to whatever method rounds the base."""
    if scheme is None:
        return lambda weight: weight
    block = 0 if scheme.inputs is None else scheme.inputs.spread

    def run(weight: torch.Tensor) -> torch.Tensor:
        q: QTensor = METHODS["rtn"].run(spread(weight, block) if block else weight, scheme.weights, name=name)
        return unspread(q.dequantize(), block) if block else q.dequantize()

    return run


def _write(out: Path, work: _Work, base: Checkpoint, source: OnDisk) -> None:
    """The adapter, in place of an older one."""
    folder = out / ADAPTER
    if folder.exists():
        shutil.rmtree(folder)
    scaled = {name: one.scaled(work.init.scaling) for name, one in work.factors.items()}
    alpha = work.init.rank if work.init.alpha is None else work.init.alpha
    task = "CAUSAL_LM" if is_causal(source.model) else None
    write_adapter(folder, scaled, alpha=alpha, base=str(out), task=task)
    packed = {n: digest(p.codes(base)) for n, (p, _) in work.chosen.items() if p.stored in base.placed}
    write_origin(folder, packed, init=work.init.name)


def _means(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    reductions = [r["nuclear_reduction"] for r in rows if r["nuclear_reduction"] is not None]
    return {
        "rounded_error": sum(r["rounded_error"] for r in rows) / len(rows),
        "error": sum(r["error"] for r in rows) / len(rows),
        "nuclear_reduction": sum(reductions) / len(reductions) if reductions else None,
    }


def _name_original(out: Path, model: Path) -> None:
    """The report names the user's model, not the copy that was rounded."""
    path = out / "report.json"
    write_json(path, {**read_report(path), "model": str(model)})
