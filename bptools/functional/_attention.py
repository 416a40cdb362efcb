"""Attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bptools.functional._checks import check_probability, shape_of
from bptools.ops import attention as _attention
from bptools.ops import dropout as _dropout


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`softmax(scale * query @ key.mT + bias) @ value`, without keeping the attention matrix for backward.

    Args:
        query: (..., heads, l, e).
        key: (..., heads, s, e).
        value: (..., heads, s, f).
        attn_mask: broadcasts to (..., heads, l, s). Boolean: True takes part. Floating: added to the scores. The
            output of a query that may attend to nothing is 0.
        dropout_p: the probability with which an attention weight is zeroed. Unlike a module, this function cannot
            know that it is in evaluation: pass 0 there.
        is_causal: a query sees the keys up to its own index; not together with attn_mask.
        scale: of the scores; None for 1 / √e.
        enable_gqa: key and value may have fewer heads than query, each serving a group of consecutive ones.

    Returns:
        (..., heads, l, f).

    Raises:
        ValueError: if the shapes do not fit, or is_causal comes with attn_mask.
        TypeError: if the dtypes of query, key and value differ, or attn_mask has an unfit one.
    """
    scores = _check_attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if scale is None:
        scale = 1 / math.sqrt(max(query.shape[-1], 1))
    boolean = attn_mask is not None and attn_mask.dtype is torch.bool
    bias, mask = (None, attn_mask) if boolean else (attn_mask, None)
    keep = None
    if dropout_p > 0:
        keep = _dropout.draw(torch.empty(scores, dtype=torch.uint8, device=query.device), dropout_p)
    o, _ = _attention.scaled_dot_product_attention(
        query, key, value, bias, mask, keep, is_causal, dropout_p, scale, enable_gqa
    )
    return o


def _check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> torch.Size:
    """Checks the arguments and returns the shape of the scores, (..., heads, l, s)."""
    name = "scaled_dot_product_attention"
    check_probability(name, "dropout_p", dropout_p)
    least = 3 if enable_gqa else 2
    for argument, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() < least:
            raise ValueError(f"{name}: {argument} must have at least {least} dimensions, got {shape_of(t)}")
        if not t.is_floating_point():
            raise TypeError(f"{name}: {argument} must have a floating dtype, got {t.dtype}")
        if t.dtype is not query.dtype:
            raise TypeError(f"{name}: {argument} must have the dtype of query, {query.dtype}, got {t.dtype}")
        if enable_gqa and (t.shape[-3] == 0 or query.shape[-3] % t.shape[-3]):
            raise ValueError(
                f"{name}: the heads of {argument} must divide the {query.shape[-3]} of query, got {t.shape[-3]}"
            )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"{name}: key must have {query.shape[-1]} features, as query has, got {shape_of(key)}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"{name}: value must have {key.shape[-2]} rows, as key has, got {shape_of(value)}")
    cut = -3 if enable_gqa else -2
    heads = query.shape[cut:-2]
    batch = query.shape[:cut]
    if not batch == key.shape[:cut] == value.shape[:cut]:
        try:
            batch = torch.broadcast_shapes(batch, key.shape[:cut])
            torch.broadcast_shapes(batch, value.shape[:cut])
        except RuntimeError:
            raise ValueError(
                f"{name}: the leading dimensions of query, key and value must broadcast, got {shape_of(query)}, "
                f"{shape_of(key)} and {shape_of(value)}"
            ) from None
    scores = torch.Size((*batch, *heads, query.shape[-2], key.shape[-2]))
    if attn_mask is None:
        return scores
    if is_causal:
        raise ValueError(f"{name}: is_causal must be False when attn_mask is given, got both")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(
            f"{name}: attn_mask must be boolean, float32 or of query's dtype {query.dtype}, got {attn_mask.dtype}"
        )
    trailing = scores[max(len(scores) - attn_mask.dim(), 0) :]
    if attn_mask.dim() > len(scores) or any(
        m not in (1, n) for m, n in zip(attn_mask.shape, trailing, strict=True)
    ):
        raise ValueError(f"{name}: attn_mask must broadcast to {tuple(scores)}, got {shape_of(attn_mask)}")
    return scores
