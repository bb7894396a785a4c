"""A model as an ONNX graph whose weights are packed: `convert_to_onnx`; or as one of floats: `dequantize_to_onnx`.

The graph is the source's own where that is an ONNX file, a template's, or what PyTorch exports of the model. Each of its weights is looked up in the
source by name and put in its place in a form that ONNX Runtime multiplies; what the layout's own rules give back is compared with the
source, as for every other target.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.checkpoint import LAYOUTS, Checkpoint, LayerValues, Layout, Placed, write_config
from arrondi.checkpoint.containers.graph_weights import CODES, INDEX, SCALE, ZERO
from arrondi.checkpoint.containers.onnx.view import SUFFIX, View, is_onnx, view_of
from arrondi.checkpoint.containers.tensor_file import DTYPE_NAMES, DTYPES
from arrondi.checkpoint.layouts.onnx.layer import BLOCKS, LINEAR, TURNED, form_of
from arrondi.checkpoint.layouts.onnx.linear import Grid, grid_of
from arrondi.errors import FileFormatError, OutputError, SchemeError
from arrondi.formats import LayerScheme, PerGroup
from arrondi.formats.scheme import ScaleType
from arrondi.graph.bulk import check_onnx_file, write_bulk
from arrondi.graph.packed import Change, Part, Place, kind_of, places_of, replace_weights
from arrondi.model import OnDisk
from arrondi.pipeline.convert_choice import Choice, chosen, converted
from arrondi.pipeline.manifest import check_apart
from arrondi.pipeline.onnx_export import export_model
from arrondi.pipeline.restore import unquantized

_SCALES: Final[Mapping[str, ScaleType]] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BLOCKS_FROM: Final = 21
_TWO_BITS_FROM: Final = 25
"""Operator sets from which DequantizeLinear has blocks and 4 bits, and 2 bits."""

Progress = Callable[[int, int, str], None]
Row = dict[str, Any]


def write_onnx(
    model: str | Path,
    out: Path,
    to: str,
    *,
    template: str | Path | None = None,
    wanted: LayerScheme | None = None,
    exact_only: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a model as a graph with packed weights; for the arguments and what is returned see `convert_model`."""
    checkpoint = Checkpoint.open(model)
    source = checkpoint.folder.path
    alone = out.suffix.lower() == SUFFIX
    file = out if alone else out / f"model{SUFFIX}"
    check_apart(source, out)
    check_out(out, overwrite)
    write = partial(convert_to_onnx, checkpoint, out=file, to=to, wanted=wanted, exact_only=exact_only, overwrite=overwrite, progress=progress)  # fmt: skip
    if template is not None or is_onnx(source):
        graph = Path(template) if template is not None else source
        if not is_onnx(graph):
            raise FileFormatError(f"{graph}: is no ONNX file. A template for --to {to} is a graph of the same model.")
        result = write(graph=graph)
    else:
        with tempfile.TemporaryDirectory(prefix=".arrondi-", dir=_folder(out)) as folder:
            graph = Path(folder) / f"model{SUFFIX}"
            names = export_model(OnDisk(checkpoint), graph)
            own = {name: tensor for name, tensor in names.items() if tensor in checkpoint.placed}
            result = write(graph=graph, names=own)
    if not alone:
        checkpoint.folder.copy_other_files(out)
        if checkpoint.folder.config.get("model_type"):
            write_config(out / "config.json", unquantized(checkpoint.folder.config))
    return result


def check_out(out: Path, overwrite: bool) -> None:
    """Whether a graph may be written there: a file, or a directory that will hold it.

    Raises:
        OutputError: something is there.
    """
    if out.suffix.lower() == SUFFIX:
        check_onnx_file(out, overwrite)
    elif out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: is there already and is not empty. Choose another output, or add --overwrite.")


def _folder(out: Path) -> Path:
    """An existing folder on the disk that the output will be on."""
    return next(p for p in (out.parent, *out.absolute().parents) if p.is_dir())


