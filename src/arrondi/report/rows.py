"""Rows of facts on a terminal of any width: a table where it fits, else an entry of a few lines for each row.

Owns: `Rows` and `console`. A name or a number is never broken over two lines: what a table has no room for is stacked. A column
whose cells are all alike is said once, above.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_FILE_WIDTH: Final = 200
"""Columns where the output goes to a file and nobody says how wide it is."""

_MOST_ROWS: Final = 400
"""Rows that are shown; `--json` has all of them."""

_ALIKE: Final = 2
"""Rows from which on a column of equal cells is said above instead."""


def console() -> Console:
    """As wide as the terminal, or as COLUMNS says."""
    known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    return _Console(width=None if known else _FILE_WIDTH, highlight=False)


class _Console(Console):
    """Rich would end the program with status 1 when the reader of its output has gone; `arrondi.cli.main` decides that."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


@dataclass
class Rows:
    """Cells under headings; the first column names the row."""

    title: str
    headings: Sequence[str]
    cells: list[Sequence[str]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """One row."""
        self.cells.append(cells)

    def show(self, out: Console) -> None:
        """Print what fits."""
        shown = self.cells[:_MOST_ROWS]
        alike = [
            i
            for i in range(1, len(self.headings))
            if len(self.cells) >= _ALIKE and len({row[i] for row in self.cells}) == 1
        ]
        kept = [i for i in range(len(self.headings)) if i not in alike]
        said = [f"{self.headings[i]} {self.cells[0][i]}" for i in alike if self.cells[0][i]]
        headings, rows = [self.headings[i] for i in kept], [[row[i] for i in kept] for row in shown]
        _line(out, Text(self.title, style="bold"))
        if said:
            _line(out, Text(f"All: {', '.join(said)}."))
        if _table_width(headings, rows) <= out.width:
            _table(out, headings, rows)
        else:
            _stack(out, headings, rows)
        if len(self.cells) > len(shown):
            _line(out, Text(f"… and {len(self.cells) - len(shown)} more; --json lists all."))


def say(out: Console, sentence: str, *, warn: bool = False) -> None:
    """A sentence, broken between words; a warning begins with a sign."""
    lead = "! " if warn else ""
    lines = textwrap.wrap(lead + sentence, out.width, break_long_words=False, break_on_hyphens=False)
    for i, line in enumerate(lines):
        _line(out, Text.assemble((lead, "yellow"), line[len(lead) :]) if warn and i == 0 else Text(line))


def _table_width(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    widths = [max(cell_len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    return sum(widths) + 2 * len(widths) + 2  # a blank at both sides of a cell, and the edges of the box


def _table(out: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    out.print(table)


def _stack(out: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The name on a line of its own, then its facts; a fact is broken only where it is longer than a line."""
    for name, *facts in rows:
        _line(out, Text(name))
        line = ""
        for heading, fact in zip(headings[1:], facts, strict=True):
            if not fact:
                continue
            piece = f"{heading} {fact}"
            if line and cell_len(f"    {line} · {piece}") > out.width:
                _indented(out, line, " ·")
                line = ""
            line = f"{line} · {piece}" if line else piece
        if line:
            _indented(out, line)
    _line(out, Text(""))


def _indented(out: Console, text: str, end: str = "") -> None:
    lines = textwrap.wrap(text, out.width - 4 - len(end), break_long_words=False, break_on_hyphens=False)
    for line in [*lines[:-1], f"{lines[-1]}{end}"]:
        _line(out, Text(f"    {line}"))


def _line(out: Console, text: Text) -> None:
    """One line as it is: a word that is wider than the terminal stays whole, so that it can be copied."""
    out.print(text, soft_wrap=True)
