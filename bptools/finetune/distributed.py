"""A process among others; here, the lone one."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True)
class Parallel:
    """A lone process."""

    rank: int = 0
    size: int = 1
    kind: Literal["none", "ddp", "fsdp"] = "none"
    device: str = "cpu"

    @property
    def main(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return what is to be called."""
        return model

    def rewrap(self, module: nn.Module) -> nn.Module:
        """Return what is to be called after ``requires_grad`` changed."""
        return module

    def accumulating(self, module: nn.Module, last: bool) -> AbstractContextManager:
        """Return a context in which gradients are exchanged if ``last``."""
        return nullcontext()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes."""
        return list(values)

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` holds in any process."""
        return flag

    def broadcast(self, obj: Any) -> Any:
        """Return the first process's ``obj``."""
        return obj

    def barrier(self) -> None:
        """Wait for all."""
