"""What was done to a network, and what it cost, as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_network(report: dict[str, Any]) -> None:
    """Every layer, the size, and the measurement."""
    console = Console()
    table = Table("layer", "shape", "becomes", "weight SQNR", "bits")
    for row in report["layers"]:
        kept = row["status"] == "kept"
        sqnr = row.get("weight_sqnr_db")
        table.add_row(
            row["layer"], " × ".join(map(str, row["shape"])), f"kept: {row['reason']}" if kept else row["scheme"],
            "" if sqnr is None else f"{sqnr:.1f} dB", f"{row['bits_per_weight']:.2f}",
        )  # fmt: skip
    console.print(table)
    steps = (f"{row['pass']} ({row['operators']})" for row in report["passes"])
    console.print(f"Passes, and operators after each: {', '.join(steps)}.")
    flowing = report["activations"]
    if flowing is not None:
        console.print(
            f"{report['rounded_values']} values between layers on {report['grids']} grids of {flowing}, ranges by {report['observer']}."
        )
    plain = ", ".join(f"{op} ({count})" for op, count in report["float_operators"].items())
    if plain:
        console.print(f"In floating point: {plain}.")
    for sentence in report["notes"]:
        console.print(sentence)
    console.print(f"{report['file_bytes']:,} bytes, weights {report['float_bytes']:,} bytes before.")
    if "latency" in report:
        time = report["latency"]
        kept = "within" if time["kept"] else "which misses"
        console.print(f"One call of the file: {time['milliseconds']:.3f} ms in {time['runtime']} (samples: {time['samples']}, threads: {time['threads']}), {kept} the budget of {time['budget_ms']:g} ms.")  # fmt: skip
    hurt = sorted(
        (row["sqnr_db"], name) for name, row in report.get("values", {}).items() if row["sqnr_db"] is not None
    )[:5]
    if hurt:
        console.print("Values that moved most: " + ", ".join(f"{name} ({sqnr:.1f} dB)" for sqnr, name in hurt) + ".")
    if report["evaluation"] is not None:
        print_network_evaluation(report["evaluation"])


def print_network_plan(plan: dict[str, Any]) -> None:
    """Every layer, and what all of them take."""
    console = Console()
    table = Table("layer", "shape", "becomes", "bits", "bytes")
    for row in plan["layers"]:
        becomes = row["scheme"] if row["status"] == "quantized" else f"kept: {row['reason']}"
        table.add_row(row["layer"], " × ".join(map(str, row["shape"])), becomes, f"{row['bits_per_weight']:.2f}", f"{row['bytes']:,}")  # fmt: skip
    console.print(table)
    console.print(f"Weights {plan['bytes']:,} bytes, {plan['float_bytes']:,} before, {plan['bits_per_weight']:.2f} bits each, by {', '.join(plan['methods'])}.")  # fmt: skip
    if plan["activations"] is not None:
        console.print(f"{plan['rounded_values']} values between layers on {plan['grids']} grids of {plan['activations']} at most, before their ranges are known.")  # fmt: skip
    plain = ", ".join(f"{op} ({count})" for op, count in plan["float_operators"].items())
    if plain:
        console.print(f"In floating point: {plain}.")
    for sentence in plan["notes"]:
        console.print(sentence)
    if plan["needs_samples"]:
        console.print("Samples are needed: --calibration data.npz, or a folder of images.")


def print_contents(document: dict[str, Any]) -> None:
    """Every layer of a network, and the totals."""
    console = Console()
    table = Table("layer", "operator", "shape", "weights", "bits", "reads")
    for row in document["layers"]:
        shape = " × ".join(map(str, row["shape"]))
        table.add_row(row["layer"], row["operator"], shape, row["format"], f"{row['bits_per_weight']:.2f}", row["reads"] or "float")  # fmt: skip
    console.print(table)
    for word in ("inputs", "outputs"):
        ends = (
            f"{v['name']} {v['type']} ({', '.join('?' if n is None else str(n) for n in v['shape'])})"
            for v in document[word]
        )
        console.print(f"{word}: {'; '.join(ends)}")
    console.print("operators: " + ", ".join(f"{op} ({count})" for op, count in sorted(document["operators"].items())))
    console.print(
        f"{document['parameters']:,} weights in {len(document['layers'])} layers, opset {document['opset']}, {document['file_bytes']:,} bytes."
    )


def print_network_evaluation(found: dict[str, Any]) -> None:
    """Shares of samples with their intervals."""
    console = Console()
    names = {"top1": "top-1", "reference_top1": "top-1 of the original", "agreement": "same class as the original"}
    for key, name in names.items():
        if found[key] is not None:
            low, high = found[f"{key}_interval"]
            console.print(f"{name}: {100 * found[key]:.2f} % ({100 * low:.2f} to {100 * high:.2f})")
    console.print(f"signal to difference: {found['sqnr_db']:.2f} dB, {found['samples']} samples of {found['data']}")
    for sentence in found.get("notes", ()):
        console.print(sentence)
