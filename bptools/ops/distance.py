"""Cosine similarity, and the distance of two vectors in a p-norm.

Index legend: `n` pairs of vectors, `d` their features (one dimension of the inputs).

**Cosine similarity.** a = x1 / |x1| and b = x2 / |x2|, where a norm |·| smaller than ε is taken for ε:

    y[n] = Σ_d a[n,d] b[n,d]
    dx1[n,d] = dy[n] (b[n,d] - y[n] a[n,d]) / |x1[n]|           dx2[n,d] = dy[n] (a[n,d] - y[n] b[n,d]) / |x2[n]|

The length of x1 does not matter, so of what pulls at it, b, the part along x1 itself is taken out; but not where
|x1| is less than ε, for there the divisor is a constant. x1 and x2 are kept.

**Distance.** With u = x1 - x2 + ε, in every feature alike (so that the norm has a derivative where x1 = x2),

    y[n] = (Σ_d |u[n,d]|^p)^(1/p)
    dx1[n,d] = dy[n] sign(u[n,d]) (|u[n,d]| / y[n])^(p-1)       dx2 = -dx1

For p = 2 that is u / y. For p = ∞, y is the largest |u|, and its gradient is shared by all as large; for p = 0
it is the number of those that are not 0, and the gradient is 0. Where y = 0 the gradient is 0 as well. x1, x2
and y are kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Op

# Cosine similarity --------------------------------------------------------------------------------------------


def cosine_similarity_forward(x1: Tensor, x2: Tensor, dim: int, eps: float) -> Tensor:
    """x1 and x2 broadcast to (n, d), d at `dim` -> y (n)."""
    return (x1 / _length(x1, dim).clamp_min(eps) * (x2 / _length(x2, dim).clamp_min(eps))).sum(dim)


def cosine_similarity_backward(
    dy: Tensor, x1: Tensor, x2: Tensor, dim: int, eps: float, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy (n), x1 and x2 broadcast to (n, d) -> dx1 and dx2 (n, d)."""
    length1, length2 = _length(x1, dim), _length(x2, dim)  # (n, 1)
    divisor1, divisor2 = length1.clamp_min(eps), length2.clamp_min(eps)
    a, b = x1 / divisor1, x2 / divisor2
    y = (a * b).sum(dim, keepdim=True)
    dy = dy.unsqueeze(dim)
    dx1 = dx2 = None
    if "x1" in needs:
        dx1 = dy * (b - torch.where(length1 >= eps, y, 0) * a) / divisor1
    if "x2" in needs:
        dx2 = dy * (a - torch.where(length2 >= eps, y, 0) * b) / divisor2
    return dx1, dx2


def _length(x: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(x, 2, dim, keepdim=True)


cosine_similarity = Op(
    cosine_similarity_forward,
    cosine_similarity_backward,
    outputs="y",
    grads="x1 x2",
    autocast={"cuda": "float32"},
)


# Distance -----------------------------------------------------------------------------------------------------


def pairwise_distance_forward(x1: Tensor, x2: Tensor, p: float, eps: float, keepdim: bool) -> Tensor:
    """x1 and x2 broadcast to (n, d) -> y (n) or (n, 1)."""
    return torch.linalg.vector_norm(x1 - x2 + eps, p, -1, keepdim=keepdim)


def pairwise_distance_backward(
    dy: Tensor, x1: Tensor, x2: Tensor, y: Tensor, p: float, eps: float, keepdim: bool, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy and y (n) or (n, 1), x1 and x2 broadcast to (n, d) -> dx1 and dx2 (n, d)."""
    dy, y = (dy, y) if keepdim else (dy.unsqueeze(-1), y.unsqueeze(-1))
    dx1 = dy * norm_slope(x1 - x2 + eps, y, p)
    return (dx1 if "x1" in needs else None), (-dx1 if "x2" in needs else None)


def norm_slope(u: Tensor, norm: Tensor, p: float) -> Tensor:
    """The derivative of the p-norm of u (n, d), which is `norm` (n, 1) -> (n, d)."""
    if p == 0:
        return torch.zeros_like(u)
    if p == 1:
        return u.sign()
    if p == math.inf:
        largest = (u.abs() == u.abs().amax(-1, keepdim=True)).to(u.dtype)  # the norm may have been rounded
        return u.sign() * largest / largest.sum(-1, keepdim=True)
    norm = torch.where(norm == 0, 1, norm)  # where all of u is 0, and so is what it divides
    if p == 2:
        return u / norm
    size = torch.where(u == 0, 1, u.abs())  # of 0 the sign is 0, whatever the power
    return u.sign() * (size / norm) ** (p - 1)


pairwise_distance = Op(
    pairwise_distance_forward,
    pairwise_distance_backward,
    outputs="y",
    grads="x1 x2",
    autocast={"cuda": "float32"},
)
