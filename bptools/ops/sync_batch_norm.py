"""Batch normalisation over a batch that lies in parts on several processes.

Index legend: `k` processes, `n` the samples and positions of one of them (m[k]), `c` channels; M = Σ_k m[k].
Batch norm (see batch_norm.py) with every sum over n a sum over k as well. Each process takes the mean and variance
of its own part, all get them all, and those of the whole follow (Chan et al.), without a difference of squares:

    μ[c] = 1/M Σ_k m[k] μ[k,c]                σ²[c] = 1/M Σ_k m[k] (σ²[k,c] + (μ[k,c] - μ[c])²)
    x̂[n,c] = (x[n,c] - μ[c]) rstd[c]          y[n,c] = x̂[n,c] w[c] + b[c]        rstd = 1 / √(σ² + ε)

What is differentiated is the sum of the losses of all processes, and each has w and b of its own (of equal value).
Then db and dw are sums over a process alone, while μ and σ², which moved every x̂, gather from all:

    db[c] = Σ_n dy[n,c]          dw[c] = Σ_n dy[n,c] x̂[n,c]
    dx[n,c] = rstd[c] (g[n,c] - 1/M Σ_k w db - x̂[n,c] 1/M Σ_k w dw),          g = dy w

One exchange forward and, if x wants its gradient, one backward: 2c numbers. Every process has to take part in
both; one that has no samples sends zeros. x, two numbers a channel and M are kept.

The exchange, y = Σ_k x[k] on every process, is an op itself: its gradient is Σ_k dy[k], the same exchange. Through
it, second derivatives are right across processes too.

Sources: Ioffe and Szegedy, arXiv 1502.03167; Chan, Golub and LeVeque, "Algorithms for computing the sample
variance", 1983.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bptools.ops._core import EVERY, Op
from bptools.ops.batch_norm import _affine, _all_but_channel, _beside, _normalise


def all_reduce_forward(x: Tensor, group: Any) -> Tensor:
    """x (...) -> its sum over the processes of the group (...)."""
    y = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(y, group=group)
    return y


def all_reduce_backward(dy: Tensor, group: Any, needs=EVERY) -> tuple[Tensor]:
    """dy (...) -> dx (...)."""
    return (all_reduce(dy, group),)


all_reduce = Op(all_reduce_forward, all_reduce_backward, outputs="y", grads="x")


def sync_batch_norm_statistics(x: Tensor, eps: float, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """x (n, c, ...) -> mean, rstd (c,), total (): how many values a channel has in all."""
    mean, var, total = _of_all_parts(x, group)
    return mean, torch.rsqrt(var + eps), total


def sync_batch_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    group: Any,
) -> tuple[Tensor, ...]:
    """x (n, c, ...), all other tensors (c,) -> y (n, c, ...), mean, rstd (c,), total (), new_mean, new_var (c,).

    group is the process group; None for this process alone.
    """
    mean, var, total = _of_all_parts(x, group)
    rstd = torch.rsqrt(var + eps)
    new_mean = momentum * mean + (1 - momentum) * running_mean
    new_var = momentum * var * total / (total - 1) + (1 - momentum) * running_var
    return _affine(_normalise(x, mean, rstd), weight, bias), mean, rstd, total, new_mean, new_var


def sync_batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    total: Tensor,
    eps: float,
    group: Any,
    needs=EVERY,
) -> tuple[Tensor | None, ...]:
    """dy, x (n, c, ...), weight, mean and rstd (c,), total () -> dx (n, c, ...), dw, db (c,)."""
    dx = dw = db = None
    if "x" in needs or "weight" in needs:
        x_hat = _normalise(x, mean, rstd)
        dw = (dy * x_hat).sum(_all_but_channel(dy))
    if "x" in needs or "bias" in needs:
        db = dy.sum(_all_but_channel(dy))
    if "x" in needs:
        g, sums = dy, torch.stack([db, dw])  # (2, c)
        if weight is not None:
            g, sums = dy * _beside(weight, dy), sums * weight
        g_mean, g_x_hat_mean = _over_group(sums, group) / total
        dx = _beside(rstd, x) * (g - _beside(g_mean, x) - x_hat * _beside(g_x_hat_mean, x))
    return dx, dw if "weight" in needs else None, db if "bias" in needs else None


def _of_all_parts(x: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """x (n, c, ...) -> mean, var (c,), total () of all processes' x."""
    over = _all_but_channel(x)
    count = x.numel() // max(x.shape[1], 1)
    mean = x.sum(over) / max(count, 1)
    var = ((x - _beside(mean, x)) ** 2).sum(over) / max(count, 1)
    part = torch.cat([mean, var, mean.new_full((1,), count)])  # (2c + 1,)
    means, variances, counts = _gathered(part, group).split(
        [x.shape[1], x.shape[1], 1], 1
    )  # (k, c), (k, c), (k, 1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + (means - mean) ** 2)).sum(0) / total
    return mean, var, total


def _gathered(part: Tensor, group: Any) -> Tensor:
    """(d,) -> (k, d), a row for each process: each sends its own, among rows of zeros."""
    if group is None:
        return part.unsqueeze(0)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    rows = [part.new_zeros(rank, part.shape[0]), part.unsqueeze(0), part.new_zeros(size - 1 - rank, part.shape[0])]
    return _over_group(torch.cat(rows), group)


def _over_group(t: Tensor, group: Any) -> Tensor:
    return t if group is None else all_reduce(t, group)


sync_batch_norm = Op(
    sync_batch_norm_forward,
    sync_batch_norm_backward,
    outputs="y mean rstd total new_mean new_var",
    grads="x weight bias",
    keep_for=dict.fromkeys(("mean", "rstd"), "x weight") | {"x": "x weight", "weight": "x", "total": "x"},
    residuals=sync_batch_norm_statistics,
    mixed=True,
)
