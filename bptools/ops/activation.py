"""Elementwise activations: smooth ones, and relu and its kin.

Each is a function of one number, so its Jacobian is diagonal and the chain rule is one product an element:

    y = f(x)        dx = dy f'(x)

What differs is what f' can be read from. Where it is a function of the *output* (it has y in it below), y alone is
kept: the next layer usually keeps y as its own input, and then the activation costs no memory of its own.

    relu        max(x, 0)                   f' = [y > 0]
    leaky_relu  x if x > 0 else a x         f' = 1 if x > 0 else a
    sigmoid     σ(x) = 1 / (1 + e⁻ˣ)        f' = y (1 - y)
    logsigmoid  log σ(x)                    f' = 1 - σ(x) = 1 - eʸ
    tanh        tanh(x)                     f' = 1 - y²
    tanhshrink  x - tanh(x)                 f' = tanh(x)²
    softsign    x / (1 + |x|)               f' = 1 / (1 + |x|)² = (1 - |y|)²
    softplus    log(1 + e^(βx)) / β         f' = σ(βx)
    elu         x if x > 0 else α (eˣ - 1)  f' = 1 if y > 0 else y + α
    selu        λ elu(x), see below         f' = λ if y > 0 else y + λ α
    celu        x if x > 0 else α (e^(x/α) - 1)
                                            f' = 1 if y > 0 else y / α + 1
    silu        x σ(x)                      f' = σ(x) (1 + x (1 - σ(x)))
    mish        x t,  t = tanh(log(1 + eˣ)) f' = t + x (1 - t²) σ(x)
    gelu        x Φ(x)                      f' = Φ(x) + x φ(x),  φ(x) = e^(-x²/2) / √(2π)
    gelu, tanh  x ½ (1 + tanh u),  u = √(2/π) (x + 0.044715 x³)
                                            f' = ½ (1 + t) + ½ x (1 - t²) u',  t = tanh u

At the kink of relu and its kin, x = 0, we follow torch and take the left derivative: 0, a, α, λ α.

elu with a negative α is positive on both sides of 0, so its y does not tell which; then x is kept. softplus is x
itself where βx exceeds a threshold, and its y does not tell exactly where that was: x is kept too. selu's numbers,
λ = 1.0507 and α = 1.6733, are those for which mean 0 and variance 1 of a normal x are y's mean and variance too.

Sources: Nair and Hinton 2010 (relu); Maas et al. 2013 (leaky_relu); Clevert et al., arXiv 1511.07289 (elu);
Klambauer et al., arXiv 1706.02515 (selu); Barron, arXiv 1704.07483 (celu); Dugas et al. 2000 (softplus); Turian et
al. 2009 (softsign); Misra, arXiv 1908.08681 (mish); Hendrycks and Gimpel, arXiv 1606.08415 (gelu, silu);
Ramachandran et al., arXiv 1710.05941 (silu as swish).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op, outside_transforms

aten = torch.ops.aten

SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946

pointwise = functools.partial(Op, outputs="y", grads="x")


def relu_forward(x: Tensor) -> Tensor:
    """x (...) -> y (...)."""
    return x.clamp_min(0)


def relu_backward(dy: Tensor, y: Tensor, needs=EVERY) -> tuple[Tensor]:
    """dy, y (...) -> dx (...)."""
    return (torch.where(y <= 0, 0, dy),)


relu = pointwise(
    relu_forward,
    relu_backward,
    kernel=Kernel(torch.relu, lambda dy, y, needs: (aten.threshold_backward(dy, y, 0),)),
)


def leaky_relu_forward(x: Tensor, negative_slope: float) -> Tensor:
    """x (...) -> y (...)."""
    return torch.where(x > 0, x, negative_slope * x)


def leaky_relu_backward(dy: Tensor, x: Tensor, negative_slope: float, needs=EVERY) -> tuple[Tensor]:
    """dy, x (...) -> dx (...)."""
    return (torch.where(x > 0, dy, negative_slope * dy),)


leaky_relu = pointwise(
    leaky_relu_forward,
    leaky_relu_backward,
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


sigmoid = pointwise(
    sigmoid_forward,
    sigmoid_backward,
    kernel=Kernel(torch.sigmoid, lambda dy, y, needs: (aten.sigmoid_backward(dy, y),)),
)


def tanh_forward(x: Tensor) -> Tensor:
    """x (...) -> y (...)."""
    return torch.tanh(x)


def tanh_backward(dy: Tensor, y: Tensor, needs=EVERY) -> tuple[Tensor]:
    """dy, y (...) -> dx (...)."""
    return (dy * (1 - y * y),)


tanh = pointwise(
    tanh_forward,
    tanh_backward,
    kernel=Kernel(torch.tanh, lambda dy, y, needs: (aten.tanh_backward(dy, y),)),
)


def tanhshrink_forward(x: Tensor) -> Tensor:
    """x (...) -> y (...)."""
    return x - torch.tanh(x)


def tanhshrink_backward(dy: Tensor, x: Tensor, needs=EVERY) -> tuple[Tensor]:
    """dy, x (...) -> dx (...)."""
    t = torch.tanh(x)
    return (dy * (t * t),)


tanhshrink = pointwise(tanhshrink_forward, tanhshrink_backward)


def softsign_forward(x: Tensor) -> Tensor:
    """x (...) -> y (...)."""
    return x / (1 + x.abs())


def softsign_backward(dy: Tensor, y: Tensor, needs=EVERY) -> tuple[Tensor]:
    """dy, y (...) -> dx (...)."""
    root = 1 - y.abs()
    return (dy * (root * root),)


softsign = pointwise(softsign_forward, softsign_backward)


def softplus_forward(x: Tensor, beta: float, threshold: float) -> Tensor:
    """x (...) -> y (...)."""
    z = beta * x
    return torch.where(z > threshold, x, torch.log1p(torch.exp(z)) / beta)


def softplus_backward(dy: Tensor, x: Tensor, beta: float, threshold: float, needs=EVERY) -> tuple[Tensor]:
    """dy, x (...) -> dx (...)."""
    z = beta * x
    return (torch.where(z > threshold, dy, dy * torch.sigmoid(z)),)


softplus = pointwise(
    softplus_forward,
    softplus_backward,
    kernel=Kernel(
        aten.softplus, lambda dy, x, beta, threshold, needs: (aten.softplus_backward(dy, x, beta, threshold),)
    ),
)


def logsigmoid_forward(x: Tensor) -> Tensor:
    """x (...) -> y (...)."""
    return x.clamp_max(0) - torch.log1p(torch.exp(-x.abs()))


def logsigmoid_backward(dy: Tensor, y: Tensor, needs=EVERY) -> tuple[Tensor]:
    """dy, y (...) -> dx (...)."""
    return (-dy * torch.expm1(y),)


logsigmoid = pointwise(logsigmoid_forward, logsigmoid_backward)


def elu_forward(x: Tensor, alpha: float) -> Tensor:
    """x (...) -> y (...)."""
    return torch.where(x > 0, x, alpha * torch.expm1(x))


def elu_backward(dy: Tensor, y: Tensor, alpha: float, needs=EVERY) -> tuple[Tensor]:
    """dy, y (...) -> dx (...), for alpha of at least 0."""
    return (torch.where(y <= 0, dy * (y + alpha), dy),)


elu = pointwise(
    elu_forward,
    elu_backward,
    kernel=Kernel(aten.elu, lambda dy, y, alpha, needs: (aten.elu_backward(dy, alpha, 1, 1, True, y),)),
)


def negative_elu_backward(dy: Tensor, x: Tensor, alpha: float, needs=EVERY) -> tuple[Tensor]:
    """dy, x (...) -> dx (...), for any alpha."""
    return (torch.where(x <= 0, dy * (alpha * torch.exp(x.clamp_max(0))), dy),)


negative_elu = pointwise(
    elu_forward,
    negative_elu_backward,
    kernel=Kernel(aten.elu, lambda dy, x, alpha, needs: (aten.elu_backward(dy, alpha, 1, 1, False, x),)),
)


def selu_forward(x: Tensor) -> Tensor:
    """x (...) -> y (...)."""
    return torch.where(x > 0, SELU_SCALE * x, SELU_SCALE * SELU_ALPHA * torch.expm1(x))


def selu_backward(dy: Tensor, y: Tensor, needs=EVERY) -> tuple[Tensor]:
    """dy, y (...) -> dx (...)."""
    return (torch.where(y <= 0, dy * (y + SELU_SCALE * SELU_ALPHA), SELU_SCALE * dy),)


selu = pointwise(
    selu_forward,
    selu_backward,
    kernel=Kernel(aten.selu, lambda dy, y, needs: (aten.elu_backward(dy, SELU_ALPHA, SELU_SCALE, 1, True, y),)),
)


def celu_forward(x: Tensor, alpha: float) -> Tensor:
    """x (...) -> y (...)."""
    return torch.where(x > 0, x, alpha * torch.expm1(x / alpha))


def celu_backward(dy: Tensor, y: Tensor, alpha: float, needs=EVERY) -> tuple[Tensor]:
    """dy, y (...) -> dx (...)."""
    return (torch.where(y <= 0, dy * (y / alpha + 1), dy),)


celu = pointwise(
    celu_forward,
    celu_backward,
    kernel=Kernel(
        aten.celu,
        lambda dy, y, alpha, needs: (aten.elu_backward(dy, alpha, 1, 1 / alpha, True, y),),
        usable=lambda x, alpha: alpha > 0,
    ),
)


def silu_forward(x: Tensor) -> Tensor:
    """x (...) -> y (...)."""
    return x * torch.sigmoid(x)


def silu_backward(dy: Tensor, x: Tensor, needs=EVERY) -> tuple[Tensor]:
    """dy, x (...) -> dx (...)."""
    s = torch.sigmoid(x)
    return (dy * (s * (1 + x * (1 - s))),)


silu = pointwise(
    silu_forward,
    silu_backward,
    kernel=Kernel(aten.silu, lambda dy, x, needs: (aten.silu_backward(dy, x),)),
)


def mish_forward(x: Tensor) -> Tensor:
    """x (...) -> y (...)."""
    return x * torch.tanh(torch.nn.functional.softplus(x))


def mish_backward(dy: Tensor, x: Tensor, needs=EVERY) -> tuple[Tensor]:
    """dy, x (...) -> dx (...)."""
    t = torch.tanh(torch.nn.functional.softplus(x))
    return (dy * (t + x * (1 - t * t) * torch.sigmoid(x)),)


mish = pointwise(
    mish_forward,
    mish_backward,
    kernel=Kernel(aten.mish, lambda dy, x, needs: (aten.mish_backward(dy, x),), usable=outside_transforms),
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


gelu = pointwise(
    gelu_forward,
    gelu_backward,
    kernel=Kernel(
        lambda x, approximate: aten.gelu(x, approximate=approximate),
        lambda dy, x, approximate, needs: (aten.gelu_backward(dy, x, approximate=approximate),),
    ),
)
