"""Memory of the backward pass."""

from ._lean import lean

__all__ = ["lean"]
