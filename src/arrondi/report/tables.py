"""What each command prints for people, one function each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from arrondi.documents import NOT_FINITE, number
from arrondi.report.calibration import calibration_lines
from arrondi.report.readers import readers_lines
from arrondi.report.rows import Rows, console, say


def print_plan(plan: Mapping[str, Any]) -> None:
    """The resolved plan."""
    out = console()
    rows = Rows(f"Plan for {plan['model']}", ("tensor", "shape", "becomes", "bits", "bytes"))
    for t in plan["tensors"]:
        kept = "kept" if t["status"] == "kept by rule" else "kept (impossible)"
        becomes = f"{t['scheme']} by {t['method']}" if t["status"] == "quantized" else f"{kept}: {t['reason']}"
        rows.add(t["name"], _shape(t["shape"]), becomes, f"{t['bits_per_weight']:.3f}", f"{t['bytes']:,}")
    rows.show(out)
    _readers(out, plan)
    say(
        out,
        f"{plan['output_bytes'] / 1e6:,.1f} MB, {_bits(plan['bits_per_weight'])} bits a quantized weight, "
        f"{plan['model_bits_per_weight']:.3f} over the whole model; peak memory about {plan['peak_memory_bytes'] / 1e6:,.0f} MB, "
        f"roughly {plan['seconds']:,.0f} s on two cores.",
    )
    _counts(out, plan["counts"])
    for line in [*plan["problems"], *plan["notes"]]:
        say(out, line, warn=True)


def print_report(report: Mapping[str, Any]) -> None:
    """What a quantization run did and cost."""
    out = console()
    rows = Rows(str(report["model"]), ("layer", "scheme", "method", "bits", "SQNR dB", "output error"))
    for row in report["layers"]:
        error = "" if row["output_error"] is None else f"{row['output_error']:.2e}"
        noise = "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
        rows.add(row["name"], row["scheme"], row["method"], f"{row['bits_per_weight']:.3f}", noise, error)
    rows.show(out)
    silent = [r["name"] for r in report["layers"] if r["calibration_tokens"] == 0]
    if silent:
        names = ", ".join(silent[:3]) + (" …" if len(silent) > 3 else "")
        say(out, f"{len(silent)} weights saw no calibration token and were rounded without it: {names}", warn=True)
    for note in report["notes"]:
        say(out, note, warn=True)
    if report["calibration"]:
        for line in calibration_lines(report["calibration"]):
            say(out, line)
        for line in report["calibration"].get("warnings", ()):
            say(out, line, warn=True)
    _counts(out, report["counts"])
    say(
        out,
        f"{report['input_bytes'] / 1e6:,.1f} MB → {report['output_bytes'] / 1e6:,.1f} MB in {report['seconds']:.1f} s, "
        f"{_bits(report['bits_per_weight'])} bits a quantized weight, {report['model_bits_per_weight']:.3f} over the whole model.",
    )
    if report["evaluation"]:
        print_evaluation(report["evaluation"])
    _readers(out, report)


def print_evaluation(result: Mapping[str, Any]) -> None:
    """Numbers with their 95 % intervals; ∞ where a number is infinite, ? where it is none."""
    out = console()
    rows = Rows(f"On {result['text']}", ("measure", "value", "95 % interval"))
    infinite = result.get(NOT_FINITE, {})
    for key, value in result.items():
        if (isinstance(value, float) or key in infinite) and not key.endswith("_interval"):
            low, high = (number(result, f"{key}_interval.{i}") for i in (0, 1))
            interval = "" if low is None or high is None else f"{_number(low)} … {_number(high)}"
            rows.add(key.replace("_", " "), _number(number(result, key)), interval)
    rows.show(out)
    say(out, f"{result.get('tokens', 0):,} tokens; {result['protocol']}.")
    for note in result.get("notes", []):
        say(out, note, warn=True)


def print_inspection(document: Mapping[str, Any]) -> None:
    """Tensors and totals of a checkpoint."""
    out = console()
    kind = f": {document['architecture']}" if document["architecture"] else ""
    rows = Rows(f"{document['path']}{kind}", ("tensor", "shape", "format", "bits", "bytes"))
    for t in document["tensors"]:
        rows.add(t["name"], _shape(t["shape"]), t["format"], f"{t['bits_per_weight']:.3f}", f"{t['bytes']:,}")
    rows.show(out)
    say(
        out,
        f"{document['parameters']:,} parameters, {document['quantized_parameters']:,} of them quantized at {_bits(document['bits_per_weight'])} bits; "
        f"{document['bytes'] / 1e6:,.1f} MB, {document['model_bits_per_weight']:.3f} bits over the whole model; layout {document['layout'] or 'plain'}.",
    )


def print_demo(result: Mapping[str, Any]) -> None:
    """The comparison of the demo."""
    out, original = console(), result["original"]
    rows = Rows("The sample model", ("scheme", "method", "bits", "MB", "perplexity", "KL", "top-1"))
    rows.add("bf16", "—", "16", f"{original['bytes'] / 1e6:.2f}", _number(original["perplexity"], ".3f"), "0", "100 %")
    for r in result["rows"]:
        ppl, kl = _number(r["perplexity"], ".3f"), _number(r["kl_mean"], ".5f")
        bits, size, top = f"{r['bits_per_weight']:.3f}", f"{r['bytes'] / 1e6:.2f}", f"{100 * r['top1_agreement']:.1f} %"
        rows.add(r["scheme"], r["method"], bits, size, ppl, kl, top)
    rows.show(out)
    say(out, f"Measured on held-back text: {result['protocol']}. KL is that to the original, in nats.")
    say(out, f"The 4-bit model continues: {result['text']}")
    say(out, "Files: " + ", ".join(r["path"] for r in result["rows"]))


def print_bench(document: Mapping[str, Any]) -> None:
    """The machine's limits, and each operator's time and share of the nearer one."""
    out, machine = console(), document["machine"]
    peaks = {kind: max(found.items(), key=lambda pair: pair[1]) for kind, found in machine["peak_tflop_s"].items()}
    say(
        out,
        f"{machine['cpu']}, {machine['threads']} threads, kernels {machine['path'] or 'none'}: "
        f"memory {machine['bandwidth_gb_s']:.1f} GB/s; "
        + ", ".join(f"{kind} {value:.3g} TFLOP/s ({source})" for kind, (source, value) in peaks.items()),
    )
    tokens = sorted({row["m"] for row in document["rows"]})
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for row in document["rows"]:
        key = row["operator"], row["dtype"], _shape(row["shape"]), row["kernel"]
        rate = f"{row['gb_s']:.1f} GB/s" if row["bound"] == "memory" else f"{row['tflop_s']:.2f} TFLOP/s"
        lines.setdefault(key, {})[row["m"]] = f"{row['ms']:.3f} ms, {rate}, {100 * row['share']:.0f} %"
    headings = ("operator", "dtype", "shape", "kernel", *(f"m = {m}" for m in tokens))
    rows = Rows("Time, rate, share of the roofline", headings)
    for names, cells in lines.items():
        rows.add(*names, *(cells.get(m, "") for m in tokens))
    rows.show(out)


def print_facts(document: Mapping[str, Any]) -> None:
    """Plain key and value."""
    out = console()
    for key, value in document.items():
        say(out, f"{key.replace('_', ' ')}: {f'{value:,}' if isinstance(value, int) else value}")


def _shape(shape: list[int]) -> str:
    return " × ".join(map(str, shape))


def _bits(bits: float | None) -> str:
    return "–" if bits is None else f"{bits:.3f}"


def _number(value: float | None, form: str = ".5g") -> str:
    if value is None or value != value:
        return "?"
    return format(value, form).replace("inf", "∞")


def _readers(out: Console, document: Mapping[str, Any]) -> None:
    for line in readers_lines(document):
        say(out, line)


def _counts(out: Console, counts: Mapping[str, int]) -> None:
    say(out, ", ".join(f"{n} {status}" for status, n in counts.items()) + ".")
