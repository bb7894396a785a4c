"""Whole models of latent layers: made, undone, split and packed.

Owns: `make_latent`, `make_plain`, `split_ternary`, `pack` and `coded`.

A trained model becomes an ordinary arrondi model here: its layers are packed by the installer of every quantized model, so that
`arrondi.save`, `arrondi.load`, the kernels and the layouts know nothing of training.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from arrondi.arguments import said
from arrondi.checkpoint import LayerValues
from arrondi.errors import SchemeError
from arrondi.formats import Scheme, scale_shape
from arrondi.model import InMemory
from arrondi.pipeline.module import install_plan
from arrondi.pipeline.plan import check, make_plan
from arrondi.pipeline.recipe import Recipe, Rule, matches
from arrondi.pipeline.resolve import SMALL_OUTPUT, PlannedTensor
from arrondi.rounding.rtn import rtn
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.rows import stack_rows
from arrondi.tensor.tables import nearest, round_table
from arrondi.training.binary import split_halves
from arrondi.training.latent import LATENT, _Latent, options_of, refuse_latent, to_latent, to_plain
from arrondi.training.ternary import twn

Model = TypeVar("Model", bound=nn.Module)


def make_latent(
    model: Model,
    method: str,
    *,
    targets: Iterable[str] | None = None,
    ignore: Iterable[str] | None = None,
    **options: Any,
) -> Model:
    """Train the layers of a model in few bits: they are replaced by latent ones that share their parameters.

    Args:
        model: changed in place.
        method: a name of `LATENT`.
        targets: class names ("Linear", "Conv2d", "Embedding"), paths of modules, or "re:" and a pattern; None: linear layers and
            convolutions. Layers of very few outputs, which are not packed, are trained so only where their path is given.
        ignore: the same, of layers that stay; None: the head that gives a language model's logits.
        options: of the method, see `arrondi.training.latent.Options`.

    Returns:
        the model. A warning names layers of the targets' classes that compute something of their own and stay in float.

    Raises:
        SchemeError: a selector finds nothing, or no layer is left, or no such method or option.
    """
    options_of(method, **options)
    if isinstance(model, nn.Linear | nn.Conv2d | nn.Embedding):
        raise SchemeError(
            f"{method} puts other layers into a model, and this is one layer, {type(model).__name__}. Put it into torch.nn.Sequential first."
        )
    asked = () if targets is None else selectors(targets, "targets")
    targets, ignore = (
        asked if targets is not None else ("Linear", "Conv2d"),
        None if ignore is None else selectors(ignore, "ignore"),
    )
    known: Any = model
    head = known.get_output_embeddings() if ignore is None and hasattr(model, "get_output_embeddings") else None
    used: set[str] = set()
    left: list[str] = []

    def made(path: str, layer: nn.Module) -> nn.Module | None:
        classes = tuple(c.__name__ for c in type(layer).__mro__)
        hits = {t for t in targets if matches(t, [path], classes)}
        kept = {t for t in ignore or () if matches(t, [path], classes)}
        used.update(hits | kept)
        if (
            not hits
            or kept
            or layer is head
            or isinstance(layer, _Latent)
            or not isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding)
        ):
            return None
        if path not in hits and (reason := refuse_latent(layer)) is not None:
            left.append(f"{path} ({reason})")
            return None
        if path not in hits and layer.weight.shape[0] < SMALL_OUTPUT:
            return None
        return to_latent(layer, method, **options)

    changed = _replace(model, made)
    if unused := [t for t in (*asked, *(ignore or ())) if t not in used]:
        raise SchemeError(f"The selector {unused[0]!r} finds no layer of {type(model).__name__}. Check its spelling.")
    if changed and left:
        warnings.warn(f"Some layers stay in float: {'; '.join(left)}", stacklevel=2)
    if not changed:
        raise SchemeError(
            f"{type(model).__name__} has no layer that {method} could train, which are Linear, Conv2d and Embedding, not classes that compute in a way of their own. Name some in targets."
        )
    return model


def make_plain(model: Model, *, rounded: bool = False) -> Model:
    """Ordinary layers again, in place: with their latent weights, or with the rounded ones (and inputs) that they multiplied by."""
    _replace(model, lambda path, layer: to_plain(layer, rounded=rounded) if isinstance(layer, _Latent) else None)
    return model


@torch.no_grad()
def split_ternary(model: Model) -> Model:
    """BinaryBERT's step from a trained ternary model to a binary one that computes the same: every weight of method `twn` becomes two
    weights of one bit whose products are added.

    Where BinaryBERT starts from a model of half the width, both halves together are as wide as the whole: 2·m·n bits for a ternary
    weight of m·n. A packed layer holds them as the four sums ±α₁ ± α₂ of its rows, two bits a weight, in a table.

    Args:
        model: changed in place; its other layers stay, and tables stay ternary.

    Raises:
        SchemeError: it has no layer of method `twn`.
        DataError: a weight has no halves, see `arrondi.training.binary.split_halves`.
    """

    def halved(path: str, layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, _Latent) or layer.method != "twn" or isinstance(layer, nn.Embedding):
            return None
        own = layer.options
        first, second = split_halves(layer.weight, twn(layer.weight, own.threshold, rows=own.rows))
        made = to_latent(to_plain(layer, rounded=False), "split", rows=own.rows, inputs=own.inputs)
        made.weight.copy_(first)
        made.get_parameter("weight_2").copy_(second)
        return made

    if not _replace(model, halved):
        raise SchemeError(f"{type(model).__name__} has no ternary layer to split. Train it by method 'twn' first.")
    return model


@torch.no_grad()
def pack(model: Model) -> Model:
    """Packed layers in the place of latent ones: what `arrondi.quantize` gives of a module, with the weights that were trained.

    Args:
        model: changed in place. Layers that were not trained in few bits stay as they are.

    Returns:
        the model, for `arrondi.save` (a transformers model is read back by `arrondi.load`, another by `arrondi.load_into`).

    Raises:
        SchemeError: nothing was trained in few bits, or a layer that rounds its inputs cannot be held packed; the model is as it was.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, _Latent)}
    if not layers:
        raise SchemeError(
            f"{type(model).__name__} has no layer that was trained in few bits. Convert and train it first."
        )
    latent = {f"{path}.linear" if layer.norm is not None else path: layer for path, layer in layers.items()}
    rules = [Rule(layer.scheme, _step(layer), (path,)) for path, layer in latent.items()]
    replaced = _replace(
        model, lambda path, layer: to_plain(layer, inputs=False) if isinstance(layer, _Latent) else None
    )
    training, source = model.training, InMemory(model)
    try:
        source.learn_alone()
        plan = make_plan(source, Recipe(tuple(rules), ignore=()))
        check(plan)
        found = {m for t in plan.quantized for s in t.sites for m in s.modules}
        if lost := [path for path, layer in latent.items() if path not in found and layer.scheme.inputs is not None]:
            why = next(t.reason for t in plan.tensors for s in t.sites if lost[0] in s.modules)
            raise SchemeError(
                f"{lost[0]} rounds its inputs and cannot be held packed: {why}. Leave it in float when the model is converted."
            )
        values = {t.name: _values(t, source, latent) for t in plan.quantized}
    except BaseException:
        for paths, old, _ in replaced:
            for path in paths:
                model.set_submodule(path, old)
        raise
    install_plan(source, plan, values)
    return model.train(training)


