"""What tests of recipes share: a recipe's file as a module, and a signal that comes after so many steps."""

import importlib.util
import signal
import sys
from pathlib import Path

from bptools.finetune.verify import StopAfter


def load_recipe(path: Path, name: str):
    """Return the module of a recipe's file, under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Stop(StopAfter):
    """In place of ``Interrupt``."""

    signal = signal.SIGINT

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass
