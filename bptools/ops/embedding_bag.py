"""The embedding bag: the rows of a table that a bag of indices names, summed, averaged, or their largest.

Index legend: `n` positions in all bags, which lie one after the other; `b` bags; `r` rows of the table, `d`
features. b[n] is the bag of position n, i[n] its index, s[n] its weight (1 if not given), m[b] the size of a bag.

    sum     y[b,d] = Σ_{n in b} s[n] w[i[n],d]
    mean    y[b,d] = 1/m[b] Σ_{n in b} w[i[n],d]
    max     y[b,d] = w[t[b,d],d],        t[b,d] = the first index of the bag whose w[.,d] is the largest

A bag of nothing gives 0. Positions that hold the padding index are in no bag.

What reaches a position is the gradient of its bag, and a row collects what reaches the positions that read it, as
in embedding.py; where the largest was taken, it alone is reached:

    sum     dw[r,d] = Σ_n [r = i[n]] s[n] dy[b[n],d]              ds[n] = Σ_d dy[b[n],d] w[i[n],d]
    mean    dw[r,d] = Σ_n [r = i[n]] dy[b[n],d] / m[b[n]]
    max     dw[r,d] = Σ_b [r = t[b,d]] dy[b,d]

The indices, where bags begin and how large they are are kept; t for a maximum, s if it is given, and w for ds.
The rows (n × d numbers) are never kept.

Source: Joulin et al., "Bag of tricks for efficient text classification", arXiv 1607.01759.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op, outside_transforms
from bptools.ops.embedding import collect, frequencies

aten = torch.ops.aten

MODES = ("sum", "mean", "max")  # in the order of ATen's numbers for them


def embedding_bag_forward(
    weight: Tensor,
    per_sample_weights: Tensor | None,
    indices: Tensor,
    offsets: Tensor,
    mode: str,
    padding_idx: int,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """weight (rows, d), per_sample_weights, indices (n,), offsets (b,) -> y (b, d), size (b,), top (b, d).

    padding_idx is -1 for none. top is t, and has no elements unless mode is "max".
    """
    bag = _bag_of(indices, offsets)
    counted = indices != padding_idx  # (n,)
    size = torch.zeros_like(offsets).index_add(0, bag, counted.to(offsets.dtype))
    rows = weight.index_select(0, indices)  # (n, d)
    if mode == "max":
        return *_largest(rows, bag, counted, size, indices), size
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    rows = torch.where(counted.unsqueeze(-1), rows, 0)
    y = rows.new_zeros((offsets.shape[0], weight.shape[1])).index_add(0, bag, rows)
    if mode == "mean":
        y = y / size.clamp_min(1).unsqueeze(-1)
    return y, indices.new_zeros(0), size


def embedding_bag_backward(
    dy: Tensor,
    weight: Tensor,
    per_sample_weights: Tensor | None,
    indices: Tensor,
    offsets: Tensor,
    top: Tensor,
    size: Tensor,
    mode: str,
    padding_idx: int,
    scale_grad_by_freq: bool,
    sparse: bool,
    weight_shape: torch.Size,
    needs=EVERY,
) -> tuple[Tensor | None, Tensor | None]:
    """dy (b, d), the rest as in the forward -> dweight (rows, d), dper_sample_weights (n,)."""
    if mode == "max":
        dy = torch.where((size > 0).unsqueeze(-1), dy, 0)
        return dy.new_zeros(weight_shape).scatter_add(0, top.long(), dy), None
    dweight = dsample = None
    bag = _bag_of(indices, offsets)
    reaches = dy.index_select(0, bag)  # (n, d)
    if mode == "mean":
        reaches = reaches / size.index_select(0, bag).clamp_min(1).unsqueeze(-1)
    if "per_sample_weights" in needs:
        dsample = (reaches * weight.index_select(0, indices)).sum(-1)
        dsample = torch.where(indices != padding_idx, dsample, 0)
    if "weight" in needs:
        if per_sample_weights is not None:
            reaches = reaches * per_sample_weights.unsqueeze(-1)
        if scale_grad_by_freq:
            reaches = reaches / frequencies(indices, weight_shape[0], dy).unsqueeze(-1)
        dweight = collect(reaches, indices, padding_idx, sparse, weight_shape)
    return dweight, dsample


def _bag_of(indices: Tensor, offsets: Tensor) -> Tensor:
    """indices (n,), offsets (b,), where each bag begins -> the bag of each position (n,)."""
    begins = offsets.new_zeros(indices.shape[0] + 1).index_add(0, offsets, torch.ones_like(offsets))
    return begins.cumsum(0)[:-1] - 1


def _largest(rows: Tensor, bag: Tensor, counted: Tensor, size: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """rows (n, d), size (b,), all others (n,) -> the largest of each bag (b, d), and its index (b, d)."""
    n, shape = rows.shape[0], (size.shape[0], rows.shape[1])
    bag = bag.unsqueeze(-1).expand_as(rows)
    rows = torch.where(counted.unsqueeze(-1), rows, -torch.inf)
    largest = rows.new_zeros(shape).scatter_reduce(0, bag, rows, "amax", include_self=False)
    place = torch.arange(n, device=rows.device).unsqueeze(-1).expand_as(rows)
    place = torch.where(rows == largest.gather(0, bag), place, n)
    first = place.new_full(shape, n).scatter_reduce(0, bag, place, "amin")
    top = torch.cat([indices, indices.new_zeros(1)])[first]
    return torch.where((size > 0).unsqueeze(-1), largest, 0), top


def _kernel_forward(weight, per_sample_weights, indices, offsets, mode, padding_idx, scale_grad_by_freq, sparse):
    constants = scale_grad_by_freq, MODES.index(mode), sparse, per_sample_weights, False, padding_idx
    y, _, size, top = aten._embedding_bag(weight, indices, offsets, *constants)
    return y, top, size


def _kernel_backward(
    dy,
    weight,
    per_sample_weights,
    indices,
    offsets,
    top,
    size,
    mode,
    padding_idx,
    scale_grad_by_freq,
    sparse,
    weight_shape,
    needs,
):
    dweight = dsample = None
    mode, bag = MODES.index(mode), _bag_of(indices, offsets).to(offsets.dtype)
    if "weight" in needs:
        constants = scale_grad_by_freq, mode, sparse, per_sample_weights, padding_idx
        dweight = aten._embedding_bag_backward(dy, indices, offsets, bag, size, top, weight_shape[0], *constants)
    if "per_sample_weights" in needs:
        dsample = aten._embedding_bag_per_sample_weights_backward(
            dy, weight, indices, offsets, bag, mode, padding_idx
        )
    return dweight, dsample


def _kernel_usable(weight, *rest):
    return weight.numel() > 0 and outside_transforms()


embedding_bag = Op(
    embedding_bag_forward,
    embedding_bag_backward,
    outputs="y top size",
    grads="weight per_sample_weights",
    keep_for={"weight": "per_sample_weights", "per_sample_weights": "weight", "top": "weight"},
    kernel=Kernel(_kernel_forward, _kernel_backward, _kernel_usable),
)
