"""Networks from files and exporters: `read_graph`. Whatever PyTorch exports comes through its own ONNX exporter.

The `onnx` package parses, checks and infers shapes; a graph of an older operator set is brought to `OPSET` by its converter.
"""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from arrondi.errors import ArrondiError, FileFormatError, MissingExtraError, SchemeError
from arrondi.graph.ir import CODES, Graph, Node, Value

OPSET: Final = 21
"""The operator set that graphs are brought to: the first whose QuantizeLinear knows 4 bits, 16 bits and blocks."""
_OLDEST: Final = 13
"""The oldest whose quantizers take one scale a channel."""
_BULK: Final = 1 << 16
"""Bytes of a constant, more than which say nothing of shapes."""
SUFFIXES: Final = (".onnx", ".pt2")
"""What files of networks are called."""


def is_graph_file(path: object) -> bool:
    """Whether a name is that of an ONNX file or a torch.export archive."""
    return isinstance(path, (str, Path)) and Path(path).suffix in SUFFIXES


def read_graph(source: Any, example: Any = None, *, varying: Sequence[int] = (0,)) -> Graph:
    """A network as a graph.

    Args:
        source: path of an `.onnx` file or of a torch.export archive (`.pt2`), an `onnx.ModelProto`, a
            `torch.export.ExportedProgram`, or a module.
        example: the arguments of a module, a tensor or a tuple of them.
        varying: axes of the example whose size may be another.

    Raises:
        FileFormatError: the file is not there, damaged, or of operators too old to be brought to `OPSET`.
        SchemeError: the module cannot be exported; the sentence says where.
    """
    if isinstance(source, torch.nn.Module):
        source = _exported(source, example, varying)
    if isinstance(source, torch.export.ExportedProgram):
        return _graph(_to_onnx(source), type(source).__name__)
    if not isinstance(source, (str, Path)):
        return _graph(source, "the model")
    path = Path(source)
    if not path.is_file():
        raise FileFormatError(f"{path} is no file. Give an .onnx file or a .pt2 archive of torch.export.")
    if path.suffix == ".pt2":
        try:
            with _silent("torch.export", "torch.onnx"):
                program = torch.export.load(path)
        except Exception as error:
            raise FileFormatError(
                f"{path} cannot be read as an archive of torch.export ({_first_line(error)}). Save it with torch.export.save."
            ) from error
        return _graph(_to_onnx(program), str(path))
    onnx = onnx_package()
    try:
        onnx.checker.check_model(path)  # weights beside the file, too, and that they lie beside it
        model = onnx.load(path)
    except Exception as error:  # protobuf and the checker raise errors of their own
        advice = "Put the file with its weights beside it" if "should be stored in" in str(error) else "Export it again"
        raise FileFormatError(f"{path} cannot be read as an ONNX model ({_first_line(error)}). {advice}.") from error
    try:
        return _graph(model, str(path))
    except ArrondiError:
        raise
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        StopIteration,
    ) as error:  # types and sizes that are none
        raise FileFormatError(f"{path} is damaged ({_first_line(error)}). Export it again.") from error


def file_bytes(path: str | Path) -> int:
    """Of an ONNX file, and of the constants that it has beside it."""
    held = onnx_package().load(path, load_external_data=False).graph.initializer
    beside = {entry.value for tensor in held for entry in tensor.external_data if entry.key == "location"}
    return Path(path).stat().st_size + sum((Path(path).parent / name).stat().st_size for name in beside)


def onnx_package() -> Any:
    """The `onnx` package.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import onnx
        import onnx.checker
        import onnx.external_data_helper
        import onnx.inliner
        import onnx.shape_inference
        import onnx.version_converter
    except ImportError as error:
        raise MissingExtraError("ONNX files need the package onnx: pip install 'arrondi[onnx]'.") from error
    return onnx


def _exported(module: torch.nn.Module, example: Any, varying: Sequence[int]) -> torch.export.ExportedProgram:
    if example is None:
        raise SchemeError("A module is traced by running it. Give an example of its inputs.")
    args = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    axes = dict.fromkeys(varying, torch.export.Dim.AUTO)
    dynamic = tuple(
        {a: d for a, d in axes.items() if a < t.ndim} if isinstance(t, torch.Tensor) else None for t in args
    )
    try:
        with _silent("torch.export", "torch.fx"):
            return torch.export.export(module.eval(), args, dynamic_shapes=dynamic)
    except Exception as error:  # torch's exporter has many
        raise SchemeError(
            f"{type(module).__name__} cannot be traced{_place(error)} ({_first_line(error)}). Quantize the module in memory instead, which needs no trace."
        ) from error


def _place(error: BaseException) -> str:
    """Where in the user's code a trace ended, if that is known."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*ours, "<"))]
    inner = [f for f in frames if f.name == "forward"]
    return f" at {inner[-1].filename}, line {inner[-1].lineno}: {inner[-1].line}" if inner else ""


