"""Losses that ask for a margin: they are 0, or nearly so, where the right answer is ahead by enough.

Index legend: `n` rows, `c` and `j` classes (C of them), `d` features. [·] is 1 where it holds and else 0; target
t is 1 or -1, m is the margin.

**Of one number or two:**

    margin_ranking_loss     h = m - t (x1 - x2);        loss = max(h, 0)
    hinge_embedding_loss    h = m - x;                  loss = x [t ≠ -1] + max(h, 0) [t ≠ 1]
    soft_margin_loss        log(1 + e^(-t x)) = -log σ(t x)

With g[n] the gradient that reaches loss[n] (dy, divided as the mean divides) and a = [h ≥ 0] (torch's choice at
the kink),

    margin_ranking_loss     dx1 = -g t a                dx2 = g t a             dtarget = -g (x1 - x2) a
    hinge_embedding_loss    dx = g ([t ≠ -1] - a [t ≠ 1])
    soft_margin_loss        dx = -g t σ(-t x)

**Of vectors.** The cosine y of x1 and x2 is to be 1 if t = 1, and to stay under m if t = -1. With ε = 1e-12,
s1 = Σ_d x1² + ε, s2 = Σ_d x2² + ε:

    cosine_embedding_loss   y = Σ_d x1 x2 / √(s1 s2);   loss = (1 - y) [t = 1] + max(y - m, 0) [t = -1]
                            e = g (-[t = 1] + [t = -1] [y > m]), the gradient of y
                            dx1 = e (x2 / √(s1 s2) - y x1 / s1)     dx2 = e (x1 / √(s1 s2) - y x2 / s2)

The distances D (see distance.py) of an anchor from a positive and from a negative example, the larger by a margin:

    triplet_margin_loss     h = m + D(a, p) - D(a, n);  loss = max(h, 0)
                            dD(a, p) = g [h ≥ 0]        dD(a, n) = -g [h ≥ 0]

With `swap` the lesser of D(a, n) and D(p, n) takes the place of D(a, n), and the gradient with it, half to each
where they are equal. The distances are not kept: three vectors are, and the distances are computed again.

**Of classes.** t[n] is the class of the row, w its weight (1 if not given), p is 1 or 2:

    multi_margin_loss       h[n,c] = m - x[n,t] + x[n,c];   loss[n] = w[t] / C Σ_{c≠t} max(h[n,c], 0)^p
                            e[n,c] = g w[t] p / C max(h[n,c], 0)^(p-1) [h[n,c] > 0] [c ≠ t]
                            dx[n,c] = e[n,c] - [c = t] Σ_c e[n,c]

A row's target may be a list of classes, ended by -1: k[n,j] times the class j, most often 0 or 1 time:

    multilabel_margin_loss  h[n,j,c] = 1 - x[n,j] + x[n,c];
                            loss[n] = 1 / C Σ_j k[n,j] Σ_c [k[n,c] = 0] max(h[n,j,c], 0)
                            e[n,j,c] = g / C k[n,j] [k[n,c] = 0] [h[n,j,c] > 0]
                            dx[n,c] = Σ_j e[n,j,c] - Σ_j e[n,c,j]

Or the target is 0 or 1, or between, for each class; the loss is the mean over the classes of the binary cross
entropy with logits (see likelihood_loss.py), multilabel_soft_margin_loss.

Sources: Hadsell, Chopra and LeCun, "Dimensionality reduction by learning an invariant mapping", 2006 (embeddings);
Balntas et al., "Learning local feature descriptors with triplets", 2016; Weston and Watkins, "Multi-class support
vector machines", 1998.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op, outside_transforms
from bptools.ops._reduction import REDUCTIONS, reduce_rows, row_gradient
from bptools.ops.distance import norm_slope, pairwise_distance_forward
from bptools.ops.likelihood_loss import logit_rows, logit_slope, logit_target_slope, weighted

aten = torch.ops.aten

FLOAT32 = {"cpu": "float32", "cuda": "float32"}


# One number or two --------------------------------------------------------------------------------------------


def margin_ranking_loss_forward(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float, reduction: str
) -> Tensor:
    """input1, input2 and target broadcast to (...) -> y (...) or ()."""
    rows = (margin - target * (input1 - input2)).clamp_min(0)
    return reduce_rows(rows, reduction, rows.numel())


def margin_ranking_loss_backward(
    dy: Tensor, input1: Tensor, input2: Tensor, target: Tensor, margin: float, reduction: str, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy (...) or (), input1, input2 and target broadcast to (...) -> their gradients (...)."""
    ahead = input1 - input2
    behind = margin - target * ahead
    g = torch.where(behind >= 0, row_gradient(dy, reduction, behind.numel()), 0)
    d2 = g * target if "input1" in needs or "input2" in needs else None
    return (
        -d2 if "input1" in needs else None,
        d2 if "input2" in needs else None,
        -g * ahead if "target" in needs else None,
    )


