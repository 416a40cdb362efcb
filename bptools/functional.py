"""The ops under torch.nn.functional's names and signatures.

Each function checks its arguments, resolves their defaults, and calls one op of `bptools.ops`; the derivation
and the code of the op are there. Values and gradients are torch's; arguments that torch accepts and bptools does
not yet raise `NotImplementedError`, and bad input raises an error that names the argument, what was expected and
what came.

Shapes are given in parentheses: `(..., d)` is any number of leading dimensions and a last one of size d.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bptools.ops import activation as _activation
from bptools.ops import layer_norm as _layer_norm
from bptools.ops import linear as _linear


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


# Linear -------------------------------------------------------------------------------------------------------


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
        raise ValueError(f"linear: weight must have 2 dimensions, or 1 without a bias, got {_shape(weight)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: input must have shape (..., {weight.shape[1]}) to fit weight {_shape(weight)}, "
            f"got {_shape(input)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias must have shape ({weight.shape[0]},), got {_shape(bias)}")
    return _linear.linear(input, weight, bias)


# Activations --------------------------------------------------------------------------------------------------


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


# Normalisation ------------------------------------------------------------------------------------------------


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Shift and scale each row to mean 0 and variance 1, then apply an affine map per feature.

    Args:
        input: (..., *normalized_shape).
        normalized_shape: the sizes of the last dimensions, over which mean and variance are taken.
        weight: normalized_shape, or None for 1.
        bias: normalized_shape, or None for 0.
        eps: added to the variance, in its units.

    Raises:
        ValueError: if the shapes do not fit.
    """
    _check_normalized("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    y, _, _ = _layer_norm.layer_norm(input, weight, bias, len(normalized_shape), eps)
    return y


def _check_normalized(name: str, input: Tensor, normalized_shape: Sequence[int], **affine: Tensor | None) -> None:
    shape = tuple(normalized_shape)
    if not shape:
        raise ValueError(f"{name}: normalized_shape must have at least one dimension, got ()")
    if _shape(input)[-len(shape) :] != shape:
        raise ValueError(f"{name}: input must end in normalized_shape {shape}, got {_shape(input)}")
    for argument, value in affine.items():
        if value is not None and _shape(value) != shape:
            raise ValueError(f"{name}: {argument} must have shape {shape}, got {_shape(value)}")