def _need_onnxscript() -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "Exported PyTorch programs need the package onnxscript: pip install 'arrondi[onnx]'."
        ) from error


def _to_onnx(program: torch.export.ExportedProgram) -> Any:
    _need_onnxscript()
    try:
        with _silent("torch.onnx"):
            made = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
    except Exception as error:
        raise SchemeError(f"The program cannot be written with ONNX operators ({_first_line(error)}).") from error
    assert made is not None
    return made.model_proto


def export_program(module: torch.nn.Module, given: Mapping[str, torch.Tensor], outputs: list[str]) -> Any:
    """A module as PyTorch's exporter writes it (`torch.onnx.ONNXProgram`); the first two axes of what it is given vary.

    Raises:
        MissingExtraError: a package of the exporter is not installed.
        SchemeError: it cannot be traced.
    """
    onnx_package()
    _need_onnxscript()
    axes = {name: {0: "batch", 1: "sequence"} for name in given}
    try:
        with _silent("torch.onnx", "torch.export", "torch.fx"), torch.no_grad():
            made = torch.onnx.export(
                module, (), kwargs=dict(given), dynamo=True, dynamic_shapes=axes, opset_version=OPSET, verbose=False,
                input_names=list(given), output_names=outputs,
            )  # fmt: skip
    except Exception as error:  # torch's exporter has many
        inner = error.__cause__ or error  # the outer one tells of the exporter's steps
        raise SchemeError(f"The model cannot be traced{_place(inner)} ({_first_line(inner)}). Give a graph of it: --template NAME.onnx.") from error  # fmt: skip
    assert made is not None
    return made


def _graph(model: Any, where: str) -> Graph:
    onnx = onnx_package()
    if model.functions:  # operators that the file itself says in others
        try:
            model = onnx.inliner.inline_local_functions(model)
        except Exception as error:
            raise FileFormatError(
                f"{where} has functions of its own that cannot be put in their places ({_first_line(error)}). Export it again."
            ) from error
    model = _modern(model, where)
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    domains = {o.domain: o.version for o in model.opset_import if o.domain not in ("", "ai.onnx")}
    with contextlib.suppress(Exception):  # shapes only help
        model = _without_bulk(model, onnx.shape_inference.infer_shapes)
    proto = model.graph
    if proto.sparse_initializer:
        raise FileFormatError(f"{where} holds sparse constants, which are not read. Make them dense.")
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in proto.initializer}
    nodes: list[Node] = []
    used: set[str] = set()
    for position, node in enumerate(proto.node):
        op = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        if any(isinstance(n, bytes) for n in (node.name, op, *node.input, *node.output)):
            raise FileFormatError(f"{where} is damaged: the name of node {position} is no text. Export it again.")
        attrs = {a.name: _plain(onnx.helper.get_attribute_value(a), onnx) for a in node.attribute}
        if op == "Constant":
            constants[node.output[0]] = _constant(attrs)
            continue
        outer = _outer_values(node, onnx)
        if outer:
            raise SchemeError(
                f"{where}: {node.name or op} is control flow that depends on the data ({op}, which reads {outer[0]} from outside), and cannot be traced. Export the network with one branch, or quantize the PyTorch module in memory."
            )
        if op == "QuantizeLinear":
            attrs[CODES] = _code_type(attrs, node, constants, proto, onnx)
        name = node.name or f"{op}_{position}"
        name = name if name not in used else f"{name}_{position}"
        used.add(name)
        nodes.append(Node(name, op, tuple(node.input), tuple(node.output), attrs))
    shapes = {v.name: _shape(v) for v in proto.value_info}
    ends = [[_value(v, onnx) for v in part if v.name not in constants] for part in (proto.input, proto.output)]
    graph = Graph(
        proto.name or "graph", tuple(nodes), tuple(ends[0]), tuple(ends[1]), constants, opset, shapes, domains
    )
    return graph.with_nodes(nodes)


