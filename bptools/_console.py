"""What rich would print, as text."""

from __future__ import annotations

import io
from typing import Any


def printed(renderable: Any, width: int = 114) -> str:
    """The text of anything that rich prints, in lines of at most `width` characters, without colours."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue().rstrip()
