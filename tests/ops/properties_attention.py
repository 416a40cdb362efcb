"""What hypothesis may draw for attention, its products, and attention with heads and projections."""

from __future__ import annotations

import cases_attention
import properties_foundation
import torch
from cases_attention import both
from drawing import SIDE, Property, choice, optional
from hypothesis import strategies as st

import bptools.functional as B
from bptools.check.strategies import calls, tensors


@st.composite
def product(draw):
    n, l, e, s = draw(choice((), (2,), (0,))), draw(SIDE), draw(st.integers(0, 3)), draw(SIDE)
    bias = optional(tensors(draw(choice((l, s), (*n, 1, s), (s,)))))
    return draw(calls(tensors((*n, l, e)), tensors((*n, e, s)), bias, choice(1.0, 0.7)))


@st.composite
def multi_head(draw):
    h, d, l, s = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(SIDE), draw(SIDE)
    n = draw(choice((), (2,)))
    e, heads = h * d, h * (n[0] if n else 1)
    weight, bias = tensors((3 * e, e)), optional(tensors((3 * e,)))
    more = draw(st.booleans())
    added = [tensors((1, 1, e)) if more else None] * 2
    mask = tensors(draw(choice((l, s), (heads, l, s))))
    padding = tensors((*n, s), requires_grad=False)
    return draw(
        calls(
            tensors((l, *n, e)),
            tensors((s, *n, e)),
            tensors((s, *n, e)),
            e,
            h,
            weight,
            bias,
            *added,
            st.booleans(),
            0.0,
            tensors((e, e)),
            optional(tensors((e,))),
            key_padding_mask=optional(padding),
            need_weights=st.booleans(),
            attn_mask=optional(mask),
            average_attn_weights=st.booleans(),
        )
    )


PROPERTIES = (
    Property(
        "matmul",
        product(),
        cases_attention.product,
        lambda x, y, b, scale: (x * scale) @ y if b is None else (x * scale) @ y + b,
    ),
    Property("multi_head_attention_forward", multi_head(), both(B), both(torch.nn.functional)),
    Property(
        "scaled_dot_product_attention",
        properties_foundation.attention(),
        cases_attention.in_tiles,
        cases_attention.at_once,
    ),
)
