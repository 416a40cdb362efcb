"""Gated products."""

from __future__ import annotations

from torch import Tensor

from bptools.functional._checks import check_dim, check_input, shape_of
from bptools.ops import gated as _gated


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """`up * sigmoid(gate)`, with up and gate the two halves of input along `dim`.

    Args:
        input: (..., 2d, ...).
        dim: the dimension that is halved.

    Returns:
        (..., d, ...).

    Raises:
        ValueError: if input has no such dimension, or an odd size there.
        TypeError: if input is not floating, or dim no int.
    """
    check_input("glu", input)
    check_dim("glu", input, dim)
    if input.dim() == 0 or input.shape[dim] % 2:
        raise ValueError(f"glu: input must have an even size in dimension {dim}, got {shape_of(input)}")
    return _gated.glu(input, dim)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, over gate and up (...). Keeps the two for backward, and nothing else.

    Raises:
        ValueError: if up has another shape than gate.
        TypeError: if they are not floating, or of two dtypes.
    """
    _check_pair("swiglu", gate, up)
    return _gated.swiglu(gate, up)


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """`gelu(gate, approximate) * up`, over gate and up (...). Keeps the two for backward, and nothing else.

    Raises:
        ValueError: if up has another shape than gate, or `approximate` is neither "none" nor "tanh".
        TypeError: if they are not floating, or of two dtypes.
    """
    _check_pair("geglu", gate, up)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"geglu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return _gated.geglu(gate, up, approximate)


def reglu(gate: Tensor, up: Tensor) -> Tensor:
    """`relu(gate) * up`, over gate and up (...). Keeps the two for backward, and nothing else.

    Raises:
        ValueError: if up has another shape than gate.
        TypeError: if they are not floating, or of two dtypes.
    """
    _check_pair("reglu", gate, up)
    return _gated.reglu(gate, up)


def _check_pair(name: str, gate: Tensor, up: Tensor) -> None:
    check_input(name, gate, "gate")
    check_input(name, up, "up")
    if gate.shape != up.shape:
        raise ValueError(f"{name}: up must have gate's shape {shape_of(gate)}, got {shape_of(up)}")
    if gate.dtype is not up.dtype:
        raise TypeError(f"{name}: up must have gate's dtype {gate.dtype}, got {up.dtype}")
