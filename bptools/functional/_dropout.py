"""Dropout, of elements, of channels and of samples."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from bptools.functional._checks import check_input, check_probability, shape_of
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
    return _drop("dropout", input, p, training, inplace)


def dropout1d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zero each channel of input (n, c, l) or (c, l) with probability p, multiply the others by 1 / (1 - p).

    Draws the numbers that torch draws on the CPU, and keeps one byte a channel for backward. The arguments are
    those of `dropout`.

    Raises:
        ValueError: if p is not between 0 and 1, or input is of another shape.
    """
    check_probability("dropout1d", "p", p)
    if input.dim() not in (2, 3):
        raise ValueError(f"dropout1d: input must have shape (n, c, l) or (c, l), got {shape_of(input)}")
    return _drop("dropout1d", input, p, training, inplace, input.dim() - 1)


def dropout2d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zero each channel of input (n, c, h, w) with probability p, multiply the others by 1 / (1 - p).

    As `dropout1d`, but that the first two dimensions are always n and c, as torch has it; other than four
    dimensions warn.

    Raises:
        ValueError: if p is not between 0 and 1, or input has less than two dimensions.
    """
    check_probability("dropout2d", "p", p)
    if input.dim() != 4:
        warnings.warn(
            f"dropout2d: input should have shape (n, c, h, w), got {shape_of(input)}; "
            "its first two dimensions are taken for n and c",
            stacklevel=2,
        )
    return _drop("dropout2d", input, p, training, inplace, 2)


def dropout3d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zero each channel of input (n, c, d, h, w) or (c, d, h, w) with probability p, and scale the others.

    As `dropout1d`; other numbers of dimensions warn, and their first is taken for c.

    Raises:
        ValueError: if p is not between 0 and 1, or input has no dimension.
    """
    check_probability("dropout3d", "p", p)
    if input.dim() not in (4, 5):
        warnings.warn(
            f"dropout3d: input should have shape (n, c, d, h, w) or (c, d, h, w), got {shape_of(input)}; "
            "its first dimension is taken for c",
            stacklevel=2,
        )
    return _drop("dropout3d", input, p, training, inplace, 2 if input.dim() == 5 else 1)


def alpha_dropout(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
    """Dropout for `selu`: mean 0 and variance 1 stay. What is dropped becomes selu's lowest number.

    Draws the numbers that torch draws on the CPU, and keeps one byte an element for backward.

    Args:
        input: (...), of mean 0 and variance 1.
        p: the probability of being dropped, from 0 to 1; with 1 all is zero.
        training: if False, input is returned as it is.
        inplace: write the result over input.

    Raises:
        ValueError: if p is not between 0 and 1.
    """
    check_probability("alpha_dropout", "p", p)
    return _drop("alpha_dropout", input, p, training, inplace)


def feature_alpha_dropout(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
    """`alpha_dropout` of whole channels of input (n, c, ...). Keeps one byte a channel for backward.

    Raises:
        ValueError: if p is not between 0 and 1, or input has less than two dimensions.
    """
    check_probability("feature_alpha_dropout", "p", p)
    return _drop("feature_alpha_dropout", input, p, training, inplace, 2)


def drop_path(input: Tensor, drop_prob: float = 0.0, training: bool = False, scale_by_keep: bool = True) -> Tensor:
    """Stochastic depth: zero whole samples of what is to be added to a residual stream. Torch lacks it.

    Name, arguments and random numbers are those of timm. Keeps one byte a sample for backward.

    Args:
        input: (n, ...).
        drop_prob: the probability of zero, from 0 to 1.
        training: if False, input is returned as it is.
        scale_by_keep: multiply the other samples by 1 / (1 - drop_prob), so that the mean stays.

    Raises:
        ValueError: if drop_prob is not between 0 and 1, or input has no dimension.
    """
    check_probability("drop_path", "drop_prob", drop_prob)
    return _drop("drop_path", input, drop_prob, training, False, 1, scale=scale_by_keep)


def stochastic_depth(input: Tensor, p: float, mode: str, training: bool = True) -> Tensor:
    """`drop_path` under torchvision's name, arguments and random numbers.

    Args:
        input: (n, ...).
        p: the probability of zero, from 0 to 1.
        mode: `"row"`: each sample is zeroed or not; `"batch"`: all of them together.
        training: if False, input is returned as it is.

    Raises:
        ValueError: if p is not between 0 and 1, or `mode` is neither, or input has no dimension.
    """
    check_probability("stochastic_depth", "p", p)
    if mode not in ("row", "batch"):
        raise ValueError(f"stochastic_depth: mode must be 'row' or 'batch', got {mode!r}")
    return _drop("stochastic_depth", input, p, training, False, 1 if mode == "row" else 0)


def _drop(
    name: str,
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    shared: int | None = None,
    scale: bool = True,
) -> Tensor:
    """Drop what the first `shared` dimensions number, or each element, if None."""
    if not training or p == 0 or input.numel() == 0:
        return input
    check_input(name, input)
    if shared is None:
        keep = torch.empty_like(input, dtype=torch.uint8)
    elif input.dim() < shared:
        raise ValueError(f"{name}: input must have at least {shared} dimensions, got {shape_of(input)}")
    else:
        shape = (*input.shape[:shared], *[1] * (input.dim() - shared))
        keep = torch.empty(shape, dtype=torch.uint8, device=input.device)
    keep = _dropout.draw(keep, p)
    op = _dropout.alpha_dropout if "alpha" in name and p < 1 else _dropout.dropout
    return op.inplace(input, keep, p if scale else 0) if inplace else op(input, keep, p if scale else 0)
