"""Penalties on the size of parameters, to be added to a loss.

Index legend: `i` elements of all the tensors w that are penalised.

    l1_penalty = Σ_i |w[i]|             dw[i] = dy sign(w[i])
    l2_penalty = ½ Σ_i w[i]²            dw[i] = dy w[i]

With its half, λ l2_penalty has the gradient λ w: it is what `weight_decay=λ` is to an optimizer without momentum's
second moments (torch.optim.SGD). At 0 the derivative of |w| is taken to be 0.

One op adds one tensor's penalty to the total of those before, so that a list of any length needs no other:

    y = total + penalty(w)              dtotal = dy

A parameter is kept as it is, which costs nothing.

Sources: Tibshirani, "Regression shrinkage and selection via the lasso", 1996; Hoerl and Kennard, "Ridge
regression", 1970.
"""

from __future__ import annotations

from torch import Tensor

from bptools.ops._core import EVERY, Op


def l1_penalty_forward(total: Tensor, w: Tensor) -> Tensor:
    """total (), w (...) -> y ()."""
    return total + w.abs().sum()


def l1_penalty_backward(dy: Tensor, w: Tensor, needs=EVERY) -> tuple[Tensor | None, ...]:
    """dy (), w (...) -> dtotal (), dw (...)."""
    return (dy if "total" in needs else None), (dy * w.sign() if "w" in needs else None)


def l2_penalty_forward(total: Tensor, w: Tensor) -> Tensor:
    """total (), w (...) -> y ()."""
    return total + 0.5 * (w * w).sum()


def l2_penalty_backward(dy: Tensor, w: Tensor, needs=EVERY) -> tuple[Tensor | None, ...]:
    """dy (), w (...) -> dtotal (), dw (...)."""
    return (dy if "total" in needs else None), (dy * w if "w" in needs else None)


def _penalty(forward, backward) -> Op:
    return Op(
        forward,
        backward,
        outputs="y",
        grads="total w",
        keep_for={"w": "w"},
        mixed=True,  # the total is in float32 or more, whatever the parameters are in
    )


l1_penalty = _penalty(l1_penalty_forward, l1_penalty_backward)
l2_penalty = _penalty(l2_penalty_forward, l2_penalty_backward)
