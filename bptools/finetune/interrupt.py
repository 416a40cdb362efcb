"""Ctrl-C and SIGTERM as a flag that a training loop reads between two steps."""

import signal
import sys

from .distributed import speaks


class Interrupt:
    """While active, the first SIGINT or SIGTERM only raises a flag; the second acts as usual.

    Attributes:
        signal: Number of the signal received, 0 if none.
    """

    def __init__(self):
        self.signal = 0
        self._previous = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def __bool__(self) -> bool:
        return self.signal != 0

    def _receive(self, number: int, _frame: object) -> None:
        self.signal = number
        self.__exit__()
        if speaks():
            print("\nstopping after this step; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)
