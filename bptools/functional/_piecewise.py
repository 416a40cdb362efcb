"""Activations made of pieces."""

from __future__ import annotations

from torch import Tensor

from bptools.functional._checks import check_input, rounded, shape_of
from bptools.ops import activation as _activation
from bptools.ops import piecewise as _piecewise


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """Clamp input (...) to the range from `min_val` to `max_val`. Keeps its output for backward.

    In half precision the two are rounded to input's dtype.

    Raises:
        ValueError: if min_val is larger than max_val.
    """
    if min_val > max_val:
        raise ValueError(f"hardtanh: min_val must be at most max_val {max_val}, got {min_val}")
    return _clamp("hardtanh", input, min_val, max_val, inplace)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """Clamp input (...) to the range from 0 to 6. Keeps its output for backward."""
    return _clamp("relu6", input, 0.0, 6.0, inplace)


def _clamp(name: str, input: Tensor, min_val: float, max_val: float, inplace: bool) -> Tensor:
    check_input(name, input)
    apply = _piecewise.hardtanh.inplace if inplace else _piecewise.hardtanh
    # The backward sees at the output which elements were clamped: the bounds must be what is found there.
    return apply(input, rounded(min_val, input.dtype), rounded(max_val, input.dtype))


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """`input / 6 + 1 / 2`, clamped to the range from 0 to 1, over input (...). Keeps its output for backward."""
    return _piecewise.hardsigmoid.inplace(input) if inplace else _piecewise.hardsigmoid(input)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """`input * hardsigmoid(input)` over input (...)."""
    return _piecewise.hardswish.inplace(input) if inplace else _piecewise.hardswish(input)


def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """`input` where it is above `threshold`, `value` elsewhere, over input (...).

    Keeps its output for backward, or the input, if value is above the threshold.
    """
    check_input("threshold", input)
    readable = rounded(value, input.dtype) <= threshold  # whether the output tells where that was
    op = _piecewise.threshold if readable else _piecewise.raised_threshold
    return op.inplace(input, threshold, value) if inplace else op(input, threshold, value)


def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """`input` where `|input|` is above `lambd`, 0 elsewhere, over input (...). Keeps its output for backward."""
    return _piecewise.hardshrink(input, lambd)


def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """`input` moved towards 0 by `lambd`, but not beyond, over input (...). Keeps its output for backward.

    Raises:
        ValueError: if lambd is negative.
    """
    if not lambd >= 0:
        raise ValueError(f"softshrink: lambd must be at least 0, got {lambd}")
    return _piecewise.softshrink(input, lambd)


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """`input` where positive, `weight * input` elsewhere, with a weight that is learned.

    Args:
        input: (n, c, ...), or any shape for a weight of one number.
        weight: (c,), one number for each channel, or one for all: (1,) or ().

    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if they are not floating, or of two dtypes.
    """
    check_input("prelu", input)
    check_input("prelu", weight, "weight")
    channels = input.shape[1] if input.dim() > 1 else 1
    if weight.dim() > 1 or weight.numel() not in (1, channels):
        raise ValueError(
            f"prelu: weight must have shape (), (1,) or ({channels},) for input {shape_of(input)}, "
            f"got {shape_of(weight)}"
        )
    if weight.numel() == 1:
        return _piecewise.prelu(input, weight.reshape(()))
    return _piecewise.prelu(input, weight.reshape(channels, *[1] * (input.dim() - 2)))


def rrelu(
    input: Tensor, lower: float = 1.0 / 8, upper: float = 1.0 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    """`input` where positive, `input` times a random number elsewhere.

    Draws the numbers that torch draws on the CPU, and keeps those for backward, and not the input.

    Args:
        input: (...).
        lower: the least number that is drawn.
        upper: the largest.
        training: if False, `leaky_relu` with the mean of the two, and nothing is drawn.
        inplace: write the result over input.

    Raises:
        ValueError: if lower is larger than upper.
        TypeError: if input is not floating.
    """
    check_input("rrelu", input)
    if not lower <= upper:
        raise ValueError(f"rrelu: lower must be at most upper {upper}, got {lower}")
    op, slope = _activation.leaky_relu, (lower + upper) / 2
    if training:
        op, slope = _piecewise.rrelu, _piecewise.draw_slopes(input, lower, upper)
    return op.inplace(input, slope) if inplace else op(input, slope)
