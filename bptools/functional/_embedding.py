"""Embeddings: of tokens, of bags of them, and of positions."""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.functional._checks import one_dtype, shape_of
from bptools.ops import embedding as _embedding
from bptools.ops import embedding_bag as _embedding_bag
from bptools.ops import rotary_embedding as _rotary_embedding


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
        max_norm: before they are read, rows with a larger norm are scaled down to it, in place.
        norm_type: of `max_norm`, the exponent of the norm.
        scale_grad_by_freq: divide the gradient of a row by how often it is read.
        sparse: give weight a sparse gradient, (num_embeddings, embedding_dim) in COO layout.

    Returns:
        (..., embedding_dim).

    Raises:
        IndexError: if input holds a row that weight does not have. On a GPU the device reports it, later.
        TypeError: if input does not hold integers or weight is not floating.
        ValueError: if weight has not 2 dimensions, or no row `padding_idx`.
    """
    padding = _check_table("embedding", input, weight, padding_idx)
    try:
        if max_norm is not None:
            _renormalise(weight, input, max_norm, norm_type)
        return _embedding.embedding(weight, input, padding, scale_grad_by_freq, sparse)
    except IndexError:
        raise _no_such_row("embedding", input, weight) from None


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Rows of a table, added up in bags. Never makes the rows' tensor, and keeps indices and offsets for backward.

    Args:
        input: (n,), the rows of all bags one after the other, or (b, l), b bags of l rows each; int64 or int32.
        weight: (num_embeddings, embedding_dim).
        offsets: (b,), where in (n,) each bag begins, from 0 on; None with (b, l).
        max_norm: before they are read, rows with a larger norm are scaled down to it, in place.
        norm_type: of `max_norm`, the exponent of the norm.
        scale_grad_by_freq: divide the gradient of a row by how often it is read. Not with `"max"`.
        mode: `"sum"`, `"mean"` or `"max"`. A bag of nothing gives 0.
        sparse: give weight a sparse gradient, (num_embeddings, embedding_dim) in COO layout. Not with `"max"`.
        per_sample_weights: input's shape, a factor for each row that is read, differentiable; with `"sum"` alone.
        include_last_offset: offsets is (b + 1,), and its last is n.
        padding_idx: a row that is in no bag; negative counts from the end.

    Returns:
        (b, embedding_dim).

    Raises:
        IndexError: if input holds a row that weight does not have. On a GPU the device reports it, later.
        NotImplementedError: if there are per_sample_weights and mode is not `"sum"`.
        TypeError: if input or offsets does not hold integers or weight is not floating.
        ValueError: if the shapes do not fit, or, on the CPU, the offsets; if mode is none of the above, or
            does not go with an argument.
    """
    if input.is_nested:
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights.values()
        input, offsets, include_last_offset = input.values(), input.offsets(), True
    padding = _check_table("embedding_bag", input, weight, padding_idx)
    _check_bags(input, offsets, mode, scale_grad_by_freq, sparse, per_sample_weights, include_last_offset)
    if input.dim() == 2:
        offsets = torch.arange(input.shape[0], dtype=input.dtype, device=input.device) * input.shape[1]
    elif include_last_offset:
        offsets = offsets[:-1]
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights.reshape(-1)
    flat = input.reshape(-1)
    kind = torch.promote_types(flat.dtype, offsets.dtype)
    try:
        if max_norm is not None:
            _renormalise(weight, flat, max_norm, norm_type)
        where = flat.to(kind).contiguous(), offsets.to(kind).contiguous()
        constants = mode, padding, scale_grad_by_freq, sparse
        y, _, _ = _embedding_bag.embedding_bag(weight, per_sample_weights, *where, *constants)
        return y
    except (IndexError, RuntimeError):
        if flat.numel() and not 0 <= flat.min() <= flat.max() < weight.shape[0]:
            raise _no_such_row("embedding_bag", input, weight) from None
        raise


