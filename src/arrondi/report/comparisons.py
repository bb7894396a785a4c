"""Tables of `compare` and `methods`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from arrondi.documents import number
from arrondi.report.rows import Rows, console, say

_LOSSES = {"kl_mean": "KL", "relative_error": "relative error"}


def print_comparison(document: Mapping[str, Any]) -> None:
    """The candidates by size and loss, the front marked, and the answer."""
    from arrondi.search.front import named

    out, original = console(), document["original"]
    done = [row for row in document["rows"] if row["status"] == "done"]
    key = next(k for k in _LOSSES if k in done[0])
    causal = key == "kl_mean"
    quality = ("perplexity", "top-1") if causal else ("token cosine",)
    size = ("candidate", "front", "MB", "bits", "bits of all")
    headings = (*size, _LOSSES[key], "95 % interval", *quality, "seconds", "ms/token")
    rows = Rows(f"{document['model']} on {document['text']}", headings)
    for row in done:
        low, high = (number(row, f"{key}_interval.{i}") for i in (0, 1))
        found = (f"{_form(row, 'perplexity', '.4g')}", f"{100 * row['top1_agreement']:.1f} %") if causal else ()
        rows.add(
            f"{row['scheme']} {row['method']}" + (f" embeddings {row['embeddings']}" if row["embeddings"] else ""),
            "●" if row["pareto"] else "",
            f"{row['output_bytes'] / 1e6:,.2f}",
            _form(row, "bits_per_weight", ".3f"),
            f"{row['model_bits_per_weight']:.3f}",
            _form(row, key, ".4g"),
            "" if low is None or high is None else f"{low:.4g} … {high:.4g}".replace("inf", "∞"),
            *(found or (_form(row, "token_cosine", ".5f"),)),
            f"{row['seconds']:.1f}",
            _form(row, "ms_per_token", ".2f"),
        )
    rows.show(out)
    plain = [f"{original['output_bytes'] / 1e6:,.2f} MB", f"{original['model_bits_per_weight']:.3f} bits"]
    plain += [f"perplexity {_form(original, 'perplexity', '.4g')}"] if causal else []
    plain += [f"{original['ms_per_token']:.2f} ms/token"] if original["ms_per_token"] is not None else []
    say(out, f"The original: {', '.join(plain)}.")
    say(out, f"{document['tokens']:,} tokens; {document['protocol']}. ● : no other is smaller and loses less.")
    notes: dict[str, list[str]] = {}
    for row in document["rows"]:
        for note in row.get("notes", ()) if row["status"] == "done" else [row["reason"]]:
            notes.setdefault(note, []).append(named(row))
    for note, names in notes.items():
        say(out, f"{', '.join(names)}: {note}", warn=True)
    for note in document["notes"]:
        say(out, note, warn=True)
    say(out, f"The rows are kept in {document['folder']}; the same call goes on from there.")
    say(out, document["answer"])
    best = min(done, key=lambda row: (not row["pareto"], row["output_bytes"]))
    say(out, f"To write one: arrondi quantize {document['model']} -o OUT {best['options']}, and the same text.")


def print_methods(document: Mapping[str, Any]) -> None:
    """Every step with its kind, needs, options and source."""
    out = console()
    rows = Rows("Methods, rewrites and repairs", ("name", "kind", "needs", "brings along", "options", "source"))
    for step in document["steps"]:
        options = ", ".join(f"{name}={_word(value)}" for name, value in step["options"].items())
        rows.add(
            step["name"], step["kind"], ", ".join(step["needs"]), ", ".join(step["brings"]), options, step["source"]
        )
    rows.show(out)
    say(out, "Options: --option NAME=VALUE of the method, --option STEP.NAME=VALUE of a rewrite or a repair.")


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _form(row: Mapping[str, Any], key: str, form: str) -> str:
    value = number(row, key)
    if value is None:
        return "–" if row.get(key) is None else "?"
    return "?" if value != value else format(value, form).replace("inf", "∞")
