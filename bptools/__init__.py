"""bptools: backpropagation you can read, check and afford."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bptools import check, diagnose, finetune, functional, memory, nn, optim
    from bptools.memory import lean
    from bptools.ops import backend

__all__ = ["backend", "check", "diagnose", "finetune", "functional", "lean", "memory", "nn", "optim"]

_FROM = {"backend": "bptools.ops", "lean": "bptools.memory"}


def __getattr__(name: str) -> object:
    """Import on first use, so that a part costs nothing to those who use another."""
    if name in _FROM:
        return getattr(importlib.import_module(_FROM[name]), name)
    if name in __all__:
        return importlib.import_module(f"bptools.{name}")
    raise AttributeError(f"module 'bptools' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
