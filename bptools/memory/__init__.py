"""What is kept for the backward pass: `lean()` keeps less, the `ledger` shows it."""

from ._lean import Session, lean
from ._ledger import Ledger, ledger

__all__ = ["Ledger", "Session", "lean", "ledger"]
