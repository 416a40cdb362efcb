"""Softmax and its logarithm, along one dimension.

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

Source: Bridle, "Probabilistic interpretation of feedforward classification network outputs", 1990.
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
