"""Numbers as a table of plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as text, as wide as it needs to be: the first column aligned left, the others right.

    Examples:
        >>> print(format_table(["model", "ms"], [["dense", "12.5"], ["CLEAR", "4.1"]]))
        model    ms
        dense  12.5
        CLEAR   4.1
    """
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=1000, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
