"""Modules that were quantized in memory, to files and back: `remember`, `save`, `load_into`.

A module that no transformers config builds is saved with its parameters' own names. It is loaded into a fresh module of the same
shape, which the caller makes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from arrondi.arguments import check_arguments
from arrondi.checkpoint import (
    CHOSEN,
    LAYOUTS,
    Checkpoint,
    LayerValues,
    Layout,
    ModelFacts,
    Placed,
    ShardPlan,
    ShardWriter,
    readers_of,
    write_config,
)
from arrondi.errors import FileFormatError, OutputError, SchemeError, unknown
from arrondi.model import InMemory, Site
from arrondi.model.bi_attention import stored_attention
from arrondi.nn import QConv, QEmbedding, QLinear, QStack
from arrondi.runtime.install import install
from arrondi.runtime.save import Held, SavePretrained
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import Grid
from arrondi.tensor.rows import stack_rows

_LAYERS: Final = "arrondi_layers"
"""Attribute of a quantized module: what `save` must know of its layers."""

_FACTS: Final = "arrondi_facts"
"""Attribute of a quantized module: its `ModelFacts`."""

_SHARD_BYTES: Final = 5_000_000_000


@dataclass(frozen=True)
class _Layer:
    """One quantized tensor of a module.

    Attributes:
        placed: how a file holds it.
        values: its numbers, where no module holds packed codes (recurrent cells); else None.
        inputs: the static grid of its inputs, which stacks do not hold.
        modules: all that hold it: an embedding and the head that is tied to it are two.
    """

    placed: Placed
    values: LayerValues | None
    inputs: Grid | None
    modules: tuple[str, ...] = ()


def remember(
    model: nn.Module,
    placed: Mapping[str, Placed],
    values: Mapping[str, LayerValues],
    loose: Collection[str],
    facts: ModelFacts,
    sites: Iterable[Site],
) -> None:
    """Note on a module which of its tensors are quantized, so that it can be saved.

    Args:
        placed: every quantized tensor by its name.
        values: the numbers of each.
        loose: those that no module holds packed.
        facts: what a layout must know of the module.
        sites: of the module before it was quantized.
    """
    paths: dict[str, list[str]] = {}
    for site in sites:
        paths.setdefault(site.tensor, []).extend(site.modules)
    layers = {
        n: _Layer(p, values[n] if n in loose else None, values[n].inputs, tuple(paths.get(n, ())))
        for n, p in placed.items()
    }
    setattr(model, _LAYERS, {**getattr(model, _LAYERS, {}), **layers})
    setattr(model, _FACTS, facts)
    if hasattr(model, "save_pretrained"):
        own: Any = model
        own.save_pretrained = _SavePretrained(Held(model))


class _SavePretrained:
    """What `save_pretrained` of a transformers model that was quantized in memory is: its own would drop every packed weight."""

    def __init__(self, model: Held) -> None:
        self.model = model

    def __reduce__(self) -> tuple[Any, ...]:
        return _SavePretrained, (self.model,)

    def __call__(self, save_directory: str | Path, **options: Any) -> None:
        if options:
            raise SchemeError(
                f"save_pretrained of a quantized model takes no {', '.join(sorted(options))}. Give the directory alone, or use arrondi.save."
            )
        save(self.model(), save_directory)


@torch.no_grad()
def save(model: nn.Module, out: str | Path, *, to: str | None = None) -> dict[str, Any]:
    """Write a quantized module into a directory, with the codes that it holds.

    Args:
        model: what `arrondi.quantize` or `arrondi.load` gave.
        out: directory to write; it may hold no model.
        to: a name of `LAYOUTS`; None takes the most widely read of `CHOSEN` that holds every layer.

    Returns:
        `layout`, its name, and `readers`: who reads the files, as in the report of `arrondi.quantize`.

    Raises:
        SchemeError: the model holds nothing quantized, or the layout cannot hold it.
        OutputError: a model is there already, or it cannot be written.
    """
    check_arguments(save, locals())
    out = Path(out)
    layers: dict[str, _Layer] | None = getattr(model, _LAYERS, None)
    if layers is None:
        own = getattr(model, "save_pretrained", None)
        if isinstance(own, SavePretrained):
            own(out)
            written = Checkpoint.open(out)
            assert written.layout is not None
            return _said(written.layout, list(written.placed.values()), ModelFacts())
        raise SchemeError("Nothing in this model is quantized. Quantize it first.")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is no directory. Name another one.")
    if (out / "config.json").exists() or any(out.glob("*.safetensors")):
        raise OutputError(f"{out}: a model is there already. Name another directory.")
    _refuse_unknown(model, layers)
    chosen = _layout(to, [layer.placed for layer in layers.values()])
    files: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        files |= chosen.write(layer.placed, layer.values or _values(model, name, layer.inputs))
    plain = {n: t for n, t in _plain(model).items() if n not in layers}
    files |= plain
    placed, known_facts = [layer.placed for layer in layers.values()], getattr(model, _FACTS)
    words = chosen.metadata(placed, list(plain), known_facts)
    plan = ShardPlan.split([(n, t.dtype, tuple(t.shape)) for n, t in files.items()], _SHARD_BYTES, words)
    writer = ShardWriter(out, plan)
    for name, tensor in files.items():
        writer.put(name, tensor.detach().cpu())
    writer.publish()
    config: Any = getattr(model, "config", None)
    facts = config.to_dict() if hasattr(config, "to_dict") else {}
    facts["architectures"] = facts.get("architectures") or [type(model).__name__]
    facts |= stored_attention(config)
    kept = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    described = chosen.config(placed, kept, known_facts)
    known: Any = model
    if hasattr(model, "can_generate") and known.can_generate():
        known.generation_config.save_pretrained(out)
    write_config(out / "config.json", {**facts, **chosen.described(described)})
    return _said(chosen, placed, known_facts)


def _said(layout: Layout, placed: list[Placed], facts: ModelFacts) -> dict[str, Any]:
    return {"layout": layout.name, "readers": [asdict(verdict) for verdict in readers_of(placed, layout, facts)]}


@torch.no_grad()
def load_into(model: nn.Module, path: str | Path) -> nn.Module:
    """Fill a fresh module with a saved one: its layers are replaced by layers that hold packed codes.

    Args:
        model: of the class and shape that was saved; changed in place.
        path: directory that `save` wrote.

    Returns:
        the module, in eval mode.

    Raises:
        FileFormatError: the directory holds another model.
    """
    checkpoint = Checkpoint.open(path)
    source = InMemory(model.eval())
    state = model.state_dict(keep_vars=True)
    missing = [n for n in checkpoint.names if n not in state]
    lacking = [n for n in source.names.shapes if n not in checkpoint.names]
    if missing or lacking:
        raise FileFormatError(
            f"{path}: holds another model than this {type(model).__name__}: {(missing or lacking)[0]} is only in one of them."
        )
    for name, tensor in state.items():
        if name in checkpoint.names:
            stored = checkpoint.dense(name)
            if tuple(stored.shape) != tuple(tensor.shape):
                raise FileFormatError(
                    f"{path}: {name} has shape {tuple(stored.shape)}, the module {tuple(tensor.shape)}."
                )
            tensor.copy_(stored)
    by_param: dict[str, list[Site]] = {}
    every = source.sites
    for site in every:
        if site.tensor in checkpoint.placed:
            by_param.setdefault(site.param, []).append(site)
    found: dict[str, LayerValues] = {}
    loose: set[str] = set()
    for param, sites in by_param.items():
        layers = {s.tensor: (checkpoint.layer(s.tensor), checkpoint.inputs_of(s.tensor)) for s in sites}
        found |= {name: values for name, (values, _) in layers.items()}
        if not install(model, source.names, sites, layers, source.names.params[param].dtype):
            loose |= layers.keys()
    described = checkpoint.folder.config.get("quantization_config") or {}
    remember(model, checkpoint.placed, found, loose, ModelFacts(whole=described.get("dequantize") is True), every)
    return model


def _refuse_unknown(model: nn.Module, layers: Mapping[str, _Layer]) -> None:
    """Refuse packed layers of which nothing is remembered: they came with a model that was loaded, before others were quantized."""
    known = {n.rpartition(".")[0] for n in layers} | set(layers) | {m for one in layers.values() for m in one.modules}
    for name, module in model.named_modules():
        alike = {n for n, m in model.named_modules(remove_duplicate=False) if m is module}
        if isinstance(module, (QLinear, QConv, QEmbedding, QStack)) and not alike & known:
            raise SchemeError(
                f"{name} was quantized before {next(iter(layers))}, in a model that was loaded. Quantize the original model as a whole."
            )


def _layout(name: str | None, placed: list[Placed]) -> Any:
    if name is not None and name not in LAYOUTS:
        raise unknown("layout", name, LAYOUTS)
    reasons = {n: next((r for p in placed if (r := LAYOUTS[n].refuse(p))), None) for n in ([name] if name else CHOSEN)}
    for found, reason in reasons.items():
        if reason is None:
            return LAYOUTS[found]
    found, reason = list(reasons.items())[-1]
    raise SchemeError(f"The layout {found} cannot hold this model: {reason}. Leave `to` out, or choose another scheme.")


def _values(model: nn.Module, name: str, inputs: Grid | None) -> LayerValues:
    """The numbers of a layer, unpacked from the module that holds it."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    held: Any = getattr(owner, leaf) if isinstance(getattr(owner, leaf, None), QStack) else owner
    if isinstance(held, QStack):
        return LayerValues(stack_rows([piece for pieces in held.unpack() for piece in pieces]), inputs)
    if not isinstance(held, (QLinear, QConv, QEmbedding)):
        raise SchemeError(f"{name} was replaced after it was quantized. Quantize the model again.")
    weight: QTensor = held.unpack()
    scale = held._buffers.get("input_scale")
    if scale is None:
        return LayerValues(weight)
    zero, offset = (held._buffers.get(f"input_{part}") for part in ("zero_point", "offset"))
    zero, offset = (None if p is None else p.reshape(1, 1) for p in (zero, offset))
    return LayerValues(weight, Grid(scale.reshape(1, 1), zero, offset))


def _plain(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and stored buffers, each memory once."""
    found: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if place not in seen or tensor.numel() == 0:
            found[name] = tensor.contiguous()
        seen.add(place)
    return found
