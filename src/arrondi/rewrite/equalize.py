"""Cross-layer equalization: what a layer makes and what the next ones make of it reach equally far in every channel. No data.

Owns: `Link` and `equalize`. With r1 the largest |w| of the row that makes a channel and r2 that of the columns that read it,
s = √(r1 · r2) / r2: afterwards both are √(r1 · r2). A matrix may be read in one link and read from in another, so links are
visited again and again until none of them changes anything. Of a norm r1 is how far its output reaches, 3|γ| + |β|, and its scale
has no common factor.

Source: Nagel et al. 2019, arXiv:1906.04721, section 4.1; norms as producers are the same thought.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from arrondi.rewrite.channels import centred, reduce_columns, usable

_SWEEPS = 40
_SETTLED = 1e-3


@dataclass(frozen=True)
class Link:
    """A producer and its consumers.

    Attributes:
        producer: (channels,) the reach of a norm, or the rows that make the channels, in their order: names of matrices with a
            part of their rows.
        consumers: names of the matrices that read them.
        channels: (n,) int64, the channel of every column of the consumers.
        count: channels.
    """

    producer: torch.Tensor | tuple[tuple[str, slice], ...]
    consumers: tuple[str, ...]
    channels: torch.Tensor
    count: int


def equalize(weights: Mapping[str, torch.Tensor], links: Sequence[Link]) -> list[torch.Tensor]:
    """The scale of every link: its producer is divided by it, the columns of its consumers are multiplied by it.

    Args:
        weights: name → (m, n). They are not changed, nor copied as wholes.
        links: in any order.

    Returns:
        (channels,) float32 for each link; 1 for channels that are nothing or are read by nothing.
    """
    rows = {name: torch.ones(len(w), device=w.device) for name, w in weights.items()}
    columns = {name: torch.ones(w.shape[1], device=w.device) for name, w in weights.items()}
    scales = [torch.ones(link.count, device=link.channels.device) for link in links]
    for _ in range(_SWEEPS):
        farthest = 0.0
        for k, link in enumerate(links):
            made = _made(weights, rows, columns, link, scales[k])
            read = torch.stack([_column_reach(weights[c], rows[c]) * columns[c] for c in link.consumers]).amax(0)
            read = reduce_columns(read, link.channels, link.count, "amax")
            step = torch.where((made > 0) & (read > 0), (made / read).sqrt(), 1.0)
            if isinstance(link.producer, torch.Tensor):
                step = centred(step)
            total = usable(scales[k] * step)
            step, scales[k] = total / scales[k], total
            for name in link.consumers:
                columns[name] *= step[link.channels]
            if not isinstance(link.producer, torch.Tensor):
                parts = step.split([part.stop - part.start for _, part in link.producer])
                for (name, part), own in zip(link.producer, parts, strict=True):
                    rows[name][part] /= own
            farthest = max(farthest, float((step - 1).abs().max()) if len(step) else 0.0)
        if farthest < _SETTLED:
            break
    return scales


def _made(
    weights: Mapping[str, torch.Tensor],
    rows: Mapping[str, torch.Tensor],
    columns: Mapping[str, torch.Tensor],
    link: Link,
    scale: torch.Tensor,
) -> torch.Tensor:
    """How far each channel reaches as it is made now."""
    if isinstance(link.producer, torch.Tensor):
        return link.producer.abs().float() / scale
    made = [_column_reach(weights[name][part].T, columns[name]) * rows[name][part] for name, part in link.producer]
    return torch.cat(made)


def _column_reach(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(n,) the largest |w| · rows of every column."""
    parts = zip(weight.split(1024), rows.split(1024), strict=True)
    return torch.stack([(w.abs().float() * r[:, None]).amax(0) for w, r in parts]).amax(0)
