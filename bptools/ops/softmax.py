"""Softmax, its logarithm, and its kin, along one dimension.

Index legend: `n` rows (all other dimensions), `c` and `k` positions along `dim`.

    p[n,c] = exp(x[n,c]) / Σ_k exp(x[n,k])              softmax: y = p        log_softmax: y = log p

Rows do not mix, so the Jacobian has one square block a row. Position k stands in the numerator of p[k] alone, and
in the denominator of all:

    ∂p[c]/∂x[k]     = p[c] [c = k] - p[c] p[k]          the block is diag(p) - p pᵀ
    ∂log p[c]/∂x[k] =      [c = k] -      p[k]          the same over p[c]: I - 1 pᵀ

    softmax         dx[k] = Σ_c dy[c] ∂p[c]/∂x[k]     = p[k] (dy[k] - Σ_c dy[c] p[c]),      p = y
    log_softmax     dx[k] = Σ_c dy[c] ∂log p[c]/∂x[k] = dy[k] - p[k] Σ_c dy[c],             p = exp(y)

Both read the output alone, so x is not kept. A number added to a whole row does not change its p: we take off the
row's largest, so that no exponential overflows; and no gradient flows through that largest.

softmin is the softmax of -x, so its gradient is that of softmax with the sign turned.

**A softmax with noise.** With g[n,c] drawn from Gumbel's distribution, the place of the largest of x + g is a draw
of a class with probability p[c]. gumbel_softmax is its smooth stand-in, at a temperature τ, and with `hard` the
draw itself:

    y = softmax((x + g) / τ)                        dx[k] = y[k] (dy[k] - Σ_c dy[c] y[c]) / τ
    y = one-hot(largest place of that softmax)      dsoft = dy: straight through

The one-hot vector is flat almost everywhere, so its true gradient is of no use; as in the sources, the gradient of
its soft stand-in takes its place. g is drawn before the op, is a constant of it, and is not kept.

Sources: Bridle, "Probabilistic interpretation of feedforward classification network outputs", 1990; Jang et al.,
arXiv 1611.01144, and Maddison et al., arXiv 1611.00712 (gumbel_softmax); Bengio et al., arXiv 1308.3432 (straight
through).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op

aten = torch.ops.aten


def softmax_forward(x: Tensor, dim: int) -> Tensor:
    """x (...) -> y (...)."""
    e = torch.exp(_below_zero(x, dim))
    return e / e.sum(dim, keepdim=True)


def softmax_backward(dy: Tensor, y: Tensor, dim: int, needs=EVERY) -> tuple[Tensor]:
    """dy, y (...) -> dx (...)."""
    return (y * (dy - (dy * y).sum(dim, keepdim=True)),)


def log_softmax_forward(x: Tensor, dim: int) -> Tensor:
    """x (...) -> y (...)."""
    z = _below_zero(x, dim)
    return z - torch.log(torch.exp(z).sum(dim, keepdim=True))


def log_softmax_backward(dy: Tensor, y: Tensor, dim: int, needs=EVERY) -> tuple[Tensor]:
    """dy, y (...) -> dx (...)."""
    return (dy - torch.exp(y) * dy.sum(dim, keepdim=True),)


def _below_zero(x: Tensor, dim: int) -> Tensor:
    """x less the largest number of its row."""
    return x - x.detach().amax(dim, keepdim=True) if x.numel() else x


softmax = Op(
    softmax_forward,
    softmax_backward,
    outputs="y",
    grads="x",
    kernel=Kernel(
        lambda x, dim: aten._softmax(x, dim, False),
        lambda dy, y, dim, needs: (aten._softmax_backward_data(dy, y, dim, y.dtype),),
    ),
    autocast={"cuda": "float32"},
)

log_softmax = Op(
    log_softmax_forward,
    log_softmax_backward,
    outputs="y",
    grads="x",
    kernel=Kernel(
        lambda x, dim: aten._log_softmax(x, dim, False),
        lambda dy, y, dim, needs: (aten._log_softmax_backward_data(dy, y, dim, y.dtype),),
    ),
    autocast={"cuda": "float32"},
)


def softmin_forward(x: Tensor, dim: int) -> Tensor:
    """x (...) -> y (...)."""
    return softmax_forward(-x, dim)


def softmin_backward(dy: Tensor, y: Tensor, dim: int, needs=EVERY) -> tuple[Tensor]:
    """dy, y (...) -> dx (...)."""
    return (y * ((dy * y).sum(dim, keepdim=True) - dy),)


softmin = Op(
    softmin_forward,
    softmin_backward,
    outputs="y",
    grads="x",
    kernel=Kernel(
        lambda x, dim: aten._softmax(-x, dim, False),
        lambda dy, y, dim, needs: (-aten._softmax_backward_data(dy, y, dim, y.dtype),),
    ),
    autocast={"cuda": "float32"},
)


def draw_gumbel(x: Tensor) -> Tensor:
    """x (...) -> noise (...): on the CPU the numbers that torch's gumbel_softmax would draw."""
    return -torch.empty_like(x, memory_format=torch.legacy_contiguous_format).exponential_().log()


def gumbel_softmax_forward(x: Tensor, noise: Tensor, tau: float, dim: int) -> Tensor:
    """x and noise (...) -> y (...)."""
    return softmax_forward((x + noise) / tau, dim)


def gumbel_softmax_backward(dy: Tensor, y: Tensor, tau: float, dim: int, needs=EVERY) -> tuple[Tensor]:
    """dy, y (...) -> dx (...)."""
    return (softmax_backward(dy, y, dim)[0] / tau,)


gumbel_softmax = Op(
    gumbel_softmax_forward,
    gumbel_softmax_backward,
    outputs="y",
    grads="x",
    kernel=Kernel(
        lambda x, noise, tau, dim: aten._softmax((x + noise) / tau, dim, False),
        lambda dy, y, tau, dim, needs: (aten._softmax_backward_data(dy, y, dim, y.dtype) / tau,),
    ),
    autocast={"cuda": "float32"},
)


def one_hot_forward(x: Tensor, dim: int) -> Tensor:
    """x (...) -> y (...): 1 at the first place of the largest number along `dim`, else 0."""
    return torch.zeros_like(x).scatter(dim, x.argmax(dim, keepdim=True), 1.0)


def one_hot_backward(dy: Tensor, dim: int, needs=EVERY) -> tuple[Tensor]:
    """dy (...) -> dx (...), straight through."""
    return (dy,)


one_hot = Op(one_hot_forward, one_hot_backward, outputs="y", grads="x")
