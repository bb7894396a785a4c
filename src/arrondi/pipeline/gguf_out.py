"""A model as one GGUF file: `write_gguf`, and `check_gguf` before the work. The header comes from the source if that is GGUF, from a template, or from the model's config.

Numbers that are not quantized keep their type where llama.cpp multiplies by it; vectors are float32, as its programs want them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from arrondi.checkpoint import LAYOUTS, LayerValues, ModelFacts
from arrondi.checkpoint.containers.gguf.config import unsaid
from arrondi.checkpoint.containers.gguf.encode import GGUFPlan, GGUFWriter
from arrondi.checkpoint.containers.gguf.header import Field, Header, is_gguf, read_header, split_files
from arrondi.checkpoint.containers.gguf.metadata import architecture_of, fields_of_config, text_of
from arrondi.checkpoint.containers.gguf.naming import Place
from arrondi.checkpoint.containers.gguf.rope import factors_of
from arrondi.checkpoint.containers.gguf.tokens import caveats_of
from arrondi.checkpoint.containers.gguf.vocabulary import fields_of_tokenizer, named
from arrondi.checkpoint.containers.hub import title_of
from arrondi.checkpoint.containers.tensor_file import DTYPE_NAMES
from arrondi.checkpoint.containers.turn import Turn
from arrondi.errors import FileFormatError, OutputError, SchemeError
from arrondi.model import OnDisk
from arrondi.pipeline.gguf_parts import Parts, parts_of
from arrondi.pipeline.resolve import PlannedTensor

_UINT32: Final = 4
_FILE_TYPES: Final = {"F32": 0, "F16": 1, "BF16": 32}
_MIXED: Final[Mapping[str, Mapping[str, str]]] = {
    "Q2_K": {"Q3_K": "Q2_K", "": "Q2_K_S"},
    "Q3_K": {"Q4_K": "Q3_K_M", "Q5_K": "Q3_K_L", "": "Q3_K_S"},
    "Q4_K": {"Q6_K": "Q4_K_M", "": "Q4_K_S"},
    "Q5_K": {"Q6_K": "Q5_K_M", "": "Q5_K_S"},
    "MXFP4": {"": "MXFP4_MOE"},
}
"""Type of most matrices → a type of others in the blocks, "" for any, and what llama.cpp calls such a mix; the first that is there."""
_OF_SPLITS: Final = "split."
_TOKENS: Final = "token_embd.weight"

Values = Callable[[str], LayerValues]
Progress = Callable[[int, int, str], None]


class Written(NamedTuple):
    """What was written.

    Attributes:
        nbytes: of the file.
        notes: sentences about what a reader should know of it.
        left: tensors that it has no place for.
    """

    nbytes: int
    notes: list[str]
    left: frozenset[str]


class Named(NamedTuple):
    """What a file is called that was made in several steps.

    Attributes:
        model: its name; "": that of its directory.
        mix: that by which its types were chosen; "": it is found by the types.
    """

    model: str = ""
    mix: str = ""


def write_gguf(
    source: OnDisk,
    planned: list[PlannedTensor],
    values: Values,
    out: Path,
    *,
    template: str | Path | None = None,
    called: Named = Named(),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write a model whose quantized tensors are blocks of ggml.

    Args:
        source: the model.
        planned: every tensor, with a scheme that the layout "gguf" holds where it is quantized.
        values: the layer of a quantized tensor.
        out: the file.
        template: a GGUF file of the same architecture, whose keys are taken.
        called: its names.
        overwrite: a file that is there may be replaced.

    Raises:
        SchemeError: a tensor or an architecture that GGUF has no name for.
        OutputError: something is there, or the disk is full.
    """
    check_file(out, overwrite)
    begun = _Begun.of(source, planned, out, template, called)
    places, writer = begun.parts.places, begun.writer
    try:
        placed = [t for t in planned if t.name in places]
        for i, t in enumerate(placed):
            if progress:
                progress(i, len(placed), t.name)
            place = places[t.name]
            writer.put(place.name, _stored(source, t, values, place, begun.types[t.name]), place.index, place.count)
        writer.publish()
    finally:
        writer.close()
    notes = [*begun.parts.notes, *caveats_of(begun.fields)]
    return Written(out.stat().st_size, notes, frozenset(begun.parts.left))


def check_gguf(source: OnDisk, planned: list[PlannedTensor], template: str | Path | None) -> None:
    """Whether a GGUF file can say what a model is, before anything is done: one is begun, whose tensors have no values.

    Raises:
        SchemeError, FileFormatError: as `write_gguf`.
    """
    with tempfile.TemporaryDirectory(prefix="arrondi-") as folder:
        _Begun.of(source, planned, Path(folder) / "m.gguf", template, Named()).writer.close()


