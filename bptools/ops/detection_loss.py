"""Losses for detection and segmentation, where most of what is predicted is background: focal loss and Dice's.

**Focal loss** is a binary cross entropy that counts less the better an element is predicted. Index legend: `n`
elements. x are logits, p = σ(x), t the target between 0 and 1, α the share of the positive ones (without α, A =
1), γ ≥ 0:

    q = p (1 - t) + (1 - p) t = p + t - 2 p t       the probability of what is wrong
    b = (1 - t) x + log(1 + e⁻ˣ)                    the cross entropy
    A = α t + (1 - α) (1 - t)
    loss[n] = A qᵞ b

With g[n] the gradient that reaches loss[n] (dy, divided as the mean divides),

    ∂b/∂x = p - t       ∂q/∂x = p (1 - p) (1 - 2 t)         dx = g A (qᵞ (p - t) + γ qᵞ⁻¹ ∂q/∂x b)
    ∂b/∂t = -x          ∂q/∂t = 1 - 2 p                     dt = g (A (γ qᵞ⁻¹ ∂q/∂t b - qᵞ x) + ∂A qᵞ b)

and ∂A = 2 α - 1. x and t are kept.

**Dice loss.** Index legend: `n` samples, `c` classes, `i` places. x are probabilities, t the target, s > 0
smooths:

    U[n,c] = Σ_i x[n,c,i] + Σ_i t[n,c,i] + s
    D[n,c] = (2 Σ_i x[n,c,i] t[n,c,i] + s) / U[n,c]         Dice's coefficient of overlap, from 0 to 1
    loss[n,c] = 1 - D[n,c]
    dx[n,c,i] = g[n,c] (D[n,c] - 2 t[n,c,i]) / U[n,c]       dt[n,c,i] = g[n,c] (D[n,c] - 2 x[n,c,i]) / U[n,c]

Where there is nothing to find and nothing is found, D = 1.

Sources: Lin et al., arXiv 1708.02002 (focal loss); Dice, "Measures of the amount of ecologic association between
species", 1945; Sudre et al., arXiv 1707.03237 (as a loss; without squares in U, for which see Milletari et al.,
arXiv 1606.04797).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Op
from bptools.ops._reduction import reduce_rows, row_gradient
from bptools.ops.likelihood_loss import logit_rows

# Focal loss ---------------------------------------------------------------------------------------------------


def _share(target: Tensor, alpha: float | None) -> Tensor | int:
    return 1 if alpha is None else alpha * target + (1 - alpha) * (1 - target)


def focal_loss_forward(x: Tensor, target: Tensor, alpha: float | None, gamma: float, reduction: str) -> Tensor:
    """x and target (...) -> y (...) or ()."""
    p = torch.sigmoid(x)
    q = p + target - 2 * p * target
    return reduce_rows(_share(target, alpha) * q**gamma * logit_rows(x, target, None), reduction, x.numel())


def focal_loss_backward(
    dy: Tensor, x: Tensor, target: Tensor, alpha: float | None, gamma: float, reduction: str, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy (...) or (), x and target (...) -> dx and dtarget (...)."""
    g = row_gradient(dy, reduction, x.numel())
    p, b, share = torch.sigmoid(x), logit_rows(x, target, None), _share(target, alpha)
    q = p + target - 2 * p * target
    focus = q**gamma
    # Where q = 0, ∂q/∂x is 0 as well; a power that may be negative must not make NaN of it.
    tilt = gamma * torch.where(q == 0, 1, q) ** (gamma - 1) * b
    dx = dtarget = None
    if "x" in needs:
        dx = g * share * (focus * (p - target) + tilt * p * (1 - p) * (1 - 2 * target))
    if "target" in needs:
        dtarget = share * (tilt * (1 - 2 * p) - focus * x)
        dtarget = g * (dtarget if alpha is None else dtarget + (2 * alpha - 1) * focus * b)
    return dx, dtarget


focal_loss = Op(
    focal_loss_forward,
    focal_loss_backward,
    outputs="y",
    grads="x target",
    autocast={"cpu": "float32", "cuda": "float32"},
)


# Dice loss ----------------------------------------------------------------------------------------------------


def _overlap(x: Tensor, target: Tensor, smooth: float) -> tuple[Tensor, Tensor]:
    """x and target (n, c, ...) -> D and U (n, c, 1...)."""
    places = tuple(range(2, x.dim()))
    u = (x + target).sum(places, keepdim=True) + smooth
    return (2 * (x * target).sum(places, keepdim=True) + smooth) / u, u


def dice_loss_forward(x: Tensor, target: Tensor, smooth: float, reduction: str) -> Tensor:
    """x and target (n, c, ...) -> y (n, c) or ()."""
    rows = 1 - _overlap(x, target, smooth)[0].flatten(1)
    return reduce_rows(rows, reduction, rows.numel())


def dice_loss_backward(
    dy: Tensor, x: Tensor, target: Tensor, smooth: float, reduction: str, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy (n, c) or (), x and target (n, c, ...) -> dx and dtarget (n, c, ...)."""
    d, u = _overlap(x, target, smooth)
    g = row_gradient(dy, reduction, d.numel())
    g = (g.reshape(d.shape) if reduction == "none" else g) / u
    dx = g * (d - 2 * target) if "x" in needs else None
    dtarget = g * (d - 2 * x) if "target" in needs else None
    return dx, dtarget


dice_loss = Op(
    dice_loss_forward,
    dice_loss_backward,
    outputs="y",
    grads="x target",
    autocast={"cuda": "float32"},
)
