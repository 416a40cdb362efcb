"""Bad input to attention with heads and projections."""

from __future__ import annotations

from typing import Any

import torch

import bptools.functional as B

e = 4
x, y = torch.randn(3, 2, e), torch.randn(5, 2, e)
NAMED = {
    "in_proj_weight": torch.randn(3 * e, e),
    "in_proj_bias": torch.randn(3 * e),
    "bias_k": None,
    "bias_v": None,
    "add_zero_attn": False,
    "dropout_p": 0.0,
    "out_proj_weight": torch.randn(e, e),
    "out_proj_bias": None,
}


def attend(query: Any = x, key: Any = y, value: Any = y, features: int = e, heads: int = 2, **options: Any) -> Any:
    return lambda: B.multi_head_attention_forward(query, key, value, features, heads, **{**NAMED, **options})


NAME = "multi_head_attention_forward"
ERRORS = {
    f"{NAME}: query": (attend(x[0, 0]), ValueError, r"query must have shape \(l, n, 4\).* got \(4,\)"),
    f"{NAME}: features": (attend(features=5), ValueError, r"query must have shape \(l, n, 5\)"),
    f"{NAME}: heads": (attend(heads=3), ValueError, "num_heads must divide the 4 features of query, got 3"),
    f"{NAME}: key": (attend(key=y[:, :1]), ValueError, r"key must have shape \(5, 2, 4\), got \(5, 1, 4\)"),
    f"{NAME}: value": (attend(value=y[:4]), ValueError, r"value must have shape \(5, 2, 4\), got \(4, 2, 4\)"),
    f"{NAME}: weight": (attend(in_proj_weight=None), ValueError, r"in_proj_weight .*\(12, 4\), got None"),
    f"{NAME}: separate": (attend(use_separate_proj_weight=True), ValueError, r"q_proj_weight .*got None"),
    f"{NAME}: bias": (attend(in_proj_bias=x), ValueError, r"in_proj_bias must .*\(12,\), got \(3, 2, 4\)"),
    f"{NAME}: one bias": (attend(bias_k=x[:1, :1]), ValueError, r"bias_v must .*\(1, 1, 4\), got None"),
    f"{NAME}: static": (attend(static_k=x), ValueError, r"static_k must .*\(4, 2, 2\), got \(3, 2, 4\)"),
    f"{NAME}: mask": (attend(attn_mask=x[0]), ValueError, r"attn_mask must .*\(3, 5\), got \(2, 4\)"),
    f"{NAME}: 3-D mask": (attend(attn_mask=x), ValueError, r"attn_mask must .*\(4, 3, 5\), got \(3, 2, 4\)"),
    f"{NAME}: padding": (attend(key_padding_mask=x[0]), ValueError, r"key_padding_mask must .*\(2, 5\), got"),
    f"{NAME}: hint": (attend(is_causal=True), ValueError, r"attn_mask must have shape \(3, 5\), got None"),
    f"{NAME}: dtype": (
        attend(attn_mask=torch.ones(3, 5, dtype=torch.long)),
        TypeError,
        "attn_mask must be boolean, float32 .* got torch.int64",
    ),
    f"{NAME}: dropout": (attend(dropout_p=1.5), ValueError, "dropout_p must be between 0 and 1, got 1.5"),
}
