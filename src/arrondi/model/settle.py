"""Whether running a model unit by unit computes what the model computes: `settle`.

One batch is sent through the model's own forward pass, each block loaded only while it runs; beside it every block is run as the
chain would run it. Arguments that depend on earlier blocks, caches, extra inputs: whatever differs shows here, and the model is
then run as a whole, if it fits in memory, or refused. What blocks keep for each other between calls shows only when several
batches take turns: `confirm` looks at the first batch again when it has gone through all units among the others.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from arrondi.errors import ArrondiError, SchemeError
from arrondi.model.chain import REFUSALS, Chain, Inputs, hidden_of, rest_of, said
from arrondi.model.flow import trace
from arrondi.model.handed import Handed, leaves
from arrondi.model.in_memory import InMemory
from arrondi.model.site import Facts
from arrondi.model.source import OnDisk
from arrondi.model.streams import Stream
from arrondi.model.whole import Whole

_TOLERANCE = 1e-4
"""Of the largest number: float32 sums in the same order differ by less."""
_PIECE = 1 << 20
"""Numbers that are compared at a time."""
_ENDS = 4
"""Positions of every window that `confirm` looks at."""


@torch.no_grad()
def settle(source: OnDisk | InMemory, batch: Any) -> list[str]:
    """Decide how a source is run: unit by unit, or as a whole; `source.units` says it afterwards.

    Args:
        batch: as the model will be called; the first of those that will follow, if there will be a `confirm`.

    Returns:
        sentences for people, when the model is run as a whole.

    Raises:
        SchemeError: it runs neither way on this data.
    """
    if isinstance(source, InMemory) and source.straight:
        return []  # its parts are what the module itself runs
    try:
        if not source.units:
            raise SchemeError("The model has no list of blocks.")
        expected = _compare(Chain(source.instance(), source.units), Inputs.of(batch))
        source.settled = expected[:, -_ENDS:].clone()
        return []
    except SchemeError as reason:
        why = str(reason)
    need = source.to_load
    if need > _memory() // 4:
        raise SchemeError(
            f"{why} Run as a whole it would need twice {need / 1e9:.1f} GB of memory. Use --method rtn or hqq with neither --calibration nor --eval-text."
        )
    whole = Whole(source.instance())
    whole.fill(0)
    _, (call,) = whole.begin(Inputs.of(batch))
    params = {n: whole.instance.parameter(n) for n in whole.instance.empty}
    try:
        flow = trace(whole.model, params, lambda: whole.run(0, torch.zeros(0), call))
    except SchemeError as error:
        raise SchemeError(
            f"{error} So it can be neither calibrated nor measured on text: use --method rtn or hqq with neither --calibration nor --eval-text."
        ) from error
    finally:
        whole.drop(0)
    source.run_as_whole(Facts.of(flow))
    return [f"{why} The model is kept in memory as a whole and run so."]


@torch.no_grad()
def confirm(source: OnDisk | InMemory, stream: Stream) -> None:
    """Compare the first batch of the original, after its last unit, with what the model itself computed for it.

    Call it inside `stream.units.outer_loaded()`.

    Args:
        source: which was settled on that batch.
        stream: of the original.

    Raises:
        SchemeError: they differ.
    """
    elsewhere = stream.units.instance.device.type != "cpu"  # where sums have another order
    if source.whole or source.settled is None or elsewhere:
        return
    ends = [stream.output(j, rows)[:, -_ENDS:] for j, rows in stream.pieces() if j == 0]
    if not _close(torch.cat(ends), source.settled):
        raise SchemeError(
            f"The blocks {source.units}.* keep something for each other between two calls, so the model cannot be followed on several batches. Use --method rtn or hqq with neither --calibration nor --eval-text."
        )


def _compare(chain: Chain, inputs: Inputs) -> torch.Tensor:
    """Every block and the end of the model, run by the chain and by the model itself.

    Returns:
        what the model computes.

    Raises:
        SchemeError: they differ; the sentence says where.
    """
    with chain.outer_loaded():
        _, calls = chain.begin(inputs)
    final: list[torch.Tensor] = []
    seen: list[int] = []
    handed: dict[Handed, torch.Tensor] = {}

    def see(i: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append(i)
        if seen != list(range(len(seen))) or len(seen) > len(chain):
            raise SchemeError(f"The blocks {chain.prefix}.* are not run once each in order.")
        hidden = args[0] if args and isinstance(args[0], torch.Tensor) else kwargs["hidden_states"]
        try:
            ours = hidden_of(chain.call(i, hidden.clone(), calls[i].filled(handed.__getitem__)), hidden)
        except REFUSALS as error:
            raise SchemeError(f"{chain.prefix}.{i} needs what earlier blocks leave behind ({said(error)}).") from error
        theirs = hidden_of(output, hidden)
        if not _close(ours, theirs):
            raise SchemeError(f"{chain.prefix}.{i} computes something else when it is run by itself.")
        final[:] = [theirs]
        handed.update({Handed(i, n): t for n, t in enumerate(leaves(rest_of(output)))})

    try:
        expected = chain.whole(inputs, see)
    except ArrondiError:
        raise
    except REFUSALS as error:
        raise SchemeError(f"The model does not run on this data ({said(error)}).") from error
    with chain.outer_loaded():
        if not final or not _close(chain.finish(inputs, final[0]), expected):
            raise SchemeError(f"What follows {chain.prefix} computes something else when it is run by itself.")
    return expected


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal but for rounding; what is not finite in one is the same in the other."""
    if ours.shape != theirs.shape:
        return False
    pieces = list(zip(ours.reshape(-1).split(_PIECE), theirs.reshape(-1).split(_PIECE), strict=True))
    largest = max((float(t.abs().nan_to_num(0.0, 0.0).max()) for _, t in pieces), default=0.0)
    limit = _TOLERANCE * max(largest, 1e-6)
    return all(torch.allclose(o, t, rtol=0.0, atol=limit, equal_nan=True) for o, t in pieces)


def _memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