def convert_to_onnx(
    checkpoint: Checkpoint,
    graph: Path,
    out: Path,
    to: str,
    *,
    names: Mapping[str, str] | None = None,
    wanted: LayerScheme | None = None,
    exact_only: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a graph with the weights of a checkpoint.

    Args:
        checkpoint: whose quantized weights are put in.
        graph: the ONNX file that they are put into.
        out: the file to write.
        to: "onnx" (MatMulNBits where it can hold a weight) or "onnx-qdq" (DequantizeLinear alone).
        names: weight of the graph → tensor of the checkpoint; None: they have the same names, up to a prefix.
        wanted: what weights become that neither form can hold as they are.
        exact_only: refuse where a value would change.

    Returns:
        as `convert_model`.

    Raises:
        SchemeError: no weight of the graph is in the checkpoint, or a value would change though it must not.
        OutputError: something is there, or the disk is full.
    """
    check_onnx_file(out, overwrite)
    check_apart(graph, out)
    view = view_of(graph)
    places = places_of(view)
    own = names if names is not None else _same_names(places, checkpoint)
    rows: dict[str, Row] = {n: _kept_row(n, checkpoint) for n in checkpoint.names}
    changes: dict[str, Change] = {}
    for i, (name, tensor) in enumerate(own.items()):
        if progress:
            progress(i, len(own), name)
        placed = checkpoint.placed[tensor]
        if name not in places or _size(placed) != math.prod(places[name].shape):
            continue
        choice, layout = _chosen(checkpoint.layer(tensor), placed, places[name], LAYOUTS[to], view, wanted)
        rows[tensor] = _row(tensor, placed, choice)
        changes[name] = _change(checkpoint, tensor, places[name], choice, layout, placed)
    if checkpoint.placed and not changes:
        raise SchemeError(
            f"{graph}: none of its weights is one of the quantized ones of {checkpoint.folder.path}, such as {next(iter(checkpoint.placed))}. Give a graph of the same model."
        )
    lost = [r["name"] for r in rows.values() if r["verdict"] not in ("exact", "copied")]
    if exact_only and lost:
        raise SchemeError(
            f"{to} cannot hold every value as it is: {', '.join(lost[:5])}. Leave --exact-only out, or choose another target."
        )
    nbytes = write_bulk(*replace_weights(view, graph, changes, places), out, overwrite=overwrite)
    listed = list(rows.values())
    counts = {v: sum(r["verdict"] == v for r in listed) for v in ("exact", "rescaled", "requantized", "copied")}
    return {"to": to, "tensors": listed, **counts, "bytes": nbytes}


def both_graphs(model: str | Path, out: Path) -> bool:
    """Whether an ONNX file is to become another."""
    return out.suffix.lower() == SUFFIX and is_onnx(Path(model))


def dequantize_to_onnx(
    source: Path, out: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Write an ONNX file with floats in the place of its packed weights.

    Returns:
        tensors restored, tensors that stay packed because an operator multiplies their codes, and bytes written.
    """
    check_onnx_file(out, overwrite)
    check_apart(source, out)
    checkpoint, view = Checkpoint.open(source), view_of(source)
    places = {n: p for n, p in places_of(view).items() if n in checkpoint.placed}
    if not places:
        raise SchemeError(f"{source}: holds no weight in few bits that could be floats as well. Use it as it is.")
    changes = {}
    for i, (name, place) in enumerate(places.items()):
        if progress:
            progress(i, len(places), name)
        shape = place.shape[::-1] if place.turned else place.shape
        dtype = DTYPES[place.dtype]

        def give(name: str = name, place: Place = place, dtype: torch.dtype = dtype) -> torch.Tensor:
            value = checkpoint.dense(name, dtype)
            return (value.t() if place.turned else value).contiguous()

        changes[name] = Change("float", tensors={"": (place.dtype, shape, math.prod(shape) * dtype.itemsize, give)})
    nbytes = write_bulk(*replace_weights(view, source, changes, places), out, overwrite=overwrite)
    return {"restored": len(changes), "kept": len(checkpoint.placed) - len(changes), "bytes": nbytes}


def _same_names(places: Mapping[str, Place], checkpoint: Checkpoint) -> dict[str, str]:
    """Weight of the graph → quantized tensor of the checkpoint: of the same name, or the only one whose name ends with the other."""
    found = {}
    for name in places:
        if name in checkpoint.placed:
            found[name] = name
            continue
        near = [t for t in checkpoint.placed if t.endswith(f".{name}") or name.endswith(f".{t}")]
        if len(near) == 1:
            found[name] = near[0]
    return found


def _size(placed: Placed) -> int:
    return math.prod(placed.shape)


def _chosen(
    values: LayerValues, placed: Placed, place: Place, layout: Layout, view: View, wanted: LayerScheme | None
) -> tuple[Choice, Layout]:
    """What a weight becomes, and by which layout: of products the target's, of others the standard operators'."""
    narrow = _restricted(layout if place.products else LAYOUTS["onnx-qdq"], _SCALES[place.dtype], view)
    held = replace(placed, kind=place.kind if placed.kind != "Conv1D" else placed.kind)
    found = chosen(replace(values, inputs=None, outputs=None), replace(held, scheme=LayerScheme(placed.scheme.weights)), narrow, wanted)  # fmt: skip
    if isinstance(found, str):
        raise SchemeError(f"{placed.name} ({placed.scheme}) cannot be stored as {layout.name}: {found}.")
    return found, narrow


def _restricted(layout: Layout, scale: ScaleType, view: View) -> Layout:
    """A layout with scales of the graph's own type, and what the graph's operator set has."""
    opset = view.model.opsets.get("", 0)

    def refuse(placed: Placed) -> str | None:
        weights = placed.scheme.weights
        if weights.scale != scale:
            return f"the graph computes in {scale}, and so its scales are, not {weights.scale}"
        why = layout.refuse(placed)
        if why is not None or form_of(placed, layout.name == "onnx-qdq") == BLOCKS:
            return why
        bits, blocks = weights.format.bits, grid_of(placed) != Grid() and isinstance(weights.granularity, PerGroup)
        need = _TWO_BITS_FROM if bits == 2 else _BLOCKS_FROM if bits == 4 or blocks else 13
        return None if opset >= need else f"operator set {opset} does not have it, but {need}. Export the graph again, or use --to onnx"  # fmt: skip

    return replace(layout, refuse=refuse, fit=lambda scheme: layout.fit(scheme).with_scale(scale))


def _change(
    checkpoint: Checkpoint, tensor: str, place: Place, choice: Choice, layout: Layout, placed: Placed
) -> Change:
    """The parts of a weight, which are made when they are written."""
    standard = layout.name == "onnx-qdq"
    indexed = placed.indexed and choice.verdict != "requantized"
    plain = Placed(place.name, place.shape, LayerScheme(choice.scheme.weights), kind=place.kind, indexed=indexed)
    if form_of(plain, standard) != BLOCKS:
        plain = replace(plain, storage=TURNED if place.turned else LINEAR)
    kept: dict[str, torch.Tensor] = {}

    def give(end: str) -> torch.Tensor:
        if not kept:
            q = converted(checkpoint.layer(tensor).weight, choice)
            kept.update(layout.write(plain, LayerValues(q)))
        return kept.pop(place.name + end)

    narrow = choice.scheme.weights.format.name if form_of(plain, standard) != BLOCKS else ""
    tensors: dict[str, Part] = {}
    for name, dtype, shape in layout.specs(plain):
        end = name.removeprefix(place.name)
        kind = kind_of(narrow, dtype) if end in (CODES, ZERO) else DTYPE_NAMES[dtype]
        logical = _logical(plain, end, shape, place.turned) if narrow else shape
        tensors[end] = (kind, logical, math.prod(shape) * dtype.itemsize, partial(give, end))
    if form_of(plain, standard) == BLOCKS:
        size = choice.scheme.weights.granularity
        assert isinstance(size, PerGroup)
        return Change("blocks", {"bits": choice.scheme.weights.format.bits, "block_size": size.size}, tensors)
    grid = grid_of(plain, place.turned)
    assert grid is not None
    attrs = ({} if grid.axis is None else {"axis": grid.axis}) | ({"block_size": grid.block} if grid.block else {})
    return Change("linear", attrs, tensors)


def _logical(placed: Placed, end: str, shape: tuple[int, ...], turned: bool) -> tuple[int, ...]:
    """The shape of a part of a DequantizeLinear, in codes and not in bytes."""
    grid = grid_of(placed, turned)
    assert grid is not None and end in (CODES, SCALE, ZERO, INDEX)
    stored = placed.shape[::-1] if turned else placed.shape
    if end == CODES:
        return stored
    if grid.axis is None:
        return ()
    if not grid.block:
        return (stored[grid.axis],)
    return tuple(-(-n // grid.block) if i == grid.axis else n for i, n in enumerate(stored))


def _row(name: str, placed: Placed, choice: Choice) -> Row:
    row: Row = {"name": name, "from": str(placed.scheme), "to": str(choice.scheme), "verdict": choice.verdict}
    return row | ({"max_error": choice.error, "sqnr_db": choice.sqnr_db} if choice.verdict != "exact" else {})


def _kept_row(name: str, checkpoint: Checkpoint) -> Row:
    held = checkpoint.placed.get(name)
    if held is None:
        return {"name": name, "verdict": "copied"}
    kept = str(held.scheme) if is_onnx(checkpoint.folder.path) else "float32"
    return {"name": name, "from": str(held.scheme), "to": kept, "verdict": "exact"}