def _step(layer: _Latent) -> str:
    """The rounding method that stands for what was trained, in plans and reports."""
    return "kmeans" if layer.scheme.weights.format.learned else "rtn"


def _values(planned: PlannedTensor, source: InMemory, latent: Mapping[str, _Latent]) -> LayerValues:
    """The numbers of a tensor whose layers hold rounded weights."""
    assert planned.scheme is not None
    layer = next(latent[m] for m in planned.sites[0].modules if m in latent)
    weights = [s.region(source.names.params[s.param]) for s in planned.sites]
    grid = layer.input_grid if planned.scheme.inputs is not None else None
    return LayerValues(stack_rows([coded(w, planned.scheme.weights) for w in weights]), grid)


def coded(weight: torch.Tensor, scheme: Scheme) -> QTensor:
    """The codes of a weight (m, n) that is on its grid already, as rounding to nearest gives them; of four values a row, their table."""
    if not scheme.format.learned:
        return rtn(weight, scheme)
    assert scheme.table is not None
    size = weight.float().abs()
    low, high = (
        (size.amin(1, keepdim=True), size.amax(1, keepdim=True))
        if scheme.table.rows
        else (size.amin().reshape(1, 1), size.amax().reshape(1, 1))
    )
    table = round_table(torch.cat((-high, -low, low, high), 1), scheme.table)
    tiles = weight.float() if scheme.table.rows else weight.float().reshape(1, -1)
    ones = torch.ones(scale_shape(scheme.granularity, tuple(weight.shape)), device=weight.device)
    return QTensor(nearest(tiles, table).view_as(weight), ones, None, None, scheme, table=table)


def _replace(
    model: nn.Module, change: Callable[[str, nn.Module], nn.Module | None]
) -> list[tuple[list[str], nn.Module, nn.Module]]:
    """Put other layers in the place of some, one for each however often it is used: (paths, old, new) of each."""
    found: dict[nn.Module, tuple[list[str], nn.Module, nn.Module]] = {}
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        if layer in found:
            found[layer][0].append(path)
        elif path and (made := change(path, layer)) is not None:
            found[layer] = ([path], layer, made)
    for paths, _, made in found.values():
        for path in paths:
            model.set_submodule(path, made)
    return list(found.values())


def selectors(given: Iterable[str], what: str) -> tuple[str, ...]:
    """What a user named to be taken or left, one word or several.

    Raises:
        SchemeError: it is something else.
    """
    words = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(w, str) for w in words):
        raise SchemeError(f"{what} are class names, paths of modules or patterns, got {said(words)}.")
    return words


__all__ = ["LATENT", "make_latent", "make_plain", "pack", "split_ternary"]
