"""Activations and softmax."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from bptools.functional._checks import shape_of
from bptools.ops import activation as _activation
from bptools.ops import softmax as _softmax


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """`max(input, 0)`, elementwise, over input (...); its gradient at 0 is 0. Keeps its output for backward."""
    return _activation.relu.inplace(input) if inplace else _activation.relu(input)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """`input` where positive, `negative_slope * input` elsewhere, over input (...)."""
    apply = _activation.leaky_relu.inplace if inplace else _activation.leaky_relu
    return apply(input, negative_slope)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Gaussian error linear unit, `input * Φ(input)`, over input (...).

    Args:
        input: (...).
        approximate: `"none"` for the exact Φ, `"tanh"` for its approximation by a hyperbolic tangent.

    Raises:
        ValueError: if `approximate` is neither.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return _activation.gelu(input, approximate)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """`input * sigmoid(input)`, also called swish, over input (...)."""
    return _activation.silu.inplace(input) if inplace else _activation.silu(input)


def sigmoid(input: Tensor) -> Tensor:
    """`1 / (1 + exp(-input))` over input (...). Keeps its output for backward."""
    return _activation.sigmoid(input)


def tanh(input: Tensor) -> Tensor:
    """Hyperbolic tangent over input (...). Keeps its output for backward."""
    return _activation.tanh(input)


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


def _softmax_dim(name: str, input: Tensor, dim: int | None, stacklevel: int) -> int:
    if dim is None:
        warnings.warn(
            f"Implicit dimension choice for {name} has been deprecated. "
            "Change the call to include dim=X as an argument.",
            stacklevel=stacklevel,
        )
        return 0 if input.dim() in (0, 1, 3) else 1
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"{name}: dim must be an int, got {dim!r}")
    dims = max(input.dim(), 1)
    if not -dims <= dim < dims:
        raise ValueError(f"{name}: dim must be from {-dims} to {dims - 1} for input {shape_of(input)}, got {dim}")
    return dim
