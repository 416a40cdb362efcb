"""Group normalisation: each sample by itself, one group of channels at a time.

Index legend: `n` samples, `g` groups, `e` what a group holds (its channels at every position, m in all); `c`
channels, each of which lies in one group; ⟨·⟩ the mean over e.

    μ[n,g] = ⟨x[n,g,e]⟩        σ²[n,g] = ⟨(x[n,g,e] - μ[n,g])²⟩        rstd = 1 / √(σ² + ε)
    x̂[n,g,e] = (x[n,g,e] - μ[n,g]) rstd[n,g]              y[n,c,..] = x̂[n,c,..] w[c] + b[c]

Statistics and parameters go by different letters: a group has its own μ and σ², a channel its own w and b. So the
gradients of the parameters are sums over samples and positions p, and that of x is layer normalisation's, with a
group for a row: with h = dy w, the gradient that reaches x̂,

    db[c] = Σ_n,p dy[n,c,p]          dw[c] = Σ_n,p dy[n,c,p] x̂[n,c,p]
    dx    = rstd (h - ⟨h⟩ - x̂ ⟨h x̂⟩)

x and two numbers a group are kept; x̂ is rebuilt from them.

Source: Wu and He, "Group normalization", arXiv 1803.08494.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op

aten = torch.ops.aten


def group_norm_statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """x (n, c, ...) -> mean, rstd (n, groups)."""
    var, mean = torch.var_mean(_grouped(x, groups), -1, correction=0)
    return mean, torch.rsqrt(var + eps)


def group_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x (n, c, ...), weight, bias (c,) -> y (n, c, ...), mean, rstd (n, groups)."""
    mean, rstd = group_norm_statistics(x, groups, eps)
    y = _normalise(x, mean, rstd, groups)
    if weight is not None:
        y = y * _beside(weight, x)
    if bias is not None:
        y = y + _beside(bias, x)
    return y, mean, rstd


def group_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    eps: float,
    needs=EVERY,
) -> tuple[Tensor | None, ...]:
    """dy, x (n, c, ...), weight (c,), mean and rstd (n, groups) -> dx (n, c, ...), dw, db (c,)."""
    dx = dw = db = None
    if "x" in needs or "weight" in needs:
        x_hat = _normalise(x, mean, rstd, groups)
    if "x" in needs:
        h = _grouped(dy if weight is None else dy * _beside(weight, dy), groups)  # (n, g, e)
        e_hat = _grouped(x_hat, groups)
        centred = h - h.mean(-1, keepdim=True) - e_hat * (h * e_hat).mean(-1, keepdim=True)
        dx = (rstd.unsqueeze(-1) * centred).reshape(dy.shape)
    if "weight" in needs:
        dw = _per_channel(dy * x_hat)
    if "bias" in needs:
        db = _per_channel(dy)
    return dx, dw, db


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(n, c, ...) -> (n, g, e)."""
    return x.reshape(x.shape[0], groups, x.shape[1:].numel() // groups)


def _normalise(x: Tensor, mean: Tensor, rstd: Tensor, groups: int) -> Tensor:
    return ((_grouped(x, groups) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)).reshape(x.shape)


def _beside(t: Tensor, x: Tensor) -> Tensor:
    """(c,) -> (c, 1, ...), to stand beside x (n, c, ...)."""
    return t.reshape(t.shape + (1,) * (x.dim() - 2))


def _per_channel(t: Tensor) -> Tensor:
    """(n, c, ...) -> its sums (c,)."""
    return t.sum((0, *range(2, t.dim())))


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2:].numel()


def _kernel_forward(x, weight, bias, groups, eps):
    return aten.native_group_norm(x.contiguous(), weight, bias, *_sizes(x), groups, eps)


def _kernel_backward(dy, x, weight, mean, rstd, groups, eps, needs):
    if x is None:  # the bias alone learns, and the kernel would want an x
        return group_norm_backward(dy, x, weight, mean, rstd, groups, eps, needs)
    mask = ["x" in needs, "weight" in needs, "bias" in needs]
    x, dy = x.contiguous(), dy.contiguous()
    return aten.native_group_norm_backward(dy, x, mean, rstd, weight, *_sizes(x), groups, mask)


group_norm = Op(
    group_norm_forward,
    group_norm_backward,
    outputs="y mean rstd",
    grads="x weight bias",
    keep_for={"x": "x weight", "weight": "x", "mean": "x weight", "rstd": "x weight"},
    residuals=group_norm_statistics,
    kernel=Kernel(_kernel_forward, _kernel_backward, lambda x, *rest: x.numel() > 0),
    autocast={"cuda": "float32"},
    mixed=True,
)