margin_ranking_loss = Op(
    margin_ranking_loss_forward,
    margin_ranking_loss_backward,
    outputs="y",
    grads="input1 input2 target",
    autocast=FLOAT32,
)


def hinge_embedding_loss_forward(x: Tensor, target: Tensor, margin: float, reduction: str) -> Tensor:
    """x and target broadcast to (...) -> y (...) or ()."""
    rows = torch.where(target != -1, x, 0) + torch.where(target != 1, (margin - x).clamp_min(0), 0)
    return reduce_rows(rows, reduction, rows.numel())


def hinge_embedding_loss_backward(
    dy: Tensor, x: Tensor, target: Tensor, margin: float, reduction: str, needs=EVERY
) -> tuple[Tensor]:
    """dy (...) or (), x and target broadcast to (...) -> dx (...)."""
    near, apart = target != -1, (target != 1) & (margin - x >= 0)
    return (row_gradient(dy, reduction, apart.numel()) * (near.to(x.dtype) - apart.to(x.dtype)),)


hinge_embedding_loss = Op(
    hinge_embedding_loss_forward, hinge_embedding_loss_backward, outputs="y", grads="x", autocast=FLOAT32
)


def soft_margin_loss_forward(x: Tensor, target: Tensor, reduction: str) -> Tensor:
    """x and target broadcast to (...) -> y (...) or ()."""
    rows = -F.logsigmoid(target * x)
    return reduce_rows(rows, reduction, rows.numel())


def soft_margin_loss_backward(dy: Tensor, x: Tensor, target: Tensor, reduction: str, needs=EVERY) -> tuple[Tensor]:
    """dy (...) or (), x and target broadcast to (...) -> dx (...)."""
    short = torch.sigmoid(-target * x)
    return (-row_gradient(dy, reduction, short.numel()) * target * short,)


soft_margin_loss = Op(
    soft_margin_loss_forward, soft_margin_loss_backward, outputs="y", grads="x", autocast=FLOAT32
)


# Vectors ------------------------------------------------------------------------------------------------------


