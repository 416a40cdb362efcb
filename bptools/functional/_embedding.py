"""Embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.functional._checks import shape_of
from bptools.ops import embedding as _embedding


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of a table: `weight[input]`. Keeps the indices alone for backward.

    Args:
        input: (...), int64 or int32, the rows to take.
        weight: (num_embeddings, embedding_dim).
        padding_idx: a row that gets no gradient; negative counts from the end.
        max_norm: not supported yet.
        norm_type: of `max_norm`.
        scale_grad_by_freq: not supported yet.
        sparse: not supported yet.

    Returns:
        (..., embedding_dim).

    Raises:
        IndexError: if input holds a row that weight does not have. On a GPU the device reports it, later.
        NotImplementedError: if an argument is given that is not supported yet.
        TypeError: if input does not hold integers or weight is not floating.
        ValueError: if weight has not 2 dimensions, or no row `padding_idx`.
    """
    for name, value in (("max_norm", max_norm), ("scale_grad_by_freq", scale_grad_by_freq), ("sparse", sparse)):
        if value is not None and value is not False:
            raise NotImplementedError(f"embedding: {name} is not supported yet, got {value!r}")
    if input.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"embedding: input must be int64 or int32, got {input.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"embedding: weight must have 2 dimensions, got shape {shape_of(weight)}")
    rows = weight.shape[0]
    if padding_idx is None:
        padding_idx = -1
    elif not -rows <= padding_idx < rows:
        raise ValueError(f"embedding: padding_idx must be from {-rows} to {rows - 1}, got {padding_idx}")
    elif padding_idx < 0:
        padding_idx += rows
    try:
        return _embedding.embedding(weight, input, padding_idx)
    except IndexError:
        raise IndexError(
            f"embedding: input must hold rows of weight, 0 to {rows - 1}, got {input.min()} to {input.max()}"
        ) from None
