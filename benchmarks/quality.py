"""What each method costs at each width: the README's table of quality.

Owns: the comparison of rtn, hqq and gptq at 8, 4, 3 and 2 bits on one model, through the same calls that the command line makes.
Prints mean KL to the original (nats), perplexity, top-1 agreement and bits per weight.

    python benchmarks/quality.py                                       the sample model that ships with the package
    python benchmarks/quality.py --model DIR --calibration TEXT --evaluation TEXT [--samples 128] [--textbook]

`--textbook` takes the settings of `yardstick.py` (widest range, first windows in number), to compare like with like. For one
text that serves both ends, `--split` calibrates on its first half and measures on its second.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import arrondi

ABSMAX = {"range": "absmax"}
Settings = list[tuple[str, dict[str, Any]]]
METHODS: Settings = [("rtn", ABSMAX), ("rtn", {}), ("hqq", {}), ("gptq", ABSMAX), ("gptq", {})]
TEXTBOOK: Settings = [("rtn", ABSMAX), ("gptq", ABSMAX)]


def halves(text: Path, folder: Path) -> tuple[Path, Path]:
    """The first and the second half of a text as files of their own."""
    content = text.read_text(encoding="utf-8")
    parts = folder / "first.txt", folder / "second.txt"
    for path, part in zip(parts, (content[: len(content) // 2], content[len(content) // 2 :]), strict=True):
        path.write_text(part, encoding="utf-8")
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=arrondi.sample_path())
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--evaluation", type=Path)
    parser.add_argument("--split", type=Path, help="one text, first half to calibrate, second to measure")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=48, help="windows to measure on")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--textbook", action="store_true")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        calibration, evaluation = args.calibration, args.evaluation
        if calibration is None:
            calibration, evaluation = halves(args.split or args.model / "heldout.txt", Path(scratch))
        print(
            f"{args.model.name}: {args.samples} windows of {args.seq_len} from {calibration.name}, {args.windows} from {evaluation.name}"
        )
        print("bits  method      bits/weight  KL mean  KL 95 %             perplexity  (original)  top-1")
        for bits in args.bits:
            for method, options in TEXTBOOK if args.textbook else METHODS:
                out = Path(scratch) / f"w{bits}-{method}-{'-'.join(map(str, options.values()))}"
                recipe = arrondi.Recipe.simple(f"W{bits}A16", method, options=options)
                report = arrondi.quantize(
                    args.model, recipe=recipe, calibration=calibration, out=out, samples=args.samples, seq_len=args.seq_len,
                    evaluate=False,
                )  # fmt: skip
                r = arrondi.evaluate(out, args.model, evaluation, seq_len=args.seq_len, samples=args.windows)
                low, high = r["kl_mean_interval"]
                print(
                    f"{bits:4d}  {method:4s} {options.get('range', ''):7s}{report['bits_per_weight']:11.3f}  {r['kl_mean']:.5f}  {low:.5f} … {high:.5f}"
                    f"  {r['perplexity']:10.3f}  {r['reference_perplexity']:10.3f}  {100 * r['top1_agreement']:.1f} %",
                    flush=True,
                )


if __name__ == "__main__":
    main()
