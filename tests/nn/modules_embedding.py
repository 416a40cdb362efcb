"""Embeddings beyond rows of a table, as test_modules.py tries them."""

from __future__ import annotations

import torch


def bags():
    """Seven indices in four bags, one of nothing."""
    return torch.randint(7, (7,)), torch.tensor([0, 2, 2, 6])


def weighted_bags():
    return (*bags(), torch.randn(7, requires_grad=True))


MODULES = [
    ("Embedding", (7, 3, None, None, 2.0, True), lambda: (torch.randint(7, (2, 5)),)),
    ("EmbeddingBag", (7, 3), lambda: (torch.randint(7, (2, 5)),)),
    ("EmbeddingBag", (7, 3, None, 2.0, True, "mean", False, None, False, 2), bags),
    ("EmbeddingBag", (7, 3, None, 2.0, False, "sum"), weighted_bags),
    ("EmbeddingBag", (7, 3, None, 2.0, False, "max"), bags),
]
OURS_ALONE = {"RotaryEmbedding"}
