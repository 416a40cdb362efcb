"""Losses of classes: cross entropy, of class indices and of class probabilities, and the negative log likelihood.

Index legend: `n` rows (the batch and all dimensions after the class), `c` and `k` classes (C of them).

**Cross entropy.** A row's target is an amount of each class, q[n,c], and p is the softmax of the logits x:

    loss[n] = -Σ_c q[n,c] log p[n,c]

With class weights w (1 if not given) and label smoothing s, by which a share s of every target is spread evenly
over the classes, q is

    q[n,c] = w[c] ((1 - s) [c = t[n]] + s / C)              for class indices t[n]
    q[n,c] = w[c] ((1 - s) target[n,c] + s / C)             for class probabilities

The losses are returned as they are, summed, or averaged: class indices divide the sum by Σ_n w[t[n]], class
probabilities by the number of rows. A row whose index is ignore_index is in neither sum; its loss is 0.

Let g[n] be the gradient that reaches loss[n]: dy, divided as the mean divides, and 0 for an ignored row. With
∂log p[c]/∂x[k] = [c = k] - p[k] (see softmax.py) and Q[n] = Σ_c q[n,c],

    dx[n,k] = -g[n] Σ_c q[n,c] ([c = k] - p[n,k]) = g[n] (Q[n] p[n,k] - q[n,k])

the predicted less the wanted, for Q = 1 without weights. Where the target is probabilities, they learn too:

    dtarget[n,c] = -g[n] log p[n,c] w[c] (1 - s)            dweight[c] = -Σ_n g[n] log p[n,c] q[n,c] / w[c]

The logits are kept, and nothing else of their size: the backward computes p again, where autograd would have kept
log p, a second n × C numbers.

**Negative log likelihood** is cross entropy from log p on: x holds log p, whatever they are, and

    loss[n] = -w[t[n]] x[n,t[n]]            dx[n,c] = -g[n] w[t[n]] [c = t[n]]

averaged and ignoring as above. The loss is linear in x, so nothing of its size is kept.

Sources: Bridle, "Probabilistic interpretation of feedforward classification network outputs", 1990 (softmax and
its cross entropy); Szegedy et al., arXiv 1512.00567 (label smoothing).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from bptools.ops._core import EVERY, Kernel, Op, outside_transforms
from bptools.ops._reduction import REDUCTIONS, reduce_rows, row_gradient
from bptools.ops.softmax import log_softmax_forward, softmax_forward

aten = torch.ops.aten

# Cross entropy of class indices -------------------------------------------------------------------------------


def cross_entropy_forward(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """x (n, C, ...) or (C,), target (n, ...) or (), weight (C,) -> y (n, ...) or ()."""
    dim, kept, t, wt, w = _targets(x, target, weight, ignore_index)
    log_p = log_softmax_forward(x, dim)
    rows = (label_smoothing - 1) * wt * log_p.gather(dim, t.unsqueeze(dim)).squeeze(dim)  # (n, ...)
    if label_smoothing:
        rows = rows - label_smoothing / x.shape[dim] * (w * log_p).sum(dim)
    return reduce_rows(torch.where(kept, rows, 0), reduction, wt.sum())


def cross_entropy_backward(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    needs=EVERY,
) -> tuple[Tensor, None]:
    """dy (n, ...) or (), x (n, C, ...), target (n, ...), weight (C,) -> dx (n, C, ...), and none for weight."""
    _refuse_weight(needs)
    dim, kept, t, wt, w = _targets(x, target, weight, ignore_index)
    g = torch.where(kept, row_gradient(dy, reduction, wt.sum()), 0)  # (n, ...)
    q = torch.zeros_like(x).scatter(dim, t.unsqueeze(dim), ((1 - label_smoothing) * wt).unsqueeze(dim))
    q = q + label_smoothing / x.shape[dim] * w  # (n, C, ...)
    return g.unsqueeze(dim) * (q.sum(dim, keepdim=True) * softmax_forward(x, dim) - q), None


def _refuse_weight(needs) -> None:
    if needs is not EVERY and "weight" in needs:
        raise NotImplementedError("cross_entropy: weight has no gradient with class indices (nor has torch's)")


def _targets(x, target, weight, ignore_index):
    """The class dimension; which rows are kept; each row's class and its weight, 0 if ignored; all weights."""
    dim = _class_dim(x)
    w = _class_weights(x, weight, dim)
    kept = target != ignore_index
    t = torch.where(kept, target, 0)
    wt = w.flatten().index_select(0, t.flatten()).reshape(t.shape)  # (n, ...); IndexError for what is no class
    return dim, kept, t, torch.where(kept, wt, 0), w


