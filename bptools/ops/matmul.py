"""The product of stacks of matrices, with a scale and something added: `z = β x y + b`.

Index legend: `l` rows of x, `e` columns of x and rows of y, `s` columns of y. Each line holds for every matrix of
the stacks, which broadcast; β is the scale.

    z[l,s] = β Σ_e x[l,e] y[e,s] + b[l,s]

Each gradient is a sum over the index that its variable does not have:

    dx[l,e] = β Σ_s dz[l,s] y[e,s]        dx = β dz yᵀ      reads y alone
    dy[e,s] = β Σ_l x[l,e] dz[l,s]        dy = β xᵀ dz      reads x alone
    db[l,s] = dz[l,s]                                       reads nothing

The scores of attention are one such product, its output another.
"""

from __future__ import annotations

from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op


def matmul_forward(x: Tensor, y: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """x (..., l, e), y (..., e, s), bias (..., l, s) -> z (..., l, s)."""
    z = (x * scale) @ y
    return z if bias is None else z + bias


def matmul_backward(dz: Tensor, x: Tensor, y: Tensor, scale: float, needs=EVERY) -> tuple[Tensor | None, ...]:
    """dz (..., l, s), x (..., l, e), y (..., e, s) -> dx (..., l, e), dy (..., e, s), db (..., l, s)."""
    dx = scale * (dz @ y.mT) if "x" in needs else None
    dy = (x * scale).mT @ dz if "y" in needs else None
    return dx, dy, dz if "bias" in needs else None


matmul = Op(
    matmul_forward,
    matmul_backward,
    outputs="z",
    grads="x y bias",
    keep_for={"x": "y", "y": "x"},
    # The same products in the input's own precision: hardware accumulates half precision in float32.
    kernel=Kernel(matmul_forward, matmul_backward),
    trace="kernel",
    autocast={"cpu": "lower", "cuda": "lower"},
)