@dataclass(frozen=True)
class _Begun:
    """A file that says all of a model but its values.

    Attributes:
        parts: the places of the tensors.
        types: tensor → what it is stored as.
        fields: the keys of the header.
        writer: of the file.
    """

    parts: Parts
    types: Mapping[str, str]
    fields: Mapping[str, Field]
    writer: GGUFWriter

    @classmethod
    def of(
        cls, source: OnDisk, planned: list[PlannedTensor], out: Path, template: str | Path | None, called: Named
    ) -> _Begun:
        parts = parts_of(source)
        types = {t.name: _type_of(t) for t in planned if t.name in parts.places}
        layout: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, place in parts.places.items():
            stack = (place.count,) if place.count > 1 else ()
            found = (types[name], (*stack, *place.shape))
            if layout.setdefault(place.name, found) != found:
                raise SchemeError(
                    f"{name} is {found[0]}, and others of its stack {layout[place.name][0]}. Give all experts of a layer one scheme."
                )
        config = text_of(source.model.config)
        factors = factors_of(config)
        layout |= {name: ("F32", tuple(factor.shape)) for name, factor in factors.items()}
        fields = _fields(source, template, called, layout)
        writer = GGUFWriter(out, GGUFPlan(fields, layout))
        try:
            for name, factor in factors.items():
                writer.put(name, factor)
            reason = unsaid(config, read_header(writer.part)) if template is None else None
            if reason is not None:
                raise SchemeError(f"{source.where}: {reason}. Give a GGUF file of this model: --template F16.gguf.")
        except BaseException:
            writer.close()
            raise
        return cls(parts, types, fields, writer)


def check_file(out: Path, overwrite: bool) -> None:
    """Whether a GGUF file may be written there.

    Raises:
        OutputError: it is a directory or is named like one, or something is there.
    """
    if out.is_dir() or out.suffix.lower() != ".gguf":
        raise OutputError(f"{out}: names no GGUF file. Give one that ends with .gguf, such as {out / 'model.gguf'}.")
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: is there already. Choose another name, or add --overwrite.")


def _type_of(tensor: PlannedTensor) -> str:
    """The type of a tensor as ggml calls it."""
    if tensor.status == "quantized":
        described = LAYOUTS["gguf"].config([tensor.placed], [], ModelFacts())["types"][tensor.name]
        return str(described if isinstance(described, str) else described["type"])
    if len([n for n in tensor.shape if n != 1]) < 2 and tensor.dtype.is_floating_point:
        return "F32"
    return DTYPE_NAMES[tensor.dtype]


def _stored(source: OnDisk, tensor: PlannedTensor, values: Values, place: Place, kind: str) -> torch.Tensor:
    """The bytes of a tensor as they lie in the file."""
    form = place.form
    if tensor.status == "quantized":
        (raw,) = LAYOUTS["gguf"].write(tensor.placed, values(tensor.name)).values()
        return raw if form.rows is None else raw[form.rows.argsort()]
    value = source.checkpoint.dense(tensor.name, torch.float32 if kind == "F32" else tensor.dtype)
    return Turn(kind, place.shape, form.rows, form.transposed, form.plus).undo(value)


def _fields(
    source: OnDisk,
    template: str | Path | None,
    called: Named,
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
) -> dict[str, Field]:
    """The keys of the header."""
    path = Path(template) if template is not None else source.checkpoint.folder.path
    if template is not None or is_gguf(path):
        fields = {
            k: f
            for k, f in header_of_template(path, source.model.config).fields.items()
            if not k.startswith(_OF_SPLITS)
        }
        if template is None and _same_types(path, layout):
            return fields
    else:
        where = source.checkpoint.folder.home
        rows = next((s for n, (_, s) in layout.items() if n == _TOKENS), (0,))[0]
        tokenizer = fields_of_tokenizer(where, rows)
        name = named(called.model or title_of(where), tokenizer)
        fields = fields_of_config(source.model.config, name) | tokenizer
    return fields | {
        "general.file_type": Field(_UINT32, None, _file_type(layout, called.mix)),
        "general.quantization_version": Field(_UINT32, None, 2),
    }


def header_of_template(path: str | Path, config: Any) -> Header:
    """The header of a GGUF file whose keys a model takes.

    Raises:
        FileFormatError: it is no GGUF file.
        SchemeError: it is of another architecture.
    """
    path = Path(path)
    if not is_gguf(path):
        raise FileFormatError(f"{path}: is no GGUF file. A template is one of the same model, such as its F16 file.")
    header, wanted = read_header(split_files(path)[0]), architecture_of(config)
    if header.architecture != wanted:
        raise SchemeError(
            f"{path}: of the architecture {header.architecture!r}, and the model is {wanted!r}. Give a file of the same model."
        )
    return header


def _same_types(path: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> bool:
    """Whether a file has every tensor in the type in which it will be written: then what it says of itself stays true."""
    stored = {n: s.type for file in split_files(path) for n, s in read_header(file).tensors.items()}
    return stored == {n: kind for n, (kind, _) in layout.items()}


def _file_type(layout: Mapping[str, tuple[str, tuple[int, ...]]], mix: str = "") -> int:
    """The number by which llama.cpp calls a file: of the mix that its types were chosen by, else of most matrices in its blocks and what the others make it."""
    from gguf import LlamaFileType

    names: dict[str, Any] = {t.name: t.value for t in LlamaFileType}
    if mix:
        return int(names[f"MOSTLY_{mix}"])
    counts: dict[str, int] = {}
    for name, (kind, shape) in layout.items():
        if len(shape) > 1 and name.startswith("blk."):
            counts[kind] = counts.get(kind, 0) + torch.Size(shape).numel()
    most = max(counts, key=lambda k: counts[k], default="F32")
    if most in _FILE_TYPES:
        return _FILE_TYPES[most]
    others = _MIXED.get(most, {"": most})
    name = next(name for other, name in others.items() if not other or other in counts)
    return int(names.get(f"MOSTLY_{name}", 0))
