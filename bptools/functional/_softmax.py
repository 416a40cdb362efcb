"""Softmax and its kin."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from bptools.functional._checks import check_dim, check_input
from bptools.ops import softmax as _softmax


def softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """`exp(input)`, scaled so that it sums to 1 along `dim`. Keeps its output for backward.

    Args:
        input: (...).
        dim: the dimension that sums to 1. None warns and takes the first of 0, 1 or 3 dimensions, else the second.
        dtype: cast input to this first.

    Raises:
        ValueError: if input has no dimension `dim`.
        TypeError: if `dim` is not an int, or input (after the cast) not floating.
    """
    dim = _softmax_dim("softmax", input, dim, _stacklevel)
    return _softmax.softmax(input if dtype is None else input.to(dtype), dim)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """The logarithm of `softmax`, exact where that would underflow: (...) to (...), with `softmax`'s arguments."""
    dim = _softmax_dim("log_softmax", input, dim, _stacklevel)
    return _softmax.log_softmax(input if dtype is None else input.to(dtype), dim)


def softmin(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """`softmax` of `-input`: (...) to (...), with `softmax`'s arguments. Keeps its output for backward."""
    dim = _softmax_dim("softmin", input, dim, _stacklevel)
    return _softmax.softmin(input if dtype is None else input.to(dtype), dim)


def gumbel_softmax(
    logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> Tensor:
    """A random class for each row, in a form that has a gradient.

    Draws the numbers that torch draws on the CPU. Keeps the soft classes for backward.

    Args:
        logits: (...), logarithms of the classes' probabilities, up to a number for each row.
        tau: temperature, positive: the lower, the closer a row is to a single 1.
        hard: return rows of a single 1 and zeros, whose gradient is that of the soft ones: straight through.
        eps: deprecated in torch, of no effect; warns unless 1e-10.
        dim: the dimension of the classes, along which the result sums to 1.

    Returns:
        (...).

    Raises:
        ValueError: if tau is not positive, or logits has no dimension `dim`.
        TypeError: if logits is not floating, tau no number, or dim no int.
    """
    check_input("gumbel_softmax", logits, "logits")
    check_dim("gumbel_softmax", logits, dim)
    if not isinstance(tau, (int, float)):
        raise TypeError(f"gumbel_softmax: tau must be a number, got {type(tau).__name__}")
    if not tau > 0:
        raise ValueError(f"gumbel_softmax: tau must be positive, got {tau}")
    if eps != 1e-10:
        warnings.warn("gumbel_softmax: eps is deprecated and has no effect", stacklevel=2)
    soft = _softmax.gumbel_softmax(logits, _softmax.draw_gumbel(logits), tau, dim)
    return _softmax.one_hot(soft, dim) if hard and soft.numel() else soft


def _softmax_dim(name: str, input: Tensor, dim: int | None, stacklevel: int) -> int:
    if dim is None:
        warnings.warn(
            f"Implicit dimension choice for {name} has been deprecated. "
            "Change the call to include dim=X as an argument.",
            stacklevel=stacklevel,
        )
        return 0 if input.dim() in (0, 1, 3) else 1
    check_dim(name, input, dim)
    return dim