def _cosine(input1: Tensor, input2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """input1 and input2 (..., d) -> their cosine, s1 and s2 (..., 1)."""
    s1 = (input1 * input1).sum(-1, keepdim=True) + 1e-12
    s2 = (input2 * input2).sum(-1, keepdim=True) + 1e-12
    return (input1 * input2).sum(-1, keepdim=True) / (s1 * s2).sqrt(), s1, s2


def cosine_embedding_loss_forward(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float, reduction: str
) -> Tensor:
    """input1 and input2 (n, d) or (d,), target (n) or () -> y (n) or ()."""
    y = _cosine(input1, input2)[0].squeeze(-1)
    rows = torch.where(target == 1, 1 - y, 0) + torch.where(target == -1, (y - margin).clamp_min(0), 0)
    return reduce_rows(rows, reduction, rows.numel())


def cosine_embedding_loss_backward(
    dy: Tensor, input1: Tensor, input2: Tensor, target: Tensor, margin: float, reduction: str, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy (n) or (), input1 and input2 (n, d), target (n) -> the gradients of input1 and input2 (n, d)."""
    y, s1, s2 = _cosine(input1, input2)
    apart = (target == -1) & (y.squeeze(-1) > margin)
    slope = apart.to(y.dtype) - (target == 1).to(y.dtype)
    e = (row_gradient(dy, reduction, slope.numel()) * slope).unsqueeze(-1)  # (n, 1)
    across = (s1 * s2).sqrt()
    d1 = e * (input2 / across - y * input1 / s1) if "input1" in needs else None
    d2 = e * (input1 / across - y * input2 / s2) if "input2" in needs else None
    return d1, d2


cosine_embedding_loss = Op(
    cosine_embedding_loss_forward,
    cosine_embedding_loss_backward,
    outputs="y",
    grads="input1 input2",
    autocast=FLOAT32,
)


def triplet_hinge_forward(
    positive: Tensor, negative: Tensor, swapped: Tensor | None, margin: float, reduction: str
) -> Tensor:
    """The distances D(a, p), D(a, n) and, if it counts, D(p, n), of shape (...) -> y (...) or ()."""
    nearest = negative if swapped is None else torch.minimum(negative, swapped)
    rows = (margin + positive - nearest).clamp_min(0)
    return reduce_rows(rows, reduction, rows.numel())


def triplet_hinge_backward(
    dy: Tensor,
    positive: Tensor,
    negative: Tensor,
    swapped: Tensor | None,
    margin: float,
    reduction: str,
    needs=EVERY,
) -> tuple[Tensor | None, ...]:
    """dy (...) or (), the distances (...) -> their gradients (...)."""
    nearest = negative if swapped is None else torch.minimum(negative, swapped)
    h = margin + positive - nearest
    g = torch.where(h >= 0, row_gradient(dy, reduction, h.numel()), 0)
    if swapped is None:
        return (g if "positive" in needs else None), (-g if "negative" in needs else None), None
    share = torch.where(negative == swapped, 0.5, (negative < swapped).to(g.dtype))
    return (
        g if "positive" in needs else None,
        -g * share if "negative" in needs else None,
        g * (share - 1) if "swapped" in needs else None,
    )


triplet_hinge = Op(triplet_hinge_forward, triplet_hinge_backward, outputs="y", grads="positive negative swapped")


def _distances(
    anchor: Tensor, positive: Tensor, negative: Tensor, p: float, eps: float, swap: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Three tensors that broadcast to (n, d) -> D(a, p), D(a, n) and, if swapped, D(p, n): (n, 1)."""
    return (
        pairwise_distance_forward(anchor, positive, p, eps, True),
        pairwise_distance_forward(anchor, negative, p, eps, True),
        pairwise_distance_forward(positive, negative, p, eps, True) if swap else None,
    )


def triplet_margin_loss_forward(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float,
    p: float,
    eps: float,
    swap: bool,
    reduction: str,
) -> Tensor:
    """anchor, positive and negative broadcast to (n, d) -> y (n) or ()."""
    y = triplet_hinge_forward(*_distances(anchor, positive, negative, p, eps, swap), margin, reduction)
    return y.squeeze(-1) if reduction == "none" else y


def triplet_margin_loss_backward(
    dy: Tensor,
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float,
    p: float,
    eps: float,
    swap: bool,
    reduction: str,
    needs=EVERY,
) -> tuple[Tensor | None, ...]:
    """dy (n) or (), anchor, positive and negative broadcast to (n, d) -> their gradients (n, d)."""
    ap, an, pn = _distances(anchor, positive, negative, p, eps, swap)
    dy = dy.unsqueeze(-1) if reduction == "none" else dy
    dap, dan, dpn = triplet_hinge_backward(dy, ap, an, pn, margin, reduction)
    dap = dap * norm_slope(anchor - positive + eps, ap, p)  # now the gradients of what the norms are of
    dan = dan * norm_slope(anchor - negative + eps, an, p)
    dpn = dpn * norm_slope(positive - negative + eps, pn, p) if swap else 0
    return (
        dap + dan if "anchor" in needs else None,
        dpn - dap if "positive" in needs else None,
        -dan - dpn if "negative" in needs else None,
    )


triplet_margin_loss = Op(
    triplet_margin_loss_forward,
    triplet_margin_loss_backward,
    outputs="y",
    grads="anchor positive negative",
    autocast=FLOAT32,
)


# Classes ------------------------------------------------------------------------------------------------------


def _ahead(x: Tensor, target: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """x (n, C), target (n) -> max(h, 0) of the classes but the target, where it is 0; which these are (n, C)."""
    t = target.unsqueeze(1)
    h = (margin - x.gather(1, t) + x).clamp_min(0)
    other = torch.arange(x.shape[1], device=x.device) != t
    return torch.where(other, h, 0), other


def _class_weight(x: Tensor, target: Tensor, weight: Tensor | None) -> Tensor | float:
    """The weight of each row's class, divided by the number of classes: (n, 1) or a number."""
    return 1 / x.shape[1] if weight is None else weight[target].unsqueeze(1) / x.shape[1]


def _as(x: Tensor, weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.to(x.dtype)


def multi_margin_loss_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, p: int, margin: float, reduction: str
) -> Tensor:
    """x (n, C), target (n), weight (C,), p 1 or 2 -> y (n) or ()."""
    h, _ = _ahead(x, target, margin)
    rows = (_class_weight(x, target, weight) * (h if p == 1 else h * h)).sum(1)
    return reduce_rows(rows, reduction, rows.numel())


def multi_margin_loss_backward(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    p: int,
    margin: float,
    reduction: str,
    needs=EVERY,
) -> tuple[Tensor]:
    """dy (n) or (), x (n, C), target (n), weight (C,) -> dx (n, C)."""
    h, other = _ahead(x, target, margin)
    g = row_gradient(dy, reduction, x.shape[0])
    g = g.unsqueeze(1) if reduction == "none" else g
    slope = (h > 0).to(x.dtype) if p == 1 else 2 * h
    e = g * _class_weight(x, target, weight) * slope  # (n, C), 0 at the target
    return (torch.where(other, e, -e.sum(1, keepdim=True)),)


multi_margin_loss = Op(
    multi_margin_loss_forward,
    multi_margin_loss_backward,
    outputs="y",
    grads="x",
    kernel=Kernel(
        lambda x, target, weight, p, margin, reduction: aten.multi_margin_loss(
            x, target, p, margin, _as(x, weight), REDUCTIONS.index(reduction)
        ),
        lambda dy, x, target, weight, p, margin, reduction, needs: (
            aten.multi_margin_loss_backward(dy, x, target, p, margin, _as(x, weight), REDUCTIONS.index(reduction)),
        ),
        usable=lambda x, *args: (
            x.numel() > 0 and outside_transforms()
        ),  # of nothing torch gives what was in memory
    ),
    autocast=FLOAT32,
)


def _label_counts(x: Tensor, target: Tensor) -> Tensor:
    """How often each class is in the list of a row, up to its first -1: x and target (n, C) -> k (n, C)."""
    listed = (target >= 0).cumprod(1).to(x.dtype)
    return torch.zeros_like(x).scatter_add(1, target.clamp_min(0), listed)


def _pairs(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The margins h and their weights k[n,j] [k[n,c] = 0] / C: x and target (n, C) -> (n, C, C), j before c."""
    k = _label_counts(x, target)
    h = 1 - x.unsqueeze(2) + x.unsqueeze(1)
    return h, k.unsqueeze(2) * (k == 0).unsqueeze(1) / x.shape[1]


def multilabel_margin_loss_forward(x: Tensor, target: Tensor, reduction: str) -> Tensor:
    """x and target (n, C) -> y (n) or ()."""
    h, weight = _pairs(x, target)
    rows = (weight * h.clamp_min(0)).sum((1, 2))
    return reduce_rows(rows, reduction, rows.numel())


def multilabel_margin_loss_backward(
    dy: Tensor, x: Tensor, target: Tensor, reduction: str, needs=EVERY
) -> tuple[Tensor]:
    """dy (n) or (), x and target (n, C) -> dx (n, C)."""
    h, weight = _pairs(x, target)
    g = row_gradient(dy, reduction, x.shape[0])
    g = g.reshape(-1, 1, 1) if reduction == "none" else g
    e = torch.where(h > 0, g * weight, 0)  # (n, C, C)
    return (e.sum(1) - e.sum(2),)


def _multilabel_kernel_backward(dy, x, target, reduction, needs):
    is_target = (_label_counts(x, target) > 0).to(x.dtype)
    return (aten.multilabel_margin_loss_backward(dy, x, target, REDUCTIONS.index(reduction), is_target),)


multilabel_margin_loss = Op(
    multilabel_margin_loss_forward,
    multilabel_margin_loss_backward,
    outputs="y",
    grads="x",
    kernel=Kernel(
        lambda x, target, reduction: aten.multilabel_margin_loss(x, target, REDUCTIONS.index(reduction)),
        _multilabel_kernel_backward,
        outside_transforms,
    ),
    autocast=FLOAT32,
)


def multilabel_soft_margin_loss_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: str
) -> Tensor:
    """x, target and weight broadcast to (n, C) -> y (n) or ()."""
    rows = weighted(logit_rows(x, target, None), weight).mean(-1)
    return reduce_rows(rows, reduction, rows.numel())


def multilabel_soft_margin_loss_backward(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy (n) or (), x and target (n, C), weight broadcasts to it -> dx, dtarget and dweight (n, C)."""
    g = row_gradient(dy, reduction, math.prod(x.shape[:-1])) / x.shape[-1]
    g = g.unsqueeze(-1) if reduction == "none" else g
    return (
        weighted(g * logit_slope(x, target, None), weight) if "x" in needs else None,
        weighted(g * logit_target_slope(x, None), weight) if "target" in needs else None,
        g * logit_rows(x, target, None) if "weight" in needs else None,
    )


multilabel_soft_margin_loss = Op(
    multilabel_soft_margin_loss_forward,
    multilabel_soft_margin_loss_backward,
    outputs="y",
    grads="x target weight",
    autocast={"cuda": "float32"},
)
