"""Cases of the head of a classifier and its loss in one op."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from case import EMPTY, Case
from torch import Tensor

ROWS = SimpleNamespace(batch_chunk_size=2)  # torch 2.10 has no LinearCrossEntropyOptions


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    ignore_index: int | None = None,
    options: object = None,
    return_argmax: bool = False,
    **constants: float,
) -> Tensor:
    """Linear layer and cross entropy by torch, one after the other: what torch's function is said to be."""
    classes, *places, features = linear_weight.shape
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = F.linear(input, linear_weight.reshape(math.prod((classes, *places)), features), bias)
    logits = logits.reshape(*input.shape[:-1], classes, *places)
    ignore = -100 if ignore_index is None else ignore_index
    loss = F.cross_entropy(logits, target, weight, reduction=reduction, ignore_index=ignore, **constants)
    dim = input.dim() - 1
    if z_loss:
        square = logits.to(loss.dtype).logsumexp(dim) ** 2
        if target.shape != logits.shape:
            kept = target != ignore
            square = torch.where(kept, square, 0)
        else:
            kept = torch.ones_like(square)
        divisor = kept.sum() if reduction == "mean" else 1
        loss = loss + z_loss * (square if reduction == "none" else square.sum() / divisor)
    return (loss, logits.argmax(dim)) if return_argmax else loss


def case(id, make, **options):
    return Case("linear_cross_entropy", id, make, theirs=linear_cross_entropy, **options)


CASES: list[Case] = [
    case("plain", lambda t: ((t(5, 3), t(4, 3), t.integers(4, 5)), {})),
    *[
        case(
            f"everything-{reduction}",
            lambda t, reduction=reduction: (
                (t(5, 3), t(4, 3), t.integers(4, 5)),
                {
                    "linear_bias": t(4),
                    "weight": t.positive(4, grad=False),
                    "ignore_index": 1,
                    "label_smoothing": 0.1,
                    "z_loss": 0.3,
                    "reduction": reduction,
                    "options": ROWS,
                },
            ),
        )
        for reduction in ("none", "mean", "sum")
    ],
    case(
        "places",
        lambda t: ((t(3, 2), t(4, 2, 3, 2), t.integers(4, 3, 2, 3)), {"linear_bias": t(4, 2, 3), "options": ROWS}),
    ),
    case("vector", lambda t: ((t(3), t(4, 3), t.integers(4)), {"reduction": "none"})),
    case("probabilities", lambda t: ((t(5, 3), t(4, 3), t.positive(5, 4, grad=False)), {"options": ROWS})),
    case(
        "probabilities-everything",
        lambda t: (
            (t(3, 3), t(4, 2, 3), t.positive(3, 4, 2)),
            {
                "linear_bias": t(4, 2),
                "weight": t.positive(4),
                "label_smoothing": 0.2,
                "z_loss": 0.3,
                "reduction": "none",
                "options": ROWS,
            },
        ),
    ),
    case("all-ignored", lambda t: ((t(4, 3), t(4, 3), t.integers(1, 4) - 100), {"z_loss": 0.1}), only=EMPTY),
    case("no-rows", lambda t: ((t(0, 3), t(4, 3), t.integers(4, 0)), {"linear_bias": t(4)}), only=EMPTY),
    case("no-places", lambda t: ((t(2, 3), t(4, 0, 3), t.integers(4, 2, 0)), {"reduction": "none"}), only=EMPTY),
    case("no-features", lambda t: ((t(3, 0), t(4, 0), t.integers(4, 3)), {"linear_bias": t(4)}), only=EMPTY),
]
