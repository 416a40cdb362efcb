"""Penalties on the size of parameters, which torch lacks."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from bptools.ops import penalty as _penalty


def l1_penalty(parameters: Tensor | Iterable[Tensor]) -> Tensor:
    """Sum of the sizes of all elements, `|w|`: its gradient is the sign.

    Args:
        parameters: (...), or several such tensors, on one device.

    Returns:
        (), in float32 or the parameters' dtype, whichever is more exact.

    Raises:
        TypeError: if a parameter is not floating.
        ValueError: if there is none.
    """
    return _total("l1_penalty", parameters)


def l2_penalty(parameters: Tensor | Iterable[Tensor]) -> Tensor:
    """Half the sum of the squares of all elements, `w**2 / 2`: its gradient is w, as of `weight_decay=1` in SGD.

    Args:
        parameters: (...), or several such tensors, on one device.

    Returns:
        (), in float32 or the parameters' dtype, whichever is more exact.

    Raises:
        TypeError: if a parameter is not floating.
        ValueError: if there is none.
    """
    return _total("l2_penalty", parameters)


def _total(name: str, parameters: Tensor | Iterable[Tensor]) -> Tensor:
    tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not tensors:
        raise ValueError(f"{name}: parameters must be a tensor or several, got none")
    dtype = functools.reduce(torch.promote_types, (w.dtype for w in tensors), torch.float32)
    total = torch.zeros((), dtype=dtype, device=tensors[0].device)
    for w in tensors:
        total = getattr(_penalty, name)(total, w)
    return total