def rotary_embedding(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn each pair of features by an angle: rotary position embedding. Keeps cos and sin for backward.

    Args:
        input: (..., d), d even: queries or keys, such as (n, heads, l, d).
        cos: of the angles, in a shape that broadcasts to input's, such as (l, d) or (n, 1, l, d); both features of
            a pair have theirs. `bptools.nn.RotaryEmbedding` makes them.
        sin: as cos.
        interleaved: the pairs are features 0 and 1, 2 and 3, ... (GPT-J); else i and i + d/2 (Llama).

    Returns:
        (..., d), in the dtype to which the three are promoted.

    Raises:
        ValueError: if d is odd, or cos or sin does not fit.
    """
    if input.dim() == 0 or input.shape[-1] % 2:
        raise ValueError(f"rotary_embedding: input must have shape (..., d) with d even, got {shape_of(input)}")
    for name, table in (("cos", cos), ("sin", sin)):
        sizes = zip(reversed(table.shape), reversed(input.shape), strict=False)
        if table.dim() > input.dim() or any(t not in (1, size) for t, size in sizes):
            shape = shape_of(input)
            raise ValueError(
                f"rotary_embedding: {name} must broadcast to input's shape {shape}, got {shape_of(table)}"
            )
    return _rotary_embedding.rotary_embedding(*one_dtype(input, cos, sin), interleaved)


def _check_table(name: str, input: Tensor, weight: Tensor, padding_idx: int | None) -> int:
    """The padding index from 0 on, or -1 for none."""
    if input.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: input must be int64 or int32, got {input.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"{name}: weight must have 2 dimensions, got shape {shape_of(weight)}")
    rows = weight.shape[0]
    if padding_idx is None:
        return -1
    if not -rows <= padding_idx < rows:
        raise ValueError(f"{name}: padding_idx must be from {-rows} to {rows - 1}, got {padding_idx}")
    return padding_idx % rows


def _check_bags(
    input: Tensor,
    offsets: Tensor | None,
    mode: str,
    scale_grad_by_freq: bool,
    sparse: bool,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
) -> None:
    if mode not in _embedding_bag.MODES:
        raise ValueError(f"embedding_bag: mode must be 'sum', 'mean' or 'max', got {mode!r}")
    for name, given in (("scale_grad_by_freq", scale_grad_by_freq), ("sparse", sparse)):
        if given and mode == "max":
            raise ValueError(f"embedding_bag: {name} must be False with mode 'max', got {given!r}")
    if input.dim() not in (1, 2):
        raise ValueError(f"embedding_bag: input must have 1 or 2 dimensions, got shape {shape_of(input)}")
    if input.dim() == 2 and offsets is not None:
        raise ValueError(f"embedding_bag: offsets must be None with input {shape_of(input)}, got a tensor")
    if input.dim() == 1:
        least = int(include_last_offset)
        if offsets is None or offsets.dim() != 1 or offsets.shape[0] < least:
            got = None if offsets is None else f"shape {shape_of(offsets)}"
            raise ValueError(f"embedding_bag: offsets must be 1-D, of at least {least} elements, got {got}")
        if offsets.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"embedding_bag: offsets must be int64 or int32, got {offsets.dtype}")
        _check_ends(offsets, input.shape[0], include_last_offset)
    if per_sample_weights is not None:
        if mode != "sum":
            raise NotImplementedError(f"embedding_bag: per_sample_weights is for mode 'sum' alone, got {mode!r}")
        if per_sample_weights.shape != input.shape:
            raise ValueError(
                f"embedding_bag: per_sample_weights must have input's shape {shape_of(input)}, "
                f"got {shape_of(per_sample_weights)}"
            )


def _check_ends(offsets: Tensor, n: int, include_last_offset: bool) -> None:
    """Torch's kernels read what lies beside the input if offsets fall. Asking a GPU would have to wait for it."""
    if offsets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ends = offsets if include_last_offset else torch.cat([offsets, offsets.new_tensor([n])])
    if ends[0] != 0 or ends[-1] != n or (ends.diff() < 0).any():
        rise = f"rise from 0 to {n}" if include_last_offset else f"begin with 0 and rise to at most {n}"
        raise ValueError(f"embedding_bag: offsets must {rise}, got {offsets.tolist()}")


def _renormalise(weight: Tensor, input: Tensor, max_norm: float, norm_type: float) -> None:
    """Scale down the rows that are named and too long, in place, behind the back of autograd as torch does."""
    with torch.no_grad():
        torch.embedding_renorm_(weight.detach(), input.contiguous(), max_norm, norm_type)


def _no_such_row(name: str, input: Tensor, weight: Tensor) -> IndexError:
    rows = f"rows of weight, 0 to {weight.shape[0] - 1}"
    return IndexError(f"{name}: input must hold {rows}, got {input.min()} to {input.max()}")
