"""The auditor of `autograd.Function`s: it looks for every way in which one can be wrong.

`check_function(fn, samples)` asks, and its report says what it found; `bptools check package.module:Function` does
it from a shell; the pytest plugin makes one test of every question. `zoo` holds a broken Function for each known
defect.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bptools.check._auditor import DTYPES, Audit, check_function
    from bptools.check._report import Failure, Report, Result

__all__ = ["DTYPES", "Audit", "Failure", "Report", "Result", "check_function", "strategies", "zoo"]

_HOMES = {
    "DTYPES": "_auditor",
    "Audit": "_auditor",
    "check_function": "_auditor",
    "Failure": "_report",
    "Report": "_report",
    "Result": "_report",
}


def __getattr__(name: str) -> object:
    """Import on first use: pytest loads this package's plugin in every run, and that must not import torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"bptools.check.{_HOMES[name]}"), name)
    if name in ("strategies", "zoo"):
        return importlib.import_module(f"bptools.check.{name}")
    raise AttributeError(f"module 'bptools.check' has no attribute {name!r}")
