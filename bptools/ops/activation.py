"""Elementwise activations.

Each is a function of one number, so its Jacobian is diagonal and the chain rule is one product an element:

    y = f(x)        dx = dy f'(x)

What differs is what f' can be read from. Where it is a function of the *output* (relu, sigmoid, tanh), y alone is
kept: the next layer usually keeps y as its own input, and then the activation costs no memory of its own.

    relu        max(x, 0)                   f' = [y > 0]
    leaky_relu  x if x > 0 else a x         f' = 1 if x > 0 else a
    sigmoid     σ(x) = 1 / (1 + e⁻ˣ)        f' = y (1 - y)
    tanh        tanh(x)                     f' = 1 - y²
    silu        x σ(x)                      f' = σ(x) (1 + x (1 - σ(x)))
    gelu        x Φ(x)                      f' = Φ(x) + x φ(x),  φ(x) = e^(-x²/2) / √(2π)
    gelu, tanh  x ½ (1 + tanh u),  u = √(2/π) (x + 0.044715 x³)
                                            f' = ½ (1 + t) + ½ x (1 - t²) u',  t = tanh u

At the kink of relu and leaky_relu, x = 0, we follow torch and take the left derivative: 0 and a.

Sources: Nair and Hinton 2010 (relu); Maas et al. 2013 (leaky_relu); Hendrycks and Gimpel, arXiv 1606.08415 (gelu,
silu); Ramachandran et al., arXiv 1710.05941 (silu as swish).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op

aten = torch.ops.aten


def relu_forward(x: Tensor) -> Tensor:
    """x (...) -> y (...)."""
    return x.clamp_min(0)


def relu_backward(dy: Tensor, y: Tensor, needs=EVERY) -> tuple[Tensor]:
    """dy, y (...) -> dx (...)."""
    return (torch.where(y <= 0, 0, dy),)


relu = Op(
    relu_forward,
    relu_backward,
    outputs="y",
    grads="x",
    kernel=Kernel(torch.relu, lambda dy, y, needs: (aten.threshold_backward(dy, y, 0),)),
)


def leaky_relu_forward(x: Tensor, negative_slope: float) -> Tensor:
    """x (...) -> y (...)."""
    return torch.where(x > 0, x, negative_slope * x)


def leaky_relu_backward(dy: Tensor, x: Tensor, negative_slope: float, needs=EVERY) -> tuple[Tensor]:
    """dy, x (...) -> dx (...)."""
    return (torch.where(x > 0, dy, negative_slope * dy),)


leaky_relu = Op(
    leaky_relu_forward,
    leaky_relu_backward,
    outputs="y",
    grads="x",
    kernel=Kernel(
        aten.leaky_relu,
        lambda dy, x, negative_slope, needs: (aten.leaky_relu_backward(dy, x, negative_slope, False),),
    ),
)


def sigmoid_forward(x: Tensor) -> Tensor:
    """x (...) -> y (...)."""
    return torch.sigmoid(x)


def sigmoid_backward(dy: Tensor, y: Tensor, needs=EVERY) -> tuple[Tensor]:
    """dy, y (...) -> dx (...)."""
    return (dy * (y * (1 - y)),)


sigmoid = Op(
    sigmoid_forward,
    sigmoid_backward,
    outputs="y",
    grads="x",
    kernel=Kernel(torch.sigmoid, lambda dy, y, needs: (aten.sigmoid_backward(dy, y),)),
)


def tanh_forward(x: Tensor) -> Tensor:
    """x (...) -> y (...)."""
    return torch.tanh(x)


def tanh_backward(dy: Tensor, y: Tensor, needs=EVERY) -> tuple[Tensor]:
    """dy, y (...) -> dx (...)."""
    return (dy * (1 - y * y),)


tanh = Op(
    tanh_forward,
    tanh_backward,
    outputs="y",
    grads="x",
    kernel=Kernel(torch.tanh, lambda dy, y, needs: (aten.tanh_backward(dy, y),)),
)


def silu_forward(x: Tensor) -> Tensor:
    """x (...) -> y (...)."""
    return x * torch.sigmoid(x)


def silu_backward(dy: Tensor, x: Tensor, needs=EVERY) -> tuple[Tensor]:
    """dy, x (...) -> dx (...)."""
    s = torch.sigmoid(x)
    return (dy * (s * (1 + x * (1 - s))),)


silu = Op(
    silu_forward,
    silu_backward,
    outputs="y",
    grads="x",
    kernel=Kernel(aten.silu, lambda dy, x, needs: (aten.silu_backward(dy, x),)),
)


def gelu_forward(x: Tensor, approximate: str) -> Tensor:
    """x (...), approximate "none" or "tanh" -> y (...)."""
    if approximate == "tanh":
        u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return x * (0.5 * (1 + torch.tanh(u)))
    return x * _gauss_cdf(x)


def gelu_backward(dy: Tensor, x: Tensor, approximate: str, needs=EVERY) -> tuple[Tensor]:
    """dy, x (...) -> dx (...)."""
    if approximate == "tanh":
        t = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        du = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
        return (dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * du),)
    density = 0.3989422804014327 * torch.exp(-0.5 * x * x)  # 1/√(2π); torch 2.10 cannot trace math.pi here
    return (dy * (_gauss_cdf(x) + x * density),)


def _gauss_cdf(x: Tensor) -> Tensor:
    """Φ(x), the probability that a standard normal number is below x."""
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


gelu = Op(
    gelu_forward,
    gelu_backward,
    outputs="y",
    grads="x",
    kernel=Kernel(
        lambda x, approximate: aten.gelu(x, approximate=approximate),
        lambda dy, x, approximate, needs: (aten.gelu_backward(dy, x, approximate=approximate),),
    ),
)