def _outer_values(node: Any, onnx: Any) -> list[str]:
    """What the branches of a node read without being given it."""
    found: list[str] = []
    for attribute in node.attribute:
        for body in [*([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else []), *attribute.graphs]:
            own = {v.name for v in (*body.input, *body.initializer)} | {n for inner in body.node for n in inner.output}
            read = [*(n for inner in body.node for n in inner.input), *(v.name for v in body.output)]
            read += [n for inner in body.node for n in _outer_values(inner, onnx)]
            found += [n for n in read if n and n not in own]
    return found


def _modern(model: Any, where: str) -> Any:
    """The model with the operators of `OPSET`, or those it has, if the converter cannot and they are new enough."""
    onnx = onnx_package()
    own = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    newest = onnx.defs.onnx_opset_version()
    if own > newest:
        raise FileFormatError(f"{where} uses operator set {own}, and the onnx package that is installed knows {newest}. Export it with opset {OPSET}.")  # fmt: skip
    if own >= OPSET:
        return model
    try:
        return _without_bulk(model, lambda light: onnx.version_converter.convert_version(light, OPSET))
    except Exception as error:
        if own >= _OLDEST:
            return model
        raise FileFormatError(
            f"{where} uses operator set {own}, which cannot be brought to {OPSET} ({_first_line(error)}). Export it with opset {_OLDEST} or later."
        ) from error


def _without_bulk(model: Any, change: Callable[[Any], Any]) -> Any:
    """What a change makes of a model whose large constants it does not see: `onnx` hands no more than two gigabytes to itself."""
    held = {t.name: t.raw_data for t in model.graph.initializer if len(t.raw_data) > _BULK}
    try:
        for tensor in model.graph.initializer:
            if tensor.name in held:
                tensor.ClearField("raw_data")
        made = change(model)
        for tensor in made.graph.initializer:
            if tensor.name in held:
                tensor.raw_data = held[tensor.name]
        return made
    finally:
        for tensor in model.graph.initializer:
            if tensor.name in held:
                tensor.raw_data = held[tensor.name]


def _code_type(attrs: Mapping[str, Any], node: Any, constants: Mapping[str, np.ndarray], proto: Any, onnx: Any) -> str:
    """The type of the codes that a node makes: that of its zero point, or what it says."""
    zero = node.input[2] if len(node.input) > 2 else ""
    if zero in constants:
        return constants[zero].dtype.name
    given = next(
        (v.type.tensor_type.elem_type for v in (*proto.input, *proto.value_info) if zero and v.name == zero), 0
    )
    kind = given or attrs.get("output_dtype", 0) or onnx.TensorProto.UINT8
    return str(onnx.helper.tensor_dtype_to_np_dtype(kind).name)


def _constant(attrs: Mapping[str, Any]) -> np.ndarray:
    (value,) = attrs.values()
    kinds = {int: np.int64, float: np.float32}
    if isinstance(value, np.ndarray):
        return value
    first = value[0] if isinstance(value, list) and value else value
    return np.array(value, dtype=kinds.get(type(first)))


def _plain(value: Any, onnx: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v, onnx) for v in value]
    return value


def _value(info: Any, onnx: Any) -> Value:
    return Value(
        info.name, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)), _shape(info)
    )


def _shape(info: Any) -> tuple[int | str | None, ...]:
    dims = info.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in dims)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


@contextlib.contextmanager
def _silent(*names: str) -> Iterator[None]:
    """Exporters tell their progress, and what went wrong, to whoever listens."""
    before = {name: logging.getLogger(name).disabled for name in names}
    quiet = [logger for n, logger in logging.root.manager.loggerDict.items() if n.startswith(names) and isinstance(logger, logging.Logger)]  # fmt: skip
    levels = {logger: logger.level for logger in quiet}
    for logger in quiet:
        logger.setLevel(logging.CRITICAL)
    for name in names:
        logging.getLogger(name).disabled = True
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        for name, disabled in before.items():
            logging.getLogger(name).disabled = disabled
