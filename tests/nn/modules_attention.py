"""Attention and transformers, as test_modules.py tries them; test_attention.py has their other arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sequences(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, requires_grad=True) for shape in shapes)


def stack(kind: str) -> Any:
    """The arguments of a stack of two layers, from a namespace of modules."""

    def arguments(nn: Any) -> tuple[Any, ...]:
        layer = getattr(nn, f"Transformer{kind}Layer")(4, 2, 6, 0.0)
        return layer, 2, nn.LayerNorm(4), *((False,) if kind == "Encoder" else ())

    return arguments


MODULES = [
    ("MultiheadAttention", (4, 2), lambda: sequences((3, 2, 4), (5, 2, 4), (5, 2, 4))),
    (
        "MultiheadAttention",
        (4, 2, 0.3, False, True, True, 3, 5, True),
        lambda: (*sequences((2, 3, 4), (2, 2, 3), (2, 2, 5)), torch.tensor([[False, True], [False, False]])),
    ),
    ("TransformerEncoderLayer", (8, 2, 6, 0.0, "gelu", 1e-3, False, True, False), (3, 2, 8)),
    ("TransformerDecoderLayer", (8, 2, 6, 0.0), lambda: sequences((3, 2, 8), (2, 2, 8))),
    ("TransformerEncoder", stack("Encoder"), (3, 4)),
    ("TransformerDecoder", stack("Decoder"), lambda: sequences((3, 4), (2, 4))),
    (
        "Transformer",
        (4, 2, 1, 1, 6, 0.0, "gelu", None, None, 1e-5, True),
        lambda: sequences((2, 3, 4), (2, 2, 4)),
    ),
]
