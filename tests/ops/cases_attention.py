"""Cases of attention in several tiles, of the product of matrices, and of attention with heads and projections."""

from __future__ import annotations

from typing import Any

import torch
from case import Case, Maker
from cases_foundation import attention
from torch import Tensor

from bptools.ops import attention as _attention


def in_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """Our attention, with two queries to a tile."""
    boolean = attn_mask is not None and attn_mask.dtype is torch.bool
    bias, mask = (None, attn_mask) if boolean else (attn_mask, None)
    constants = is_causal, 0.0, 0.7, enable_gqa, 2
    return _attention.scaled_dot_product_attention(q, k, v, bias, mask, None, None, *constants)[0]


def at_once(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **constants: Any) -> Tensor:
    """The same by torch."""
    return attention(q, k, v, attn_mask, scale=0.7, **constants)


def heads(t: Maker, queries: int, keys: int, shared: int = 2) -> tuple[Tensor, ...]:
    """Query, key and value, of two heads."""
    return t(2, queries, 3), t(shared, keys, 3), t(shared, keys, 2)


CASES: list[Case] = [
    Case("scaled_dot_product_attention", id, make, in_tiles, at_once)
    for id, make in (
        ("tiles-bias", lambda t: ((*heads(t, 5, 3), t(2, 5, 3)), {})),
        ("tiles-causal", lambda t: (heads(t, 3, 4, 1), {"is_causal": True, "enable_gqa": True})),
    )
]
