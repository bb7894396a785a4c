"""Why inputs of 8 bits fail on some models: `inspect_outliers`.

A few channels of the hidden states are tens of times as large as the others. One scale for a whole tensor, or for a token, then leaves
the others a few of the 256 levels (Dettmers et al. 2022, arXiv:2208.07339; Xiao et al. 2022, arXiv:2211.10438).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.arguments import check_arguments
from arrondi.checkpoint import Checkpoint
from arrondi.errors import DataError, SchemeError
from arrondi.measure.calling import Calling
from arrondi.measure.compare import BATCH_TOKENS
from arrondi.measure.data import Data, check_windows, chosen, read_windows, reads_text
from arrondi.measure.text import fit_length, load_tokenizer, positions_of
from arrondi.model import Budget, OnDisk, Stream, device_named, settle, walk
from arrondi.tensor.checks import layer_scheme_of
from arrondi.tensor.nearest import fake_quantize

LARGE: Final = 20.0
"""A channel that reaches so many times what the median channel reaches is an outlier."""
_GRIDS: Final = {"tensor": "int8/tensor", "token": "int8/token", "group": "int8/g128"}
"""How inputs might be rounded: one scale for a batch, for every token, for 128 columns of a token."""
_SCHEMES: Final = {name: layer_scheme_of(f"w=int8/channel,a={grid}").inputs for name, grid in _GRIDS.items()}
_HIDDEN_LIMIT: Final = 512 << 20


class _Inputs:
    """What was seen of one activation.

    Attributes:
        absmax: (n,) of every channel.
        powers: Σ x, Σ x², Σ x³, Σ x⁴ in float64.
        errors: grid → Σ (x - x̂)².
        count: numbers.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.absmax = torch.zeros(())
        self.powers = torch.zeros(4, dtype=torch.float64)
        self.errors = dict.fromkeys(_GRIDS, 0.0)
        self.count = 0

    def add(self, x: torch.Tensor) -> None:
        """Some more tokens (…, n)."""
        x = x.detach().float().reshape(-1, x.shape[-1])
        if not x.numel():
            return
        self.absmax = torch.maximum(self.absmax.to(x.device), x.abs().amax(0))
        wide = x.double()
        self.powers += torch.stack([(wide**k).sum() for k in range(1, 5)]).cpu()
        self.count += x.numel()
        for name, inputs in _SCHEMES.items():
            assert inputs is not None
            self.errors[name] += float((fake_quantize(x, inputs.scheme, name=self.name) - x).double().square().sum())

    def row(self) -> dict[str, Any]:
        """In numbers; errors relative to Σ x²."""
        m1, m2, m3, m4 = (self.powers / self.count).tolist()
        variance = m2 - m1**2
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        large = (self.absmax > LARGE * self.absmax.median()).nonzero().flatten()
        large = large[self.absmax[large].argsort(descending=True)]
        squares = float(self.powers[1])
        return {
            "channels": len(self.absmax),
            "absmax": float(self.absmax.max()),
            "median_channel": float(self.absmax.median()),
            "kurtosis": fourth / variance**2 if variance > 0 else 0.0,
            "outliers": large.tolist(),
            "int8_error": {name: error / squares if squares else 0.0 for name, error in self.errors.items()},
        }


def inspect_outliers(
    path: str | Path,
    calibration: Data,
    *,
    samples: int = 16,
    seq_len: int = 512,
    seed: int = 0,
    column: str | None = None,
    device: str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """How the inputs of the linear layers of a model's blocks are spread on a text, and what rounding them to int8 would do.

    The original is followed block by block in float32.

    Args:
        path: a model directory.
        calibration: what to read; see `arrondi.measure.read_windows`.
        samples, seq_len, seed, column: as in `TextOptions`.
        device: where units are run.
        progress: called with (blocks done, blocks, what).

    Returns:
        `inputs`, each with `read_by` (names of weights), `channels`, `absmax`, `median_channel` (the median over channels of each
        channel's largest magnitude), `kurtosis` of all its numbers (3 for a normal distribution), `outliers` (channels that
        reach more than 20 times the median channel, the largest first), `int8_error` (Σ (x - x̂)² / Σ x² with one scale for a
        batch, a token, or 128 columns of a token); `tokens` and `notes`.

    Raises:
        DataError: no text, or too little.
        SchemeError: the model is quantized, or does not run block by block.
    """
    check_arguments(inspect_outliers, locals())
    checkpoint = Checkpoint.open(path)
    if checkpoint.quantized:
        raise SchemeError(f"{path} is already quantized. Inspect the original model.")
    source, where = OnDisk(checkpoint), device_named(device)
    seq_len, note = fit_length(seq_len, positions_of(source.model))
    tokenizer = load_tokenizer(source.home) if reads_text(calibration) else None
    windows = chosen(read_windows(calibration, tokenizer, seq_len, "calibration text", column), samples, seed)
    check_windows(windows, source.model)
    calling = Calling.of(source.model)
    batches = [calling(ids) for ids in windows.batches(max(BATCH_TOKENS // windows.seq_len, 1))]
    notes = [*([note] if note else []), *calling.notes, *settle(source, calling(windows.ids[:1]))]
    seen, readers = _followed(source, batches, where, progress or (lambda done, total, what: None))
    rows = [{"read_by": readers[m], **one.row()} for m, one in seen.items() if one.count]
    if not rows:
        raise DataError(f"{path}: no linear layer of its blocks is reached by the text, so there is nothing to show.")
    return {"path": str(path), "tokens": windows.ids.numel(), "inputs": rows, "notes": notes}


def _followed(
    source: OnDisk,
    batches: list[torch.Tensor | dict[str, torch.Tensor]],
    device: torch.device,
    report: Callable[[int, int, str], None],
) -> tuple[dict[str, _Inputs], dict[str, list[str]]]:
    """First module that reads an activation → what was seen of it, and the weights that read it."""
    instance = source.instance(device=device)
    units = source.units_of(instance)
    first: dict[str, str] = {}
    readers: dict[str, list[str]] = {}
    for site in source.sites:
        if site.kind == "linear" and site.block is not None and site.param_index is None:
            module = first.setdefault(site.reads or site.name, site.modules[0])
            readers.setdefault(module, []).append(site.name)
    seen = {module: _Inputs(f"the input of {names[0]}") for module, names in readers.items()}
    with (
        torch.no_grad(),
        ExitStack() as hooks,
        Stream(units, batches, Budget(_HIDDEN_LIMIT), Path(tempfile.gettempdir())) as stream,
    ):
        stream.begin()
        for module, one in seen.items():
            handle = instance.model.get_submodule(module).register_forward_pre_hook(_watcher(one), with_kwargs=True)
            hooks.callback(handle.remove)
        for i in walk([[stream]]):
            report(i, len(units), f"block {i + 1} of {len(units)}")
    return seen, readers


def _watcher(one: _Inputs) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        one.add(args[0] if args else next(iter(kwargs.values())))

    return hook
