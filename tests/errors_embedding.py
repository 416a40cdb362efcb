"""Bad input to embeddings, bags of them, and rotations."""

from __future__ import annotations

import torch

import bptools.functional as B

table = torch.randn(4, 3)
flat = torch.tensor([0, 3, 1])
x = torch.randn(3, 4)

# A call, the exception, and what its message must say.
ERRORS = {
    "embedding: max_norm": (
        lambda: B.embedding(flat + 2, table.clone(), max_norm=1.0),
        IndexError,
        "input must hold rows of weight, 0 to 3, got 2 to 5",
    ),
    "embedding_bag: dtype": (
        lambda: B.embedding_bag(x, table),
        TypeError,
        "input must be int64 .* got torch.float32",
    ),
    "embedding_bag: weight": (lambda: B.embedding_bag(flat, x[0]), ValueError, r"weight .* got shape \(4,\)"),
    "embedding_bag: input": (
        lambda: B.embedding_bag(flat[0], table),
        ValueError,
        r"input must have 1 .*\(\)",
    ),
    "embedding_bag: rows": (
        lambda: B.embedding_bag(flat[None] + 1, table),
        IndexError,
        "input must hold rows of weight, 0 to 3, got 1 to 4",
    ),
    "embedding_bag: padding_idx": (
        lambda: B.embedding_bag(flat[None], table, padding_idx=4),
        ValueError,
        "padding_idx must be from -4 to 3, got 4",
    ),
    "embedding_bag: no offsets": (lambda: B.embedding_bag(flat, table), ValueError, "offsets must be .* got None"),
    "embedding_bag: offsets": (
        lambda: B.embedding_bag(flat[None], table, flat),
        ValueError,
        r"offsets must be None with input \(1, 3\), got a tensor",
    ),
    "embedding_bag: floating offsets": (
        lambda: B.embedding_bag(flat, table, torch.zeros(1)),
        TypeError,
        "offsets must be int64 or int32, got torch.float32",
    ),
    "embedding_bag: falling offsets": (
        lambda: B.embedding_bag(flat, table, flat),
        ValueError,
        r"offsets must begin with 0 and rise to at most 3, got \[0, 3, 1\]",
    ),
    "embedding_bag: last offset": (
        lambda: B.embedding_bag(flat, table, flat[:1], include_last_offset=True),
        ValueError,
        r"offsets must rise from 0 to 3, got \[0\]",
    ),
    "embedding_bag: mode": (
        lambda: B.embedding_bag(flat[None], table, mode="min"),
        ValueError,
        "mode must be .* got 'min'",
    ),
    "embedding_bag: sparse": (
        lambda: B.embedding_bag(flat[None], table, mode="max", sparse=True),
        ValueError,
        "sparse must be False .* got True",
    ),
    "embedding_bag: per_sample_weights": (
        lambda: B.embedding_bag(flat[None], table, mode="sum", per_sample_weights=x),
        ValueError,
        r"per_sample_weights must have input's shape \(1, 3\), got \(3, 4\)",
    ),
    "embedding_bag: mode with per_sample_weights": (
        lambda: B.embedding_bag(flat[None], table, per_sample_weights=x[:1, :3]),
        NotImplementedError,
        "per_sample_weights is for mode 'sum' alone, got 'mean'",
    ),
    "rotary_embedding: input": (
        lambda: B.rotary_embedding(x[:, :3], x, x),
        ValueError,
        r"input must have shape .* got \(3, 3\)",
    ),
    "rotary_embedding: cos": (
        lambda: B.rotary_embedding(x, x[:2], x),
        ValueError,
        r"cos must broadcast to input's shape \(3, 4\), got \(2, 4\)",
    ),
    "rotary_embedding: sin": (
        lambda: B.rotary_embedding(x, x, x[None]),
        ValueError,
        r"sin must broadcast to input's shape \(3, 4\), got \(1, 3, 4\)",
    ),
}

DEVIATIONS = {"rotary_embedding": "torch has no such function"}
