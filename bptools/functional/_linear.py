"""Affine and bilinear maps."""

from __future__ import annotations

from torch import Tensor

from bptools.functional._checks import shape_of
from bptools.ops import bilinear as _bilinear
from bptools.ops import linear as _linear


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Affine map `input @ weight.T + bias`.

    Args:
        input: (..., in_features).
        weight: (out_features, in_features), or (in_features,) for a single output without bias.
        bias: (out_features,), or None.

    Returns:
        (..., out_features), or (...) for a 1-D weight.

    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if an argument is not a floating tensor, or the dtypes differ.
    """
    if weight.dim() == 1 and bias is None:
        return linear(input, weight.unsqueeze(0)).squeeze(-1)
    if weight.dim() != 2:
        raise ValueError(f"linear: weight must have 2 dimensions, or 1 without a bias, got {shape_of(weight)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: input must have shape (..., {weight.shape[1]}) to fit weight {shape_of(weight)}, "
            f"got {shape_of(input)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias must have shape ({weight.shape[0]},), got {shape_of(bias)}")
    return _linear.linear(input, weight, bias)


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Bilinear map of two inputs, `input1ᵀ weight[o] input2 + bias[o]` for each output o.

    Args:
        input1: (..., in1_features).
        input2: (..., in2_features), with the leading dimensions of input1.
        weight: (out_features, in1_features, in2_features).
        bias: (out_features,), or None.

    Returns:
        (..., out_features).

    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if an argument is not a floating tensor, or the dtypes differ.
    """
    if weight.dim() != 3:
        raise ValueError(f"bilinear: weight must have 3 dimensions, got {shape_of(weight)}")
    for name, t, features in (("input1", input1, weight.shape[1]), ("input2", input2, weight.shape[2])):
        if t.dim() == 0 or t.shape[-1] != features:
            raise ValueError(
                f"bilinear: {name} must have shape (..., {features}) to fit weight {shape_of(weight)}, "
                f"got {shape_of(t)}"
            )
    if input1.shape[:-1] != input2.shape[:-1]:
        raise ValueError(
            f"bilinear: input2 must have input1's leading dimensions {shape_of(input1)[:-1]}, "
            f"got {shape_of(input2)[:-1]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bilinear: bias must have shape ({weight.shape[0]},), got {shape_of(bias)}")
    return _bilinear.bilinear(input1, input2, weight, bias)
