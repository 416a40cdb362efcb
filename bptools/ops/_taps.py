"""Linear maps along one dimension of which every output reads a few places.

Index legend: `i` places in the input, I in all, `p` places in the output, `k` taps; the other dimensions are not
written. Tap k of output p reads place m[p,k] with weight w[p,k]:

    y[p] = Σ_k w[p,k] x[m[p,k]]            dx[i] = Σ_(p,k : m[p,k] = i) w[p,k] dy[p]

As y = W x with W[p,i] = Σ_k w[p,k] [m[p,k] = i], and dx = Wᵀ dy; but neither multiplies by the zeros of W, most of
it, nor makes a NaN of one and an infinity. A tap at place I reads nothing: that is how an output has fewer taps
than others. A map of several dimensions is one for each, in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather(x: Tensor, dim: int, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """x (..., i, ...), places and weights (p, k) -> y (..., p, ...).

    Without weights there is one tap, with weight 1: places (p,).
    """
    if weights is None:
        return x.index_select(dim, places)
    nothing = x.new_zeros(*x.shape[:dim], 1, *x.shape[dim + 1 :])
    x = torch.cat([x, nothing], dim).index_select(dim, places.flatten())
    x = x.reshape(*x.shape[:dim], *places.shape, *x.shape[dim + 1 :])  # (..., p, k, ...)
    return (x * _along(weights, x.dim() - dim - 2)).sum(dim + 1)


def scatter(dy: Tensor, dim: int, size: int, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """dy (..., p, ...), places and weights as above -> dx (..., i, ...), the transpose of `gather`."""
    if weights is None:
        return dy.new_zeros(*dy.shape[:dim], size, *dy.shape[dim + 1 :]).index_add(dim, places, dy)
    dt = dy.unsqueeze(dim + 1) * _along(weights, dy.dim() - dim - 1)  # (..., p, k, ...)
    dt = dt.reshape(*dy.shape[:dim], places.numel(), *dy.shape[dim + 1 :])
    dx = dy.new_zeros(*dy.shape[:dim], size + 1, *dy.shape[dim + 1 :])
    return dx.index_add(dim, places.flatten(), dt).narrow(dim, 0, size).contiguous()


def _along(weights: Tensor, behind: int) -> Tensor:
    """(p, k) -> (p, k, 1, ...), to stand over so many dimensions behind them."""
    return weights.reshape(*weights.shape, *[1] * behind)
