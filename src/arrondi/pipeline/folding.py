"""Scales that move from what makes an activation to what reads it: `Joint`.

Owns: which of a model's folds a step can make use of (`joints_of`), what they change (`changed_by`), and `fold`, which divides a
producer by a scale and multiplies the columns of its consumers by the same. What the model computes stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from arrondi.formats import LayerScheme
from arrondi.model import Site, Source
from arrondi.model.folds import Fold, Producer
from arrondi.pipeline.step import Declared

if TYPE_CHECKING:
    from arrondi.pipeline.work import Work


@dataclass(frozen=True)
class Joint:
    """A fold with its sites.

    Attributes:
        readers: all sites that multiply the activation.
        rows: the rows that make it, in the order of its channels: sites with a part of their rows; none if a norm does.
        producer: what makes it.
        norm: the tensor of the file that is the norm's weight, "" where rows make it.
        bias: the tensor of the file that is scaled along, "" if there is none.
        channels: column of the readers → channel of the producer.
    """

    readers: tuple[Site, ...]
    rows: tuple[tuple[Site, slice], ...]
    producer: Producer
    norm: str
    bias: str
    channels: tuple[int, ...]

    @property
    def sites(self) -> tuple[Site, ...]:
        by_name = {s.name: s for s in (*self.readers, *(site for site, _ in self.rows))}
        return tuple(by_name.values())

    @property
    def count(self) -> int:
        """Channels."""
        return self.producer.count

    @property
    def block(self) -> int | None:
        """The unit in which it lies."""
        return self.readers[0].block

    def columns(self, device: torch.device) -> torch.Tensor:
        """`channels` as a tensor, int64."""
        return torch.tensor(self.channels, device=device)


def joints_of(
    source: Source, folds: Sequence[Fold], picked: Sequence[Site], schemes: Mapping[str, LayerScheme | None]
) -> tuple[list[Joint], dict[str, list[str]]]:
    """What can be scaled for some sites, and why not → the other sites.

    Args:
        folds: of the source.
        picked: sites that a step was asked to treat. Whatever else reads the same activation is changed along.
        schemes: of all sites that are planned; None for those that are kept.
    """
    wanted = {s.name for s in picked if schemes.get(s.name) is not None}
    sites = {s.name: s for s in source.sites}
    joints: list[Joint] = []
    refusals: dict[str, list[str]] = {}
    for found in folds:
        own = [name for name in found.consumers if name in wanted]
        if not own:
            continue
        made = _joint(source, sites, found, schemes)
        if isinstance(made, Joint):
            joints.append(made)
        else:
            refusals.setdefault(made, []).extend(own)
    # Norms first: what a matrix reads is scaled before its rows are, so that errors of rows weigh what they do in the original.
    return sorted(joints, key=lambda joint: bool(joint.rows)), refusals


def _joint(
    source: Source, sites: Mapping[str, Site], found: Fold, schemes: Mapping[str, LayerScheme | None]
) -> Joint | str:
    """A fold with its sites, or why it cannot be done, as the end of a sentence."""
    producer = found.producer
    if producer is None or found.reason is not None:
        return found.reason or "what makes its input is not known"
    readers = tuple(sites[name] for name in found.consumers)
    rows = _rows(source, producer) if producer.kind == "linear" else ()
    whole = (*readers, *(site for site, _ in rows))
    for site in whole:
        if site.name not in schemes:
            return f"{site.name} is a part of a stored tensor that stays as it is"
        if len(source.names.names_of(site.param)) > 1:
            return f"{site.name} is tied to another parameter"
        if len(site.shape) != 2 or site.kind in ("embedding", "recurrent"):
            return f"{site.name} is no linear layer"
    names = []
    for param in (producer.param if producer.kind == "norm" else None, producer.bias):
        group = None if param is None else source.names.group(param)
        if group is not None and (group.convert is not None or len(source.names.names_of(str(param))) > 1):
            return f"{param} is stored together with others"
        names.append("" if group is None else group.sources[0])
    if producer.kind == "linear" and sum(part.stop - part.start for _, part in rows) != producer.count:
        return f"{producer.param}, which makes its input, is no matrix of a layer"
    return Joint(readers, rows, producer, names[0], names[1], found.channels)


def _rows(source: Source, producer: Producer) -> tuple[tuple[Site, slice], ...]:
    """The sites of a parameter with those of their rows that are the producer's, in order."""
    found = []
    for site in source.sites:
        if (site.param, site.param_index) != (producer.param, producer.index):
            continue
        axis = site.columns if site.param_flipped else site.rows
        wanted = producer.rows or slice(axis.start, axis.stop)
        low, high = max(axis.start, wanted.start), min(axis.stop, wanted.stop)
        if low < high:
            found.append((low, site, slice(low - axis.start, high - axis.start)))
    return tuple((site, part) for _, site, part in sorted(found, key=lambda one: one[0]))


def changed_by(source: Source, joints: Sequence[Joint], **options: Any) -> Declared:
    """What folds change besides the weights of their sites."""
    return Declared(changed=tuple(dict.fromkeys(n for j in joints for n in (j.norm, j.bias) if n)))


def fold(work: Work, joint: Joint, scale: torch.Tensor) -> None:
    """Divide a producer by a scale and multiply the columns of its readers by it.

    A norm counts in its stored type, so readers are multiplied by what it was really divided by: the function stays the same to
    float32's last digits. A bias counts in its stored type too.

    Args:
        scale: (channels,) float32, positive.
    """
    columns = joint.columns(scale.device)
    read = torch.zeros_like(scale, dtype=torch.bool).index_fill_(0, columns, True)
    scale = torch.where(read, scale, 1.0)
    if joint.norm:
        scale = _divide_norm(work, joint, scale)
    else:
        parts = scale.split([part.stop - part.start for _, part in joint.rows])
        for (site, part), own in zip(joint.rows, parts, strict=True):
            work.weight(site)[part].div_(own[:, None])
    if joint.bias:
        bias = work.tensor(joint.bias).clone()
        bias.view(-1)[joint.producer.rows or slice(None)] /= scale
        work.change(joint.bias, bias)
    for site in joint.readers:
        work.weight(site).mul_(scale[columns])


def gain_of(work: Work, joint: Joint) -> torch.Tensor:
    """(channels,) float32, what a norm multiplies by."""
    return work.tensor(joint.norm).float().view(-1) + joint.producer.offset


def _divide_norm(work: Work, joint: Joint, scale: torch.Tensor) -> torch.Tensor:
    """Divide a norm by a scale as far as its stored type can hold it; what it was divided by in truth."""
    offset, before = joint.producer.offset, gain_of(work, joint)
    kept = (before / scale - offset).to(work.plan.source.stored_dtype(joint.norm)).float() + offset
    # Where the stored type has no number for it, the channel stays as it is.
    lost = ~torch.isfinite(kept) | ((kept == 0) & (before != 0))
    scale = torch.where(lost, 1.0, scale)
    work.change(joint.norm, (before / scale - offset).view_as(work.tensor(joint.norm)))
    after = gain_of(work, joint)
    return torch.where(before == 0, scale, before / torch.where(after == 0, 1.0, after))
