"""What running a model on images, sound or pairs of texts says of its weights, told by shapes alone: `facts_by_shapes`,
and `unreached_by_text`.

Models that do not run on token ids alone are run on the meta device, where nothing is computed and nothing takes memory. Which inputs
they want is not asked of their class: of a few usual ones, those are taken that their forward pass names and gets through.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from arrondi.model.build import configs_in
from arrondi.model.flow import trace
from arrondi.model.site import Facts

_META = torch.device("meta")
_OTHERS = {"pixel_values", "input_features", "input_values"}
"""Inputs of towers that may stand beside text."""
_TOKENS = 8
_SAMPLES = 16_000
"""Of a second of sound."""
_FRAMES = 3_000
"""Of half a minute of sound, as Whisper reads it."""


@torch.no_grad()
def facts_by_shapes(model: Any) -> Facts:
    """What weights do, as far as one of the usual inputs takes the model; empty where none does.

    Args:
        model: of transformers, its parameters on the meta device; it is not changed.
    """
    shadow = copy.deepcopy(model).to("meta")
    params = dict(shadow.named_parameters(remove_duplicate=False))
    best = Facts()
    for inputs in usual_inputs(shadow):
        try:
            flow = trace(shadow, params, partial(shadow, **inputs))
        except Exception:  # it wants other inputs, and says so in its own way
            continue
        if flow.complete:
            return Facts.of(flow)
        best = best if best.leaders else Facts.of(flow)
    return best


@torch.no_grad()
def unreached_by_text(model: Any, units: str) -> frozenset[str] | None:
    """Parameters outside the blocks whose modules the model does not call on token ids: towers for images and sound.

    Args:
        model: of transformers, its parameters on the meta device; it is not changed.
        units: name of its list of blocks; "": there is none.

    Returns:
        their names; None: the model also takes other inputs, and shapes alone do not take it through token ids.
    """
    shadow, called = copy.deepcopy(model).to("meta"), set[str]()
    for name, module in shadow.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: called.add(name))
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device=_META)
    try:
        shadow(input_ids=ids)
    except Exception:  # routers may ask for numbers, and other models for other inputs
        known = inspect.signature(shadow.forward).parameters
        return None if "input_ids" in known and known.keys() & _OTHERS else frozenset()
    names = (n for n, _ in shadow.named_parameters(remove_duplicate=False) if not (units and n.startswith(f"{units}.")))
    return frozenset(n for n in names if n.rpartition(".")[0] not in called)


def usual_inputs(model: Any, device: torch.device = _META) -> Iterator[dict[str, torch.Tensor]]:
    """Images, films, sound and texts of the sizes that the config gives, for what the forward pass names."""
    known = inspect.signature(model.forward).parameters
    height, width = _pair(_setting(model, ("image_size",), 224))
    channels = _setting(model, ("num_channels", "in_channels"), 3)
    bins = _setting(model, ("num_mel_bins", "feature_size"), 80)
    frames = 2 * _setting(model, ("max_source_positions",), _FRAMES // 2)
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device=device)
    first: dict[str, list[tuple[int, ...]]] = {
        "pixel_values": [
            (1, channels, height, width),
            (1, _setting(model, ("num_frames",), 4), channels, height, width),
        ],
        "input_features": [(1, bins, frames), (1, frames, bins)],
        "input_values": [(1, _SAMPLES), (1, _setting(model, ("max_length",), 1024), bins), (1, 1, _SAMPLES)],
    }
    for name, sizes in first.items():
        for size in sizes if name in known else ():
            one = {name: torch.zeros(size, device=device)}
            yield one
            for other in ("input_ids", "decoder_input_ids"):
                if other in known:
                    yield {**one, other: ids}
    texts = [n for n in ("input_ids", "decoder_input_ids") if n in known]
    if texts:
        yield dict.fromkeys(texts, ids)


def _setting(model: Any, names: tuple[str, ...], usual: Any) -> Any:
    """The first of these that the config, or one inside it, gives a value."""
    parts = configs_in(model.config)
    found = (vars(part).get(name) for name in names for part in parts)
    return next((value for value in found if value), usual)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
