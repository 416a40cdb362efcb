"""Activations: smooth ones, and relu and its kin."""

from __future__ import annotations

from torch import Tensor

from bptools.ops import activation as _activation


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


def logsigmoid(input: Tensor) -> Tensor:
    """The logarithm of `sigmoid(input)`, also where that underflows, over input (...). Keeps its output."""
    return _activation.logsigmoid(input)


def tanhshrink(input: Tensor) -> Tensor:
    """`input - tanh(input)` over input (...)."""
    return _activation.tanhshrink(input)


def softsign(input: Tensor) -> Tensor:
    """`input / (1 + |input|)` over input (...). Keeps its output for backward."""
    return _activation.softsign(input)


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """`log(1 + exp(beta * input)) / beta`, a smooth relu, over input (...).

    Args:
        input: (...).
        beta: the larger, the closer to relu.
        threshold: input is returned as it is where `beta * input` is above.
    """
    return _activation.softplus(input, beta, threshold)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """`input` where positive, `alpha * (exp(input) - 1)` elsewhere, over input (...).

    Keeps its output for backward, or the input, if alpha is negative.
    """
    op = _activation.elu if alpha >= 0 else _activation.negative_elu
    return op.inplace(input, alpha) if inplace else op(input, alpha)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """1.0507 times `elu` with an alpha of 1.6733, over input (...). Keeps its output for backward.

    The two numbers are such that activations of mean 0 and variance 1 have about those after the layer as well.
    """
    return _activation.selu.inplace(input) if inplace else _activation.selu(input)


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """`input` where positive, `alpha * (exp(input / alpha) - 1)` elsewhere, over input (...). Keeps its output.

    Raises:
        ValueError: if alpha is zero.
    """
    if alpha == 0:
        raise ValueError("celu: alpha must not be zero")
    apply = _activation.celu.inplace if inplace else _activation.celu
    return apply(input, alpha)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """`input * tanh(softplus(input))` over input (...)."""
    return _activation.mish.inplace(input) if inplace else _activation.mish(input)
