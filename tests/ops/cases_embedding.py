"""Cases of what an embedding has beside its rows: bags of them, and rotations by position."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from case import CAPABILITIES, EMPTY, Case, Maker
from torch import Tensor

# Where the gradient is not the derivative, but what the user wants in its place.
WISHED = tuple(c for c in CAPABILITIES if c not in ("gradcheck", "jvp", "compile"))


def by_frequency(input: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
    """Embedding with scale_grad_by_freq, written out: torch's second derivative leaves the scale out."""
    often = torch.bincount(input.flatten(), minlength=weight.shape[0])[input].unsqueeze(-1)
    rows = F.embedding(input, weight, kwargs["padding_idx"])
    return rows.detach() + (rows - rows.detach()) / often


def bags(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    *,
    mode: str = "mean",
    padding_idx: int | None = None,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
) -> Tensor:
    """The embedding bag, bag by bag: torch's has no second derivative and no forward mode."""
    if offsets is None:
        parts, samples = input.unbind(), None
        if per_sample_weights is not None:
            samples = per_sample_weights.unbind()
    else:
        ends = [*offsets.tolist(), *([] if include_last_offset else [len(input)])]
        sizes = [b - a for a, b in itertools.pairwise(ends)]
        parts = input.split(sizes)
        samples = None if per_sample_weights is None else per_sample_weights.split(sizes)
    results = []
    for i, part in enumerate(parts):
        counted = [j for j, index in enumerate(part.tolist()) if index != padding_idx]
        rows = weight[part[counted]]
        if samples is not None:
            rows = rows * samples[i][counted].unsqueeze(-1)
        if not counted:
            results.append(rows.sum(0))
        elif mode == "max":
            results.append(rows.max(0).values)
        else:
            results.append(rows.sum(0) if mode == "sum" else rows.mean(0))
    return torch.stack(results)


def ragged(**constants: Any) -> Callable[[Maker], tuple[tuple[Any, ...], dict[str, Any]]]:
    """Four bags, one of nothing."""
    return lambda t: ((t.integers(5, 7), t(5, 3), torch.tensor([0, 2, 2, 6])), constants)


def weighted(t: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
    offsets = torch.tensor([0, 3, 7])
    samples = {"per_sample_weights": t(7), "include_last_offset": True, "padding_idx": 1}
    return (t.integers(4, 7), t(4, 3), offsets), {"mode": "sum", **samples}


def rotation(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        a, b = x.chunk(2, -1)
        turned = torch.cat((-b, a), -1)
    return x * cos + turned * sin


CASES: list[Case] = [
    Case(
        "embedding",
        "by-frequency",
        lambda t: ((t.integers(3, 7), t(3, 4)), {"padding_idx": 1, "scale_grad_by_freq": True}),
        theirs=by_frequency,
        only=WISHED,
    ),
    # embedding_bag
    Case("embedding_bag", "mean", ragged(), theirs=bags),
    Case("embedding_bag", "weighted", weighted, theirs=bags),
    Case("embedding_bag", "largest", ragged(mode="max", padding_idx=1), theirs=bags),
    Case(
        "embedding_bag",
        "padded",
        lambda t: ((t.integers(3, 3, 4).int(), t(3, 2)), {"padding_idx": 1}),
        theirs=bags,
        only=("values", "layouts", "masks", "half"),
    ),
    Case(
        "embedding_bag",
        "no-bags",
        lambda t: ((t.integers(3, 0, 2), t(3, 4)), {}),
        theirs=F.embedding_bag,
        only=EMPTY,
    ),
    # rotary_embedding
    Case(
        "rotary_embedding",
        "halves",
        lambda t: ((t(2, 2, 3, 4), t(3, 4, grad=False), t(3, 4, grad=False)), {}),
        theirs=rotation,
    ),
    Case(
        "rotary_embedding",
        "interleaved",
        lambda t: ((t(2, 3, 4), t(3, 4), t(2, 1, 4)), {"interleaved": True}),
        theirs=rotation,
    ),
    Case("rotary_embedding", "empty", lambda t: ((t(2, 0, 4), t(0, 4), t(4)), {}), theirs=rotation, only=EMPTY),
]