def _class_dim(x: Tensor) -> int:
    return 0 if x.dim() == 1 else 1


def _class_weights(x: Tensor, weight: Tensor | None, dim: int) -> Tensor:
    """The weight of each class, in at least float32, as it broadcasts against x: (C, 1...)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    w = torch.ones(x.shape[dim], dtype=dtype, device=x.device) if weight is None else weight.to(dtype)
    return w.reshape(-1, *[1] * (x.dim() - 1 - dim))


def _kernel_forward(x, target, weight, ignore_index, label_smoothing, reduction):
    number = REDUCTIONS.index(reduction)
    return aten.cross_entropy_loss(x, target, weight, number, ignore_index, label_smoothing)


def _kernel_backward(dy, x, target, weight, ignore_index, label_smoothing, reduction, needs):
    _refuse_weight(needs)
    dim = _class_dim(x)
    p = torch.softmax(x, dim, dtype=torch.promote_types(x.dtype, torch.float32))
    kept = target != ignore_index
    t = target * kept
    wt = kept if weight is None else torch.where(kept, weight[t].to(p.dtype), 0)  # (n, ...)
    g = torch.where(kept, row_gradient(dy.to(p.dtype), reduction, wt.sum()), 0).unsqueeze(dim)  # (n, 1, ...)
    hit = g if weight is None else g * wt.unsqueeze(dim)
    t = t.unsqueeze(dim)
    if not label_smoothing:
        return _times(p, hit).scatter_add_(dim, t, -hit), None
    w = _class_weights(x, weight, dim)
    hit, even = (1 - label_smoothing) * hit, label_smoothing / x.shape[dim] * g
    dx = _times(p, hit + even * w.sum())
    return dx.scatter_add_(dim, t, -hit).addcmul_(even, w, value=-1), None


def _times(p: Tensor, scale: Tensor) -> Tensor:
    """p * scale, in the place of p, which is (n, C, ...); scale (n, 1, ...)."""
    # Not in place under vmap (torch.func's, or autograd's for batched gradients): scale may have a batch
    # dimension that p lacks.
    vmapped = not outside_transforms() or is_legacy_batchedtensor(scale)
    return p * scale if vmapped else p.mul_(scale)


cross_entropy = Op(
    cross_entropy_forward,
    cross_entropy_backward,
    outputs="y",
    grads="x weight",
    kernel=Kernel(_kernel_forward, _kernel_backward, outside_transforms),
    autocast={"cpu": "float32", "cuda": "float32"},
)


# Cross entropy of class probabilities -------------------------------------------------------------------------


def soft_cross_entropy_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float, reduction: str
) -> Tensor:
    """x and target (n, C, ...) or (C,), weight (C,) -> y (n, ...) or ()."""
    dim = _class_dim(x)
    q = _class_weights(x, weight, dim) * smooth(target, label_smoothing, dim)
    rows = -(q * log_softmax_forward(x, dim)).sum(dim)  # (n, ...)
    return reduce_rows(rows, reduction, rows.numel())


def soft_cross_entropy_backward(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
    needs=EVERY,
) -> tuple[Tensor | None, ...]:
    """dy (n, ...) or (), x and target (n, C, ...), weight (C,) -> dx and dtarget (n, C, ...), dweight (C,)."""
    dim, w, g = _soft_targets(dy, x, weight, reduction)
    dx = dtarget = dweight = None
    if "x" in needs:
        q = w * smooth(target, label_smoothing, dim)
        dx = g * (q.sum(dim, keepdim=True) * softmax_forward(x, dim) - q)
    if "target" in needs or "weight" in needs:
        surprise = -g * log_softmax_forward(x, dim)
        dtarget, dweight = _target_gradients(surprise, target, w, label_smoothing, dim, needs)
    return dx, dtarget, dweight


def smooth(target: Tensor, label_smoothing: float, dim: int) -> Tensor:
    """Mix target (n, C, ...) with the uniform distribution over its C classes."""
    if not label_smoothing:
        return target
    return (1 - label_smoothing) * target + label_smoothing / target.shape[dim]


def _soft_targets(dy, x, weight, reduction):
    """The class dimension, the class weights (C, 1...), and each row's gradient (n, 1, ...) or ()."""
    dim = _class_dim(x)
    g = dy.unsqueeze(dim) if reduction == "none" else dy
    return dim, _class_weights(x, weight, dim), row_gradient(g, reduction, x.numel() // x.shape[dim])


def _target_gradients(surprise, target, w, label_smoothing, dim, needs):
    """dtarget (n, C, ...) and dweight (C,) from -g log p (n, C, ...)."""
    dtarget = dweight = None
    if "target" in needs:
        dtarget = (1 - label_smoothing) * w * surprise
    if "weight" in needs:
        dweight = (surprise * smooth(target, label_smoothing, dim)).sum_to_size(w.shape).reshape(-1)
    return dtarget, dweight


def _soft_kernel_forward(x, target, weight, label_smoothing, reduction):
    return aten.cross_entropy_loss(x, target, weight, REDUCTIONS.index(reduction), label_smoothing=label_smoothing)


def _soft_kernel_backward(dy, x, target, weight, label_smoothing, reduction, needs):
    dim, w, g = _soft_targets(dy, x, weight, reduction)
    dx = dtarget = dweight = None
    if "x" in needs:
        p = torch.softmax(x, dim, dtype=w.dtype)
        share = label_smoothing / x.shape[dim]
        wanted = target if weight is None else w * target
        wanted = wanted.sum(dim, keepdim=True, dtype=w.dtype)  # (n, 1, ...)
        dx = _times(p, g * ((1 - label_smoothing) * wanted + share * w.sum()))
        dx.addcmul_(target, g * w, value=label_smoothing - 1)
        if label_smoothing:
            dx.addcmul_(g, w, value=-share)
    if "target" in needs or "weight" in needs:
        surprise = -g * torch.log_softmax(x, dim, dtype=w.dtype)
        dtarget, dweight = _target_gradients(surprise, target, w, label_smoothing, dim, needs)
    return dx, dtarget, dweight


soft_cross_entropy = Op(
    soft_cross_entropy_forward,
    soft_cross_entropy_backward,
    outputs="y",
    grads="x target weight",
    keep_for={"target": "x weight", "weight": "x target"},
    kernel=Kernel(_soft_kernel_forward, _soft_kernel_backward, outside_transforms),
    autocast={"cpu": "float32", "cuda": "float32"},
)


# Negative log likelihood --------------------------------------------------------------------------------------


def nll_loss_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    """x (n, C, ...) or (C,), target (n, ...) or (), weight (C,) -> y (n, ...) or ()."""
    dim, kept, t, wt, _ = _targets(x, target, weight, ignore_index)
    picked = x.gather(dim, t.unsqueeze(dim)).squeeze(dim)
    return reduce_rows(torch.where(kept, -wt * picked, 0), reduction, wt.sum())


def nll_loss_backward(
    dy: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    x_shape: torch.Size,
    needs=EVERY,
) -> tuple[Tensor]:
    """dy (n, ...) or (), target (n, ...), weight (C,) -> dx (n, C, ...)."""
    dim, kept, t, wt, _ = _targets(dy.new_zeros(()).expand(x_shape), target, weight, ignore_index)
    hit = torch.where(kept, -wt * row_gradient(dy, reduction, wt.sum()), 0)
    return (dy.new_zeros(x_shape).scatter(dim, t.unsqueeze(dim), hit.unsqueeze(dim)),)


def _nll_kernel_forward(x, target, weight, ignore_index, reduction):
    weight = None if weight is None else weight.to(x.dtype)
    return aten.nll_loss_nd(x, target, weight, REDUCTIONS.index(reduction), ignore_index)


def _nll_kernel_backward(dy, target, weight, ignore_index, reduction, x_shape, needs):
    if is_legacy_batchedtensor(dy):
        return nll_loss_backward(dy, target, weight, ignore_index, reduction, x_shape, needs)
    dim, kept, t, wt, _ = _targets(dy.new_zeros(()).expand(x_shape), target, weight, ignore_index)
    hit = torch.where(kept, -wt * row_gradient(dy, reduction, wt.sum()), 0)
    return (dy.new_zeros(x_shape).scatter_(dim, t.unsqueeze(dim), hit.to(dy.dtype).unsqueeze(dim)),)


nll_loss = Op(
    nll_loss_forward,
    nll_loss_backward,
    outputs="y",
    grads="x",
    kernel=Kernel(_nll_kernel_forward, _nll_kernel_backward, outside_transforms),
    autocast={"cpu": "float32", "cuda": "float32"},
)
