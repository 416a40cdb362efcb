"""What losses do with the numbers of their rows: nothing, their mean, or their sum."""

from __future__ import annotations

from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")  # in the order of ATen's numbers for them


def reduce_rows(rows: Tensor, reduction: str, total: Tensor | int) -> Tensor:
    """rows (n) -> (n), or () where it is their sum, or their sum divided by `total`."""
    if reduction == "none":
        return rows
    return rows.sum() / total if reduction == "mean" else rows.sum()


def row_gradient(dy: Tensor, reduction: str, total: Tensor | int) -> Tensor:
    """The gradient of each row's loss: dy (n) or () -> (n) or ()."""
    return dy / total if reduction == "mean" else dy
