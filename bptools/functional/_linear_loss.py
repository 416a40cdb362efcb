"""A linear layer and its loss in one."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from bptools.functional._checks import check_reduction, shape_of
from bptools.ops import linear_cross_entropy as _ops

NAME = "linear_cross_entropy"


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    return_argmax: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of the logits `linear(input, linear_weight, linear_bias)`, which are never all in memory.

    The function of torch 2.15, with two arguments more. Chunks are the rule here, and the options of a chunk are
    not needed. Where the losses are averaged or summed, and something requires a gradient, the gradients are
    computed in the forward: call it under `torch.no_grad()` where no backward follows.

    Args:
        input: (N, in) or (in,).
        linear_weight: (C, in) for C classes, or (C, d_1, ..., d_K, in) for d_1 × ... × d_K losses a row.
        target: class indices, (N, d_1, ..., d_K) or (), int64 or uint8; or class probabilities, floating, of the
            logits' shape (N, C, d_1, ..., d_K) or (C,), which may require gradients.
        linear_bias: (C, d_1, ..., d_K) or None.
        weight: (C,), a weight for each class, or None for 1. With class indices the mean is weighted too.
        reduction: `"none"`, `"mean"` or `"sum"`.
        ignore_index: a class index that does not count, neither in the loss nor in the mean; -100 if None.
        label_smoothing: from 0 to 1, the share of each target that is spread evenly over the classes.
        options: None, or torch's LinearCrossEntropyOptions, of which `batch_chunk_size` is followed: how many rows
            of input are taken at a time. The others say how torch's own chunks are computed.
        z_loss: what is added to each loss: this times the squared logarithm of Σ exp(logits).
        return_argmax: whether to return the classes of the largest logits too.

    Returns:
        (), or (N, d_1, ..., d_K) or () without reduction. The mean over no row is nan, as torch's. With
        `return_argmax` a pair of it and of the classes, (N, d_1, ..., d_K) or (), int64.

    Raises:
        IndexError: if target holds an index that is no class. On a GPU the device reports it, later.
        TypeError: if the dtypes do not fit, or weight requires a gradient with class indices.
        ValueError: if the shapes do not fit, `reduction` or `label_smoothing` is none of the above, or
            `ignore_index` is given with class probabilities.
    """
    check_reduction(NAME, reduction)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{NAME}: label_smoothing must be from 0 to 1, got {label_smoothing}")
    if linear_weight.dim() < 2 or linear_weight.shape[0] == 0:
        raise ValueError(
            f"{NAME}: linear_weight must have shape (C, ..., in) with C > 0, got {shape_of(linear_weight)}"
        )
    classes, *places, features = linear_weight.shape
    if input.dim() not in ((2,) if places else (1, 2)) or input.shape[-1] != features:
        vector = "" if places else f" or ({features},)"
        raise ValueError(f"{NAME}: input must have shape (N, {features}){vector}, got {shape_of(input)}")
    for name, value, shape in (
        ("linear_bias", linear_bias, (classes, *places)),
        ("weight", weight, (classes,)),
    ):
        if value is not None and shape_of(value) != shape:
            raise ValueError(f"{NAME}: {name} must have shape {shape}, got {shape_of(value)}")
    rows = shape_of(input)[:-1]
    logits = (*rows, classes, *places)
    soft = shape_of(target) == logits
    if not soft and shape_of(target) != (*rows, *places):
        raise ValueError(
            f"{NAME}: target must have shape {(*rows, *places)} for class indices or {logits} for probabilities, "
            f"got {shape_of(target)}"
        )
    if soft and not target.is_floating_point():
        raise TypeError(f"{NAME}: target of the logits' shape must hold probabilities, got {target.dtype}")
    if not soft and target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"{NAME}: target must hold class indices, int64 or uint8, got {target.dtype}")
    if soft and ignore_index is not None:
        raise ValueError(f"{NAME}: ignore_index is for class indices, got {ignore_index} and probabilities")

    device = input.device.type
    autocasting = device != "meta" and torch.is_autocast_enabled(device)
    if autocasting:  # the linear layer is computed in the lower dtype, the loss in float32
        input, linear_weight, linear_bias = (_lowered(t, device) for t in (input, linear_weight, linear_bias))
    for name, value in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if value is not None and value.dtype is not input.dtype:
            raise TypeError(f"{NAME}: {name} must have input's dtype {input.dtype}, got {value.dtype}")
    dtype = torch.promote_types(input.dtype, torch.float32) if autocasting else input.dtype
    if soft:
        floats = [t.dtype for t in (target, weight) if t is not None]
        dtype = functools.reduce(torch.promote_types, floats, dtype)
    elif weight is not None and weight.dtype is not dtype and not autocasting:
        raise TypeError(f"{NAME}: weight must have input's dtype {input.dtype}, got {weight.dtype}")
    elif weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise TypeError(f"{NAME}: weight has no gradient with class indices, and requires one")

    n, k = math.prod(rows), math.prod(places)
    w = linear_weight.reshape(classes, k, features).transpose(0, 1).contiguous()
    b = None if linear_bias is None else linear_bias.reshape(classes, k).mT
    indices = None if soft else target.reshape(n, k).long()
    probabilities = target.reshape(n, classes, k).mT if soft else None
    beside = [t for t in (probabilities, weight) if t is not None and t.requires_grad]
    ahead = []
    if reduction != "none" and torch.is_grad_enabled() and not beside:
        ahead = [
            name for name, t in (("x", input), ("weight", w), ("bias", b)) if t is not None and t.requires_grad
        ]
    try:
        loss, best, *_ = _ops.linear_cross_entropy(
            input.reshape(n, features),
            w,
            b,
            weight,
            probabilities,
            indices,
            -100 if ignore_index is None else ignore_index,
            float(label_smoothing),
            float(z_loss),
            reduction,
            getattr(options, "batch_chunk_size", None),
            return_argmax,
            " ".join(ahead),
            dtype,
        )
    except IndexError:
        raise IndexError(
            f"{NAME}: target must hold classes, 0 to {classes - 1}, or ignore_index {ignore_index}, "
            f"got {target.min()} to {target.max()}"
        ) from None
    if reduction == "none":
        loss = loss.reshape((*rows, *places))
    return (loss, best.reshape((*rows, *places))) if return_argmax else loss


def _lowered(t: Tensor | None, device: str) -> Tensor | None:
    """A tensor as autocast gives it to a linear layer."""
    return t if t is None or t.dtype is torch.float64 else t.to(torch.get_autocast_dtype(device))
