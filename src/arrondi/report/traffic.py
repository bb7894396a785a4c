"""Bytes of a training step, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from arrondi.report.rows import Rows, console, say

_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")
_FAMILIES: Final = {"fsdp": "ZeRO-3 / FSDP2", "ddp": "DDP"}


def print_traffic(document: Mapping[str, Any]) -> None:
    """One table for each kind of data parallelism: what a step sends, by collective and in all."""
    out = console()
    for family, title in _FAMILIES.items():
        rows = Rows(
            f"{title}: {document['parameters']:,} parameters, {document['nodes']} × {document['per_node']} ranks, bytes of a step",
            ("scheme", "collective", "bits", "rank, inside", "rank, between", "node, between", "less"),
        )
        for scheme in document["schemes"]:
            if scheme["family"] != family:
                continue
            ratio = scheme["ratio"]
            rows.add(scheme["name"], scheme["what"], "", *_places(scheme), "" if ratio is None else f"{ratio:.2f}×")
            for hop in scheme["hops"]:
                rows.add("·", hop["collective"], f"{hop['bits']:.3f}", *_places(hop), "")
        rows.show(out)
    full = next((s for s in document["schemes"] if s["name"] == "all"), None)
    if full is not None and full["ratio"] is not None:
        say(
            out,
            f"ZeRO++ moves {full['ratio_of_codes']:.2f}× less between the nodes counted in codes, as its paper does "
            f"({document['element_bytes']} + {document['element_bytes']} + {document['element_bytes']} bytes a parameter become "
            f"{document['weight_bits'] / 8:g} + 0 + {document['gradient_bits'] / 8:g}), and {full['ratio']:.2f}× less with the scales; "
            f"the copy inside each node takes {size(document['hpz_bytes_per_rank'])} of every rank.",
        )
    say(
        out,
        "'between' is what must enter or leave a machine whatever the algorithm; an all-to-all in one hop sends more.",
    )


def _places(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return (
        size(row["intra_bytes_per_rank"]),
        size(row["inter_bytes_per_rank"]),
        size(row["inter_bytes_per_node"]),
    )


def size(count: float) -> str:
    """Bytes with a unit.

    >>> size(0), size(999), size(21_437_500_000)
    ('0 B', '999 B', '21.44 GB')
    """
    power = 0
    while count >= 1000 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.2f} {_UNITS[power]}" if power else f"{count:.0f} B"
