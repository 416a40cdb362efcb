"""The ops: one file per family, each with its derivation, its forward, its backward and its Function.

To make an op of your own out of a forward and a backward, see `Op`.
"""

from bptools.ops._core import EVERY, Kernel, Op, backend

__all__ = ["EVERY", "Kernel", "Op", "backend"]
