"""The linear map with a low-rank update, `y = x Wᵀ + c + s (x z) Aᵀ Bᵀ`, in one op.

Index legend: `n` rows (all leading dimensions of x), `i` input and `o` output features, `r` the rank, much less.

    x̃[n,i] = x[n,i] z[n,i]                 z: the dropout of the update's input, keep / (1 - p); 1 without
    h[n,r] = Σ_i x̃[n,i] A[r,i]             y[n,o] = Σ_i x[n,i] W[o,i] + c[o] + s Σ_r h[n,r] B[o,r]

Two paths lead from x to y. With g = dy B, of n × r, what reaches h but for s:

    dx = dy W + s (g A) z       dB = s dyᵀ h        dA = s gᵀ x̃        dW = dyᵀ x        dc[o] = Σ_n dy[n,o]

W is frozen as a rule, and then nothing is computed or kept for it. x is kept, with dropout one byte an element; h
is made again from x, which takes 2 n i r operations of the 2 n i o of the whole. Autograd would keep x, x̃, the
mask as floating numbers, and h. The update is computed in the dtype of A and B, which may be float32 beside a base
in half precision.

Source: Hu et al., "LoRA: Low-rank adaptation of large language models", arXiv 2106.09685.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op, outside_transforms
from bptools.ops.dropout import dropout_factor
from bptools.ops.linear import rows


def lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> Tensor:
    """x and keep (..., i), weight (o, i), a (r, i), b (o, r), bias (o,) -> y (..., o)."""
    update = _dropped(x, keep, dropout_p).to(a.dtype) @ a.mT @ b.mT
    y = x @ weight.mT + scaling * update
    return y if bias is None else y + bias


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    keep: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs=EVERY,
) -> tuple[Tensor | None, ...]:
    """dy (..., o), x and keep (..., i), weight (o, i), a (r, i), b (o, r) -> dx, dweight, da, db, dbias."""
    dx = dw = da = db = None
    g = scaling * (dy.to(b.dtype) @ b) if "x" in needs or "a" in needs else None  # (..., r)
    if "x" in needs:
        dx = dy @ weight + _dropped(g @ a, keep, dropout_p)
    if "weight" in needs:
        dw = rows(dy).mT @ rows(x)
    if "a" in needs:
        da = rows(g).mT @ rows(_dropped(x, keep, dropout_p).to(g.dtype))
    if "b" in needs:
        h = _dropped(x, keep, dropout_p).to(a.dtype) @ a.mT
        db = scaling * (rows(dy).to(a.dtype).mT @ rows(h))
    return dx, dw, da, db, rows(dy).sum(0) if "bias" in needs else None


def _dropped(x: Tensor, keep: Tensor | None, p: float) -> Tensor:
    return x if keep is None else x * dropout_factor(x, keep, p)


def _kernel_forward(x, weight, a, b, bias, keep, scaling, dropout_p):
    y = torch.nn.functional.linear(x, weight, bias)
    h = _dropped(x, keep, dropout_p).to(a.dtype) @ a.mT
    if b.dtype is y.dtype:
        rows(y).addmm_(rows(h), b.mT, alpha=scaling)
        return y
    return (y + scaling * (h @ b.mT)).to(y.dtype)


lora_linear = Op(
    lora_linear_forward,
    lora_linear_backward,
    outputs="y",
    grads="x weight a b bias",
    keep_for={"x": "weight a b", "weight": "x", "a": "x b", "b": "x a", "keep": "x a b"},
    kernel=Kernel(
        _kernel_forward,
        lora_linear_backward,
        usable=outside_transforms,  # it writes to what it made
    ),
    autocast={"cpu": "lower", "cuda": "lower"},
    mixed=True,
)
