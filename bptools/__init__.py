"""bptools: backpropagation you can read, check and afford."""

import importlib

from bptools import functional, nn
from bptools.ops import backend

__all__ = ["backend", "finetune", "functional", "nn"]


def __getattr__(name: str) -> object:
    if name == "finetune":  # brings more than an op needs: imported on first use
        return importlib.import_module("bptools.finetune")
    raise AttributeError(f"module 'bptools' has no attribute {name!r}")
