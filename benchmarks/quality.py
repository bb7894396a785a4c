"""What each method costs at each width: the tables of quality in the README and in docs/benchmarks.md.

Owns: the cases, each a scheme and what `arrondi.quantize` is told, and the table of their mean KL to the original (nats, with a 95 % interval),
perplexity, top-1 agreement, bits per weight (all that is stored counted) and CPU seconds of quantizing, without measuring.

    python benchmarks/quality.py                                       the sample model that ships with the package
    python benchmarks/quality.py --model DIR --calibration TEXT --evaluation TEXT --only . --rows FILE.jsonl
    python benchmarks/quality.py --model ENCODER …                      cosines and relative errors of what it gives
    python benchmarks/quality.py … --only 'W[43]A16 (gptq|gptaq)'       cases whose label the pattern finds; '.' takes all

`--rows` keeps finished rows in a file of JSON lines: a second run with the same arguments takes them from there. For one text that serves
both ends, `--split` calibrates on its first half and measures on its second. Rounded keys and values are measured on windows twice as
long, half as many of them, read 16 tokens at a time: some caches leave the newest 128 tokens alone.

Peers run in environments of their own: `--write-windows FILE` writes the calibration windows, as token ids, for `benchmarks/peers/*.py`,
and `--copy NAME=DIR` measures what they wrote, as a row of the same table.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import arrondi
from arrondi.measure.data import chosen, read_windows
from arrondi.measure.text import load_tokenizer
from arrondi.runtime.kv.measure import compare_with_cache


class Case(NamedTuple):
    """Schemes, and what they are made by: arguments of `arrondi.quantize`."""

    name: str
    schemes: tuple[str, ...]
    settings: dict[str, Any]


FEW: Final = ("W4A16", "W3A16", "W2A16")
WIDTHS: Final = ("W8A16", *FEW)
TABLES: Final = tuple(f"w=lut{bits}/g128/t:int8:64" for bits in (4, 3, 2))
TRELLISES: Final = ("TCQ4", "TCQ3", "TCQ2")
SQUARES: Final = ("TCQ4S", "TCQ3S", "TCQ2S")
TILES: Final = ("EXL3_4", "EXL3_3", "EXL3_2")
SEEDS: Final = tuple(
    f"w=tcq{bits}{ring}/channel/float16/rht128:{seed}"
    for bits in (4, 3, 2)
    for ring in ("", "-square")
    for seed in (1, 2)
)
"""The presets' trellises turned by other signs."""
FLOATS: Final = ("NF4_DQ", "NVFP4A16", "MXFP4A16")
FOUR_BITS: Final = ("w=int4/g128,a=int4/token", "NVFP4", "MXFP4")
ABSMAX: Final = {"range": "absmax"}
ONLINE: Final = {"rotate.online": True}
REFINED: Final = {"refine": 2, "damping": 0.05}
CASES: Final = (
    Case("rtn absmax", WIDTHS, {"method": "rtn", "options": ABSMAX}),
    Case("rtn", (*WIDTHS, *FLOATS), {"method": "rtn"}),
    Case("sinq rtn", WIDTHS, {"method": "rtn", "rewrites": ["sinq"]}),
    Case("hqq", WIDTHS, {"method": "hqq"}),
    Case("imatrix", WIDTHS, {"method": "imatrix"}),
    Case("awq", WIDTHS, {"method": "awq"}),
    Case("gptq absmax", WIDTHS, {"method": "gptq", "options": ABSMAX}),
    Case("gptq", (*WIDTHS, *FLOATS), {"method": "gptq"}),
    Case("awq-scale gptq", FEW, {"method": "gptq", "rewrites": ["awq-scale"]}),
    Case("equalize gptq", FEW, {"method": "gptq", "rewrites": ["equalize"]}),
    Case("gptq refine", WIDTHS, {"method": "gptq", "options": {"refine": 3}}),
    Case("gobo", FEW, {"method": "gobo"}),
    Case("kmeans", FEW, {"method": "kmeans", "options": {"rows": 16}}),
    Case("any4", FEW, {"method": "any4", "options": {"rows": 64, "damping": 0.05}}),
    Case("any4 refine", FEW, {"method": "any4", "options": {"rows": 64, **REFINED}}),
    Case("any4 alone", FEW, {"method": "any4", "options": {"rows": 64, "strength": 0.0}}),
    Case("qronos", FEW, {"method": "qronos"}),
    Case("adaround", FEW, {"method": "adaround"}),
    Case("gptaq", WIDTHS, {"method": "gptaq"}),
    Case("yaqa", WIDTHS, {"method": "yaqa"}),
    Case("yaqa refine e2e", FEW, {"method": "yaqa", "options": {"refine": 2}, "repairs": ["e2e"]}),
    Case("gptaq refine", FEW, {"method": "gptaq", "options": REFINED}),
    Case("autoround", WIDTHS, {"method": "autoround"}),
    Case("autoround nearest", FEW[:1], {"method": "autoround", "options": {"start": "nearest"}}),
    Case("preset best", WIDTHS, {"preset": "best"}),
    Case("preset best", TABLES, {"preset": "best"}),
    Case("gptaq sweeps", FEW, {"method": "gptaq", "options": {"sweeps": 5, **REFINED}}),
    Case("gptaq sweeps e2e", FEW, {"method": "gptaq", "options": {"sweeps": 5, **REFINED}, "repairs": ["e2e"]}),
    Case("gptaq refine tune e2e", FEW, {"method": "gptaq", "options": REFINED, "repairs": ["tune", "e2e"]}),
    Case("trellis", (*TRELLISES, *SQUARES, *SEEDS, *TILES), {"method": "trellis"}),
    Case("trellis e2e", TRELLISES, {"method": "trellis", "repairs": ["e2e"]}),
    Case("trellis-yaqa", (*SQUARES, *TRELLISES, *SEEDS, *TILES), {"method": "trellis-yaqa"}),
    Case("trellis-yaqa e2e", SQUARES, {"method": "trellis-yaqa", "repairs": ["e2e"]}),
    Case("rtn", ("W8A8",), {"method": "rtn"}),
    Case("llm-int8", ("W8A8",), {"method": "llm-int8"}),
    Case("smoothquant rtn", ("W8A8",), {"method": "rtn", "rewrites": ["smoothquant"]}),
    Case("rtn", FOUR_BITS, {"method": "rtn"}),
    Case("gptq", ("W4A8", *FOUR_BITS), {"method": "gptq"}),
    Case("rotate gptq", ("W4A16", "W4A8", *FOUR_BITS), {"method": "gptq", "rewrites": ["rotate"]}),
    Case("rotate.online gptq", ("W4A8", *FOUR_BITS), {"method": "gptq", "rewrites": ["rotate"], "options": ONLINE}),
    Case("preset best", FOUR_BITS[:1], {"preset": "best"}),
)
CACHES: Final = ("full", "int8", "int8-static", "int4", "kivi2", "pca2", "pca3")
"""Kinds of keys and values, beside the original's weights."""

