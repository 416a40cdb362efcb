"""Cases of attention in several tiles, of the product of matrices, and of attention with heads and projections."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from case import CAPABILITIES, EMPTY, Case, Maker
from cases_foundation import attention
from torch import Tensor

import bptools.functional as B
from bptools.ops import attention as _attention
from bptools.ops import matmul as _matmul


def in_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = 0.7,
    enable_gqa: bool = False,
) -> Tensor:
    """Our attention, with two queries to a tile."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    boolean = attn_mask is not None and attn_mask.dtype is torch.bool
    bias, mask = (None, attn_mask) if boolean else (attn_mask, None)
    constants = is_causal, 0.0, scale, enable_gqa, 2
    return _attention.scaled_dot_product_attention(q, k, v, bias, mask, None, None, *constants)[0]


def at_once(*args: Tensor, scale: float | None = 0.7, **constants: Any) -> Tensor:
    """The same by torch."""
    return attention(*args, scale=scale, **constants)


def heads(t: Maker, queries: int, keys: int, shared: int = 2) -> tuple[Tensor, ...]:
    """Query, key and value, of two heads."""
    return t(2, queries, 3), t(shared, keys, 3), t(shared, keys, 2)


CASES: list[Case] = [
    # `only` names all: these are not the first case of their op
    Case("scaled_dot_product_attention", id, make, in_tiles, at_once, only=only)
    for id, make, only in (
        ("tiles-bias", lambda t: ((*heads(t, 5, 3), t(2, 5, 3)), {}), tuple(CAPABILITIES)),
        (
            "tiles-causal",
            lambda t: (heads(t, 3, 4, 1), {"is_causal": True, "enable_gqa": True}),
            tuple(c for c in CAPABILITIES if c != "compile"),
        ),
    )
]


def heads_and_projections(t: Maker, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Query, key and value of 2 samples and 4 features, the projections and 2 heads."""
    x, y = t(2, 2, 4), t(3, 2, 4)
    return (x, y, y, 4, 2, t(12, 4), t(12), None, None, False, 0.0, t(4, 4), t(4)), options


def product(x: Tensor, y: Tensor, bias: Tensor | None = None, scale: float = 0.5) -> Tensor:
    """Our product of matrices."""
    return _matmul.matmul(x, y, bias, scale)


def both(functions: Any) -> Any:
    """Output and weights, which the auditor sees as two outputs; or the output alone."""

    def call(*args: Any, **options: Any) -> Any:
        output, weights = functions.multi_head_attention_forward(*args, **options)
        return output if weights is None else (output, weights)

    return call


CASES += [
    Case(
        "matmul",
        "bias",
        lambda t: ((t(2, 3, 4), t(4, 2), t(2, 1, 2)), {}),
        product,
        lambda x, y, b: torch.baddbmm(b, x, y.expand(2, 4, 2), alpha=0.5),
    ),
    Case(
        "matmul",
        "no-columns",
        lambda t: ((t(3, 0), t(0, 2)), {}),
        product,
        lambda x, y: 0.5 * (x @ y),
        only=EMPTY,
    ),
    Case(
        "multi_head_attention_forward",
        "weights",
        lambda t: heads_and_projections(t, attn_mask=t(2, 3)),
        both(B),
        both(F),
        only=("values", "gradcheck", "half", "autocast", "jvp", "vmap", "hygiene"),
    ),
]
