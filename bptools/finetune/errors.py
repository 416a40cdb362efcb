"""The one error that a recipe turns into a single line: something the user gave is wrong."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A file, folder, name or setting given by the user cannot be used; the message says which and why."""


def expect_positive(settings: object, names: str) -> None:
    """Raise an :class:`InputError` for the first of the attributes ``names``, parted by spaces, not above 0."""
    for name in names.split():
        if not getattr(settings, name) > 0:
            raise InputError(f"--{name.replace('_', '-')}: expected more than 0, got {getattr(settings, name)}")


def suggestion(word: str, choices: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest of ``choices``, or an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def one_line(error: BaseException) -> str:
    """Return the message of ``error`` as one line, also where a data-loader worker wrapped it in a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1].split("InputError: ", 1)[-1] if "DataLoader worker" in lines[0] else lines[0]
