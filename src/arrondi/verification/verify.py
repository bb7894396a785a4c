"""A finished output in the programs that it is for: `verify_model`.

Each consumer opens the file in a process of its own and is asked the same as our own dequantization; what it gives may differ by what it rounds on
the way, which is computed for this very model, and by no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from arrondi.arguments import check_arguments
from arrondi.checkpoint.containers.onnx.view import graph_in
from arrondi.errors import MissingExtraError, SchemeError, unknown
from arrondi.graph import is_graph_file
from arrondi.verification.consumers import CONSUMERS, Consumer
from arrondi.verification.interpreters import Interpreter, variable
from arrondi.verification.judge import judged
from arrondi.verification.network import network_subject
from arrondi.verification.process import ask
from arrondi.verification.subject import Subject, model_subject

SECONDS: Final = 600.0

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class _Found:
    """A consumer that is installed."""

    consumer: Consumer
    interpreter: Interpreter
    versions: Mapping[str, str | None]


def verify_model(
    path: str | Path,
    consumers: Iterable[str] | None = None,
    *,
    pythons: Mapping[str, str] | None = None,
    data: str | Path | None = None,
    timeout: float = SECONDS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Open an output in its consumers, and compare what they compute with what its codes mean.

    Args:
        path: a model directory, a GGUF file, an ONNX file, or a directory with one.
        consumers: names of `arrondi.verification.consumers.CONSUMERS`; None: all that are installed and read it.
        pythons: consumer → the interpreter that has it. Else ARRONDI_LLAMA_CPP, ARRONDI_TRANSFORMERS, … name it, or it is this one.
        data: samples for a network, as for `evaluate`; None: numbers are made up.
        timeout: seconds that a consumer may take.

    Returns:
        `model`, `layout`, `prompt` (what was asked, in words), `ok`; `consumers`, each with `consumer`, `version`, `python`, `ok`, `max_difference`,
        `relative_difference` (root mean squares, see `arrondi.verification.difference`) and `bound`, `reason` of the bound, `exact_difference` to what the files
        mean without what the consumer rounds, `agreement` of the largest outputs, and `failure`, a sentence or None; and `skipped`, each with
        `consumer` and `reason`.

    Raises:
        SchemeError: there is no such consumer, it does not read this layout, or the interpreter is none.
        MissingExtraError: it is not installed, or none is.
        FileFormatError: the file cannot be read here.
    """
    check_arguments(verify_model, locals())
    pythons = pythons or {}
    asked = None if consumers is None else list(dict.fromkeys(consumers))
    for name in (*(asked or ()), *pythons):
        if name not in CONSUMERS:
            raise unknown("consumer", name, CONSUMERS)
    where = graph_in(Path(path))
    network = is_graph_file(where)
    if data is not None and not network:
        raise SchemeError("Samples are for networks of ONNX operators; a model of transformers is given a text. Leave data out.")  # fmt: skip
    subject = network_subject(where, data) if network else model_subject(path)
    found, skipped = _installed(subject, asked, pythons)
    predicted = subject.predict([f.consumer.name for f in found])
    rows = []
    for i, each in enumerate(found):
        if progress:
            progress(i, len(found), each.consumer.name)
        name = each.consumer.name
        request = {
            **subject.request,
            "dtype": subject.expected(name).dtype,
            "wanted": next(iter(predicted[name].exact)),
        }
        answer = ask(each.interpreter, each.consumer.script, request, subject.inputs, timeout)
        verdict = judged(answer, subject.expected(name), predicted[name], subject.ids)
        rows.append({
            "consumer": name, "version": each.versions[each.consumer.package], "python": each.interpreter.python, **verdict,
        })  # fmt: skip
    return {
        "model": str(path),
        "layout": subject.layout,
        "prompt": subject.words,
        "consumers": rows,
        "skipped": skipped,
        "ok": all(row["ok"] for row in rows),
    }


def _installed(
    subject: Subject, asked: list[str] | None, pythons: Mapping[str, str]
) -> tuple[list[_Found], list[dict[str, str]]]:
    """The consumers that can be asked, and why others cannot."""
    found, skipped, missing = [], [], []
    readers = [c.name for c in CONSUMERS.values() if c.takes(subject.layout)]
    for name in asked or readers:
        consumer = CONSUMERS[name]
        reason = subject.refusals.get(name) if name in readers else _unread(name, subject, readers)
        if reason is None:
            interpreter = Interpreter.of(name, pythons)
            versions = interpreter.versions(consumer.packages(subject.layout))
            lacking = [package for package, version in versions.items() if version is None]
            if not lacking:
                found.append(_Found(consumer, interpreter, versions))
                continue
            reason = (
                f"{name} needs {' and '.join(lacking)} for {subject.layout}, not installed for {interpreter.python}. Install with pip install "
                f"{' '.join(lacking)}, or name an interpreter that has it: --python {name}=PATH, or {variable(name)}."
            )
            missing.append(reason)
        if asked is not None:
            raise MissingExtraError(reason) if reason in missing else SchemeError(reason)
        skipped.append({"consumer": name, "reason": reason})
    if not found and missing:
        raise MissingExtraError(" ".join(missing))
    if not found:
        why = " ".join(s["reason"] for s in skipped) or "Only arrondi reads this layout; write another with --to."
        raise SchemeError(f"{subject.where} (layout {subject.layout}) cannot be verified: {why}")
    return found, skipped


def _unread(name: str, subject: Subject, readers: list[str]) -> str:
    others = f"Leave it out: {' and '.join(readers)} may be asked" if readers else "Only arrondi does"
    return f"{name} does not read {subject.where} (layout {subject.layout}). {others}."
