"""The embedding: one row of a table for each index.

Index legend: `n` positions (all dimensions of indices), `r` rows of the table, `d` features.

    y[n,d] = w[i[n],d] = Σ_r [r = i[n]] w[r,d]

It is the linear map of a one-hot x[n,r] = [r = i[n]], and so is its gradient, dw = xᵀ dy: each row of the table
collects the gradients of the positions that read it, and a row that nobody read gets 0:

    dw[r,d] = Σ_n [r = i[n]] dy[n,d] / f[n]

f is 1; or, with `scale_grad_by_freq`, how many positions read the row, so that a row collects the mean of its
gradients. With a padding index the positions that hold it are left out of the sum. Both are what the user wants
of the gradient, not what the forward says. The indices alone are kept.

With `sparse`, dw is a sparse tensor that lists its terms, row i[n] and dy[n], and leaves the sum to who reads it.

Source: Bengio et al., "A neural probabilistic language model", 2003.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op

aten = torch.ops.aten


def embedding_forward(
    weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool, sparse: bool
) -> Tensor:
    """weight (rows, d), indices (...), padding_idx -1 for none -> y (..., d)."""
    return weight.index_select(0, indices.flatten()).reshape(*indices.shape, weight.shape[1])


def embedding_backward(
    dy: Tensor,
    indices: Tensor,
    padding_idx: int,
    scale_grad_by_freq: bool,
    sparse: bool,
    weight_shape: torch.Size,
    needs=EVERY,
) -> tuple[Tensor]:
    """dy (..., d), indices (...) -> dw (rows, d)."""
    indices = indices.flatten()
    dy = dy.reshape(indices.numel(), dy.shape[-1])  # (n, d)
    if scale_grad_by_freq:
        dy = dy / frequencies(indices, weight_shape[0], dy).unsqueeze(-1)
    return (collect(dy, indices, padding_idx, sparse, weight_shape),)


def frequencies(indices: Tensor, rows: int, like: Tensor) -> Tensor:
    """indices (n,) -> how many of them are equal to each (n,), in the dtype of `like`."""
    ones = torch.ones_like(indices, dtype=like.dtype)
    return ones.new_zeros(rows).index_add(0, indices, ones).index_select(0, indices)


def collect(terms: Tensor, indices: Tensor, padding_idx: int, sparse: bool, shape: torch.Size) -> Tensor:
    """terms (n, d), indices (n,) -> the sums of the terms of each row (rows, d), without those of padding_idx."""
    if sparse:
        if padding_idx >= 0:  # not even listed: an optimiser moves what is, by its momentum
            counted = (indices != padding_idx).nonzero().squeeze(1)
            terms, indices = terms.index_select(0, counted), indices.index_select(0, counted)
        return torch.sparse_coo_tensor(indices.unsqueeze(0), terms, shape, check_invariants=False)
    terms = terms.masked_fill((indices == padding_idx).unsqueeze(-1), 0)
    return terms.new_zeros(shape).index_add(0, indices, terms)


def _kernel_forward(weight, indices, padding_idx, scale_grad_by_freq, sparse):
    return aten.embedding(weight, indices)


def _kernel_backward(dy, indices, padding_idx, scale_grad_by_freq, sparse, weight_shape, needs):
    return (aten.embedding_dense_backward(dy, indices, weight_shape[0], padding_idx, scale_grad_by_freq),)


def _kernel_usable(weight, indices, padding_idx, scale_grad_by_freq, sparse):
    return not sparse


embedding = Op(
    embedding_forward,
    embedding_backward,
    outputs="y",
    grads="weight",
    kernel=Kernel(_kernel_forward, _kernel_backward, _kernel_usable),
)
