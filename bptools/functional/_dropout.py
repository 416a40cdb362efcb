"""Dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.functional._checks import check_probability
from bptools.ops import dropout as _dropout


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zero each element of input (...) with probability p and multiply the others by 1 / (1 - p).

    Draws the numbers that torch draws on the CPU, and keeps one byte an element for backward.

    Args:
        input: (...).
        p: the probability of zero, from 0 to 1.
        training: if False, input is returned as it is.
        inplace: write the result over input.

    Raises:
        ValueError: if p is not between 0 and 1.
    """
    check_probability("dropout", "p", p)
    if not training or p == 0 or input.numel() == 0:
        return input
    keep = _dropout.draw(torch.empty_like(input, dtype=torch.uint8), p)
    return _dropout.dropout.inplace(input, keep, p) if inplace else _dropout.dropout(input, keep, p)
