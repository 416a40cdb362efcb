"""Tables for the terminal, and what rich would print as text; rich is imported by what needs it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def plain_table(title: str, columns: Mapping[str, str], rows: Sequence[Sequence[object]]) -> Table:
    """Return a table without vertical lines; ``columns`` maps each heading to its justification."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for heading, justify in columns.items():
        table.add_column(heading, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    return table


def printed(renderable: Any, width: int = 114) -> str:
    """The text of anything that rich prints, in lines of at most `width` characters, without colours."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue().rstrip()
