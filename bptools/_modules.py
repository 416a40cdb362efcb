"""Which module runs now."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class Modules:
    """The path of the module that runs now, in this thread."""

    def __init__(self) -> None:
        self.thread, self.running, self.names = threading.get_ident(), [], weakref.WeakKeyDictionary()

    @property
    def path(self) -> str:
        return self.names[self.running[-1]] if self.running else ""

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        before = register_module_forward_pre_hook(self._enter)
        after = register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        if self._here():
            if module not in self.names:
                self.name(module, type(module).__name__)
            self.running.append(module)

    def _here(self) -> bool:
        """Whether this is the thread, and not torch.compile, which reads what hooks do."""
        return not torch.compiler.is_compiling() and threading.get_ident() == self.thread

    def name(self, module: torch.nn.Module, name: str) -> None:
        """Have the paths of a module and all within it begin with `name`."""
        self.names[module] = name
        for child_name, child in module.named_children():
            if child not in self.names:
                self.name(child, f"{name}.{child_name}")

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if self._here() and any(m is module for m in self.running):
            while self.running.pop() is not module:
                pass
