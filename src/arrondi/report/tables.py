"""Tables on stdout, one function for each command."""

from __future__ import annotations

import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

_FILE_WIDTH = 200
_MOST_ROWS = 400
"""A table of tensors longer than this is cut; `--json` has all of it."""


def print_plan(plan: dict[str, Any]) -> None:
    """The resolved plan."""
    console = _console()
    table = _table(
        "tensor", "shape", "becomes", "method", "bits/weight", "bytes", "why", title=f"Plan for {plan['model']}"
    )
    for t in plan["tensors"][:_MOST_ROWS]:
        becomes = (
            t["scheme"]
            if t["status"] == "quantized"
            else "kept"
            if t["status"] == "kept by rule"
            else "kept (impossible)"
        )
        method = t["method"] if t["status"] == "quantized" else ""
        table.add_row(
            t["name"],
            _shape(t["shape"]),
            becomes,
            method,
            f"{t['bits_per_weight']:.3f}",
            f"{t['bytes']:,}",
            t["reason"],
        )
    console.print(table)
    _cut(console, plan["tensors"])
    console.print(f"Layout {plan['layout']}, read by {plan['readers']}.")
    console.print(
        f"{plan['output_bytes'] / 1e6:,.1f} MB, {_bits(plan['bits_per_weight'])} bits a quantized weight, "
        f"{plan['model_bits_per_weight']:.3f} over the whole model; peak memory about {plan['peak_memory_bytes'] / 1e6:,.0f} MB, "
        f"roughly {plan['seconds']:,.0f} s on two cores."
    )
    _counts(console, plan["counts"])
    for line in [*plan["problems"], *plan["notes"]]:
        console.print(f"[yellow]![/] {line}")


def print_report(report: dict[str, Any]) -> None:
    """What a quantization run did and cost."""
    console = _console()
    table = _table("layer", "scheme", "method", "bits/weight", "SQNR dB", "output error", title=f"{report['model']}")
    for row in report["layers"][:_MOST_ROWS]:
        error = "" if row["output_error"] is None else f"{row['output_error']:.2e}"
        noise = "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
        table.add_row(row["name"], row["scheme"], row["method"], f"{row['bits_per_weight']:.3f}", noise, error)
    console.print(table)
    _cut(console, report["layers"])
    silent = [r["name"] for r in report["layers"] if r["calibration_tokens"] == 0]
    if silent:
        console.print(
            f"[yellow]![/] {len(silent)} weights saw no calibration token and were rounded without it: {', '.join(silent[:3])} …"
        )
    for note in report["notes"]:
        console.print(f"[yellow]![/] {note}")
    _counts(console, report["counts"])
    console.print(
        f"{report['input_bytes'] / 1e6:,.1f} MB → {report['output_bytes'] / 1e6:,.1f} MB in {report['seconds']:.1f} s, "
        f"{_bits(report['bits_per_weight'])} bits a quantized weight, {report['model_bits_per_weight']:.3f} over the whole model."
    )
    if report["evaluation"]:
        print_evaluation(report["evaluation"])


def print_evaluation(result: dict[str, Any]) -> None:
    """Numbers with their 95 % intervals."""
    console = _console()
    table = _table("measure", "value", "95 % interval", title=f"On {result['text']}")
    for key, value in result.items():
        if isinstance(value, float) and not key.endswith("_interval"):
            interval = result.get(f"{key}_interval")
            table.add_row(
                key.replace("_", " "), f"{value:.5g}", f"{interval[0]:.5g} … {interval[1]:.5g}" if interval else ""
            )
    console.print(table)
    console.print(f"{result.get('tokens', 0):,} tokens; {result['protocol']}.")


def print_inspection(document: dict[str, Any]) -> None:
    """Tensors and totals of a checkpoint."""
    console = _console()
    table = _table(
        "tensor", "shape", "format", "bits/weight", "bytes", title=f"{document['path']}: {document['architecture']}"
    )
    for t in document["tensors"][:_MOST_ROWS]:
        table.add_row(t["name"], _shape(t["shape"]), t["format"], f"{t['bits_per_weight']:.3f}", f"{t['bytes']:,}")
    console.print(table)
    _cut(console, document["tensors"])
    console.print(
        f"{document['parameters']:,} parameters, {document['quantized_parameters']:,} of them quantized at {_bits(document['bits_per_weight'])} bits; "
        f"{document['bytes'] / 1e6:,.1f} MB, {document['model_bits_per_weight']:.3f} bits over the whole model; layout {document['layout'] or 'plain'}."
    )


def print_demo(result: dict[str, Any]) -> None:
    """The comparison of the demo."""
    console = _console()
    original = result["original"]
    table = _table(
        "scheme",
        "method",
        "bits/weight",
        "MB",
        "perplexity",
        "KL to original",
        "top-1 agreement",
        title="The sample model",
    )
    table.add_row("bf16", "—", "16", f"{original['bytes'] / 1e6:.2f}", f"{original['perplexity']:.3f}", "0", "100 %")
    for r in result["rows"]:
        table.add_row(
            r["scheme"], r["method"], f"{r['bits_per_weight']:.3f}", f"{r['bytes'] / 1e6:.2f}", f"{r['perplexity']:.3f}",
            f"{r['kl_mean']:.5f}", f"{100 * r['top1_agreement']:.1f} %",
        )  # fmt: skip
    console.print(table)
    console.print(f"Measured on held-back text: {result['protocol']}.")
    console.print(f"The 4-bit model continues: [italic]{result['text']}[/]")
    console.print("Files: " + ", ".join(r["path"] for r in result["rows"]))


def print_bench(document: dict[str, Any]) -> None:
    """The machine's limits, and each operator's time and share of the nearer one."""
    console = _console()
    machine = document["machine"]
    peaks = {kind: max(found.items(), key=lambda pair: pair[1]) for kind, found in machine["peak_tflop_s"].items()}
    console.print(
        f"{machine['cpu']}, {machine['threads']} threads, kernels {machine['path'] or 'none'}: "
        f"memory {machine['bandwidth_gb_s']:.1f} GB/s; "
        + ", ".join(f"{kind} {value:.3g} TFLOP/s ({source})" for kind, (source, value) in peaks.items())
    )
    tokens = sorted({row["m"] for row in document["rows"]})
    table = _table(
        "operator", "dtype", "shape", "kernel", *(f"m = {m}" for m in tokens), title="Time, rate, share of the roofline"
    )
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for row in document["rows"]:
        key = row["operator"], row["dtype"], _shape(row["shape"]), row["kernel"]
        rate = f"{row['gb_s']:.1f} GB/s" if row["bound"] == "memory" else f"{row['tflop_s']:.2f} TFLOP/s"
        lines.setdefault(key, {})[row["m"]] = f"{row['ms']:.3f} ms, {rate}, {100 * row['share']:.0f} %"
    for names, cells in lines.items():
        table.add_row(*names, *(cells.get(m, "") for m in tokens))
    console.print(table)


def print_facts(document: dict[str, Any]) -> None:
    """Plain key and value."""
    console = _console()
    for key, value in document.items():
        console.print(
            f"{key.replace('_', ' ')}: {value:,}" if isinstance(value, int) else f"{key.replace('_', ' ')}: {value}"
        )


def _console() -> Console:
    """As wide as the terminal; wide enough for names where the output goes to a file."""
    return Console() if sys.stdout.isatty() else Console(width=_FILE_WIDTH)


def _table(first: str, *others: str, title: str) -> Table:
    """A table whose first column, the name, is never cut."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for other in others:
        table.add_column(other, overflow="fold")
    return table


def _shape(shape: list[int]) -> str:
    return " × ".join(map(str, shape))


def _bits(bits: float | None) -> str:
    return "–" if bits is None else f"{bits:.3f}"


def _counts(console: Console, counts: dict[str, int]) -> None:
    console.print(", ".join(f"{n} {status}" for status, n in counts.items()) + ".")


def _cut(console: Console, rows: list[Any]) -> None:
    if len(rows) > _MOST_ROWS:
        console.print(f"… and {len(rows) - _MOST_ROWS} more; --json lists all.")
