"""The embedding: one row of a table for each index.

Index legend: `n` positions (all dimensions of indices), `r` rows of the table, `d` features.

    y[n,d] = w[i[n],d] = Σ_r [r = i[n]] w[r,d]

It is the linear map of a one-hot x[n,r] = [r = i[n]], and so is its gradient, dw = xᵀ dy: each row of the table
collects the gradients of the positions that read it, and a row that nobody read gets 0:

    dw[r,d] = Σ_n [r = i[n]] dy[n,d]

With a padding index the positions that hold it are left out of the sum. The indices alone are kept.

Source: Bengio et al., "A neural probabilistic language model", 2003.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op

aten = torch.ops.aten


def embedding_forward(weight: Tensor, indices: Tensor, padding_idx: int) -> Tensor:
    """weight (rows, d), indices (...), padding_idx -1 for none -> y (..., d)."""
    return weight.index_select(0, indices.flatten()).reshape(*indices.shape, weight.shape[1])


def embedding_backward(
    dy: Tensor, indices: Tensor, padding_idx: int, weight_shape: torch.Size, needs=EVERY
) -> tuple[Tensor]:
    """dy (..., d), indices (...) -> dw (rows, d)."""
    dy = dy.masked_fill((indices == padding_idx).unsqueeze(-1), 0)
    dy = dy.reshape(indices.numel(), dy.shape[-1])  # (n, d)
    return (dy.new_zeros(weight_shape).index_add(0, indices.flatten(), dy),)


def _kernel_backward(dy, indices, padding_idx, weight_shape, needs):
    return (aten.embedding_dense_backward(dy, indices, weight_shape[0], padding_idx, False),)


embedding = Op(
    embedding_forward,
    embedding_backward,
    outputs="y",
    grads="weight",
    kernel=Kernel(aten.embedding, _kernel_backward),
)
