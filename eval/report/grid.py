# SPDX-License-Identifier: Apache-2.0
"""The one look of all tables."""

from collections.abc import Iterable, Sequence
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from mossquant.errors import printable

Head = tuple[str, Literal["left", "right"]]
"""Name and alignment of a column. What is on the right are figures: they are never broken."""

DASH = "—"
"""Where there is no value."""
_LEAST_WIDTH = 12
"""Of a column whose lines may be broken."""


def figure(value: float, form: str) -> str:
    """A perplexity, or how far one is above another, in a number format; above a million it says nothing more."""
    return "> 10^6" if value > 1e6 else format(value, form)


def left(*names: str) -> list[Head]:
    """Columns of text."""
    return [(name, "left") for name in names]


def right(*names: str) -> list[Head]:
    """Columns of figures."""
    return [(name, "right") for name in names]


class _Grid(Table):
    """A table that needs its columns' least widths, however narrow the terminal."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        least = sum((column.min_width or 0) + sum(self.padding[1::2]) for column in self.columns)
        return super().__rich_console__(console, options.update(width=max(options.max_width, least)))


def grid(
    heads: Sequence[Head],
    rows: Iterable[Sequence[str]],
    *,
    header: bool = True,
    caption: str | None = None,
    whole_names: bool = False,
) -> Table:
    """A table of plain text: nothing in a cell is read as markup, so that a path may hold brackets, and nothing in it
    tells the terminal anything. On a terminal that is too narrow lines run over, and no figure is cut.

    Args:
        heads: the columns.
        rows: their cells.
        header: show the columns' names.
        caption: stands below.
        whole_names: never break the first column either.
    """
    table = _Grid(
        box=SIMPLE_HEAD if header else None,
        show_header=header,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption=None if caption is None else Text(printable(caption)),
        caption_justify="left",
    )
    cells = [[printable(cell, keep="\n") for cell in row] for row in rows]
    for i, (name, justify) in enumerate(heads):
        whole = justify == "right" or (whole_names and i == 0)
        longest = max(cell_len(line) for cell in [name, *(row[i] for row in cells)] for line in cell.split("\n"))
        least = longest if whole else min(longest, _LEAST_WIDTH)
        table.add_column(Text(name), justify=justify, overflow="fold", no_wrap=whole, min_width=least)
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def spaced(*tables: Table) -> list[Table | str]:
    """Tables with an empty line between them, one after the other to be printed."""
    return [part for table in tables for part in (table, "")][:-1]
