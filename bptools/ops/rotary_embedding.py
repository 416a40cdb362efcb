"""Rotary position embedding: each pair of features is turned by an angle that grows with the position.

Index legend: `l` positions, `d` features, in pairs (a, b); θ[l,d] the angle of feature d, one for both of a pair.

    y[a] = x[a] cos θ[a] - x[b] sin θ[a]                y[b] = x[b] cos θ[b] + x[a] sin θ[b]

The pair of a feature a < D/2 is b = a + D/2, or, interleaved, a even feature and the next. With R the quarter turn
(R x)[a] = -x[b], (R x)[b] = x[a], all pairs are y = cos ⊙ x + sin ⊙ R x. R is orthogonal and Rᵀ = -R, so

    dx = cos ⊙ dy - R (sin ⊙ dy),           a turn by the opposite angle
    dcos = dy ⊙ x                           dsin = dy ⊙ R x

The tables are kept, and x only if they learn: a rotation is undone without knowing what was rotated.

Source: Su et al., "RoFormer: enhanced transformer with rotary position embedding", arXiv 2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Op


def rotary_embedding_forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (..., l, d), cos and sin broadcast to it -> y (..., l, d)."""
    return x * cos + quarter_turn(x, interleaved) * sin


def rotary_embedding_backward(
    dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy, x (..., l, d), cos and sin as in the forward -> dx, and dcos, dsin not yet summed (..., l, d)."""
    dx = dcos = dsin = None
    if "x" in needs:
        dx = dy * cos - quarter_turn(dy * sin, interleaved)
    if "cos" in needs:
        dcos = dy * x
    if "sin" in needs:
        dsin = dy * quarter_turn(x, interleaved)
    return dx, dcos, dsin


def quarter_turn(x: Tensor, interleaved: bool) -> Tensor:
    """R: x (..., d) -> (..., d)."""
    if interleaved:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((-b, a), -1).reshape(x.shape)
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


rotary_embedding = Op(
    rotary_embedding_forward,
    rotary_embedding_backward,
    outputs="y",
    grads="x cos sin",
    keep_for={"x": "cos sin", "cos": "x", "sin": "x"},
)