BASIC: Final = r"^W\dA16 (rtn|hqq|gptq)( absmax)?$"
"""The README's rows."""


Row = tuple[str, str, dict[str, Any]]
"""Label, scheme and arguments of `quantize`; of a cache, its kind and none."""


def rows_of(pattern: str) -> Iterator[Row]:
    labelled = [(f"{scheme} {case.name}", scheme, case.settings) for case in CASES for scheme in case.schemes]
    labelled += [(f"kv {kind}", kind, {}) for kind in CACHES]
    return (row for row in labelled if re.search(pattern, row[0]))


def halves(text: Path, folder: Path) -> tuple[Path, Path]:
    """The first and the second half of a text as files of their own."""
    content = text.read_text(encoding="utf-8")
    parts = folder / "first.txt", folder / "second.txt"
    for path, part in zip(parts, (content[: len(content) // 2], content[len(content) // 2 :]), strict=True):
        path.write_text(part, encoding="utf-8")
    return parts


def measured(
    args: argparse.Namespace, scheme: str, settings: dict[str, Any], calibration: Path, evaluation: Path
) -> dict[str, Any]:
    """Quantize and measure: one row."""
    if not settings:
        words = read_windows(calibration, load_tokenizer(args.model), 2 * args.seq_len)
        clips = arrondi.calibrate_cache(
            arrondi.load(args.model), scheme, chosen(words, -(-args.samples // 2), seed=0).ids.split(4)
        )
        found = compare_with_cache(
            args.model,
            args.model,
            evaluation,
            scheme,
            seq_len=2 * args.seq_len,
            samples=-(-args.windows // 2),
            clips=clips,
        )
        return {"result": found, "bits": None, "seconds": None}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        began = time.process_time()
        report = arrondi.quantize(
            args.model, scheme, **settings, calibration=calibration, out=out, samples=args.samples, seq_len=args.seq_len, evaluate=False
        )  # fmt: skip
        seconds = time.process_time() - began
        found = arrondi.evaluate(out, args.model, evaluation, seq_len=args.seq_len, samples=args.windows)
    return {"result": found, "bits": report["bits_per_weight"], "seconds": seconds}


def show(label: str, row: dict[str, Any]) -> None:
    result, bits, seconds = row["result"], row["bits"], row["seconds"]
    if "kl_mean" not in result:
        low, high = result["relative_error_interval"]
        print(
            f"{label:44s} {'–' if bits is None else f'{bits:.3f}':>7s}  relative error {result['relative_error']:.4f}  {low:.4f} … {high:.4f}"
            f"  cosine of tokens {result['token_cosine']:.5f}, of sentences {result['sentence_cosine']:.5f}"
            f"  {'–' if seconds is None else f'{seconds:.1f}':>7s}",
            flush=True,
        )
        return
    low, high = result["kl_mean_interval"]
    print(
        f"{label:44s} {'–' if bits is None else f'{bits:.3f}':>7s}  {result['kl_mean']:.5f}  {low:.5f} … {high:.5f}  {result['perplexity']:10.3f}"
        f"  {100 * result['top1_agreement']:5.1f} %  {'–' if seconds is None else f'{seconds:.1f}':>7s}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=arrondi.sample_path())
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--evaluation", type=Path)
    parser.add_argument("--split", type=Path, help="one text, first half to calibrate, second to measure")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=48, help="windows to measure on")
    parser.add_argument("--only", help="regular expression for labels such as 'W4A16 gptq'")
    parser.add_argument("--rows", type=Path, help="JSON lines of finished rows, read and added to")
    parser.add_argument(
        "--copy", action="append", default=[], help="NAME=DIR, a finished copy of the model; repeatable"
    )
    parser.add_argument("--write-windows", type=Path, help="write the calibration windows for peers, and stop")
    args = parser.parse_args()
    chosen_rows = list(rows_of(args.only or BASIC)) if args.only or not args.copy else []
    if args.only and not chosen_rows:
        labels = ", ".join(label for label, *_ in rows_of(""))
        parser.error(f"--only {args.only} matches none of: {labels}")

    with tempfile.TemporaryDirectory() as scratch:
        calibration, evaluation = args.calibration, args.evaluation
        if calibration is None:
            calibration, evaluation = halves(args.split or args.model / "heldout.txt", Path(scratch))
        if args.write_windows:
            windows = chosen(read_windows(calibration, load_tokenizer(args.model), args.seq_len), args.samples, seed=0)
            args.write_windows.write_text(json.dumps(windows.ids.tolist()))
            return
        table(args, chosen_rows, calibration, evaluation)


def table(args: argparse.Namespace, rows: list[Row], calibration: Path, evaluation: Path) -> None:
    """Print every row, from the file if it is there."""
    asked = f"{args.model.name}: {args.samples} windows of {args.seq_len} from {calibration.name}, {args.windows} from {evaluation.name}"
    known = {}
    if args.rows and args.rows.exists():
        known = {(r["asked"], r["label"], r["settings"]): r for r in map(json.loads, args.rows.open())}
    print(asked)
    print(
        f"{'scheme and method':44s} {'bits':>7s}  {'KL mean':7s}  {'KL 95 %':17s}  {'perplexity':>10s}  {'top-1':>7s}  {'CPU s':>7s}"
    )
    for copy in args.copy:
        name, _, folder = copy.partition("=")
        found = arrondi.evaluate(folder, args.model, evaluation, seq_len=args.seq_len, samples=args.windows)
        show(name, {"result": found, "bits": None, "seconds": None})
    for label, scheme, settings in rows:
        key = asked, label, json.dumps(settings)
        if key not in known:
            known[key] = measured(args, scheme, settings, calibration, evaluation)
            if args.rows:
                with args.rows.open("a") as file:
                    print(
                        json.dumps({**dict(zip(("asked", "label", "settings"), key, strict=True)), **known[key]}),
                        file=file,
                    )
        show(label, known[key])


if __name__ == "__main__":
    main()
