"""Losses that are the negative logarithm of a likelihood, or a divergence."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from bptools.functional._checks import broadcast, check_reduction, one_dtype, readable, shape_of
from bptools.ops import likelihood_loss as _likelihood


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Binary cross entropy of probabilities: `-target * log(input) - (1 - target) * log(1 - input)`.

    A logarithm is not let under -100. Of logits, `binary_cross_entropy_with_logits` is more exact.

    Args:
        input: (...), from 0 to 1.
        target: input's shape, from 0 to 1. Differentiable too.
        weight: broadcasts to input's shape, a factor for each element, or None for 1. Not differentiable.
        size_average: deprecated in torch, refused here; use `reduction`.
        reduce: deprecated in torch, refused here; use `reduction`.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Returns:
        (), or (...) without reduction.

    Raises:
        RuntimeError: under CUDA's autocast, as torch's: half precision cannot tell a probability from 1.
        TypeError: if the dtypes differ or are not floating, or weight requires a gradient.
        ValueError: if input or target is not from 0 to 1 (on the CPU), the shapes do not fit, `reduction` is none
            of the above, or a deprecated argument is given.
    """
    name = "binary_cross_entropy"
    check_reduction(name, reduction, size_average=size_average, reduce=reduce)
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        raise RuntimeError(f"{name}: input must be logits under autocast, for binary_cross_entropy_with_logits")
    _check_equal_shapes(name, input, target)
    _check_factor(name, "weight", weight, input)
    if weight is not None and weight.dtype != input.dtype:
        raise TypeError(f"{name}: weight must have input's dtype {input.dtype}, got {weight.dtype}")
    for argument, value in (("input", input), ("target", target)):
        if value.device.type == "cpu" and readable() and not ((value >= 0) & (value <= 1)).all():
            raise ValueError(f"{name}: {argument} must be from 0 to 1, got {value.min()} to {value.max()}")
    return _likelihood.binary_cross_entropy(input, target, weight, reduction)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Binary cross entropy of sigmoid(input), right for logits of any size.

    Args:
        input: logits, (...).
        target: input's shape, from 0 to 1. Differentiable too.
        weight: broadcasts to input's shape, a factor for each element, or None for 1. Not differentiable.
        size_average: deprecated in torch, refused here; use `reduction`.
        reduce: deprecated in torch, refused here; use `reduction`.
        reduction: `"none"`, `"mean"` or `"sum"`.
        pos_weight: broadcasts to input's shape, a factor for `target`'s share of the loss, or None for 1. Not
            differentiable.

    Returns:
        (), or (...) without reduction.

    Raises:
        TypeError: if a dtype is not floating, or a weight requires a gradient.
        ValueError: if the shapes do not fit, `reduction` is none of the above, or a deprecated argument is given.
    """
    name = "binary_cross_entropy_with_logits"
    check_reduction(name, reduction, size_average=size_average, reduce=reduce)
    _check_equal_shapes(name, input, target)
    _check_factor(name, "weight", weight, input)
    _check_factor(name, "pos_weight", pos_weight, input)
    return _likelihood.binary_cross_entropy_with_logits(*one_dtype(input, target, weight, pos_weight), reduction)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """Kullback-Leibler divergence of input from target: `target * (log(target) - input)`. Both are differentiable.

    Args:
        input: logarithms of probabilities, (N, ...).
        target: probabilities, or their logarithms if `log_target`; broadcasts with input.
        size_average: deprecated in torch, refused here; use `reduction`.
        reduce: deprecated in torch, refused here; use `reduction`.
        reduction: `"none"`, `"batchmean"` (the sum divided by N, the divergence as it is defined), `"sum"`, or
            `"mean"` over all elements, with a warning.
        log_target: whether target holds logarithms: `exp(target) * (target - input)`.

    Returns:
        (), or (N, ...) without reduction.

    Raises:
        TypeError: if a dtype is not real, or none is floating.
        ValueError: if the shapes do not fit, `reduction` is none of the above, or a deprecated argument is given.
    """
    if reduction != "batchmean" or size_average is not None or reduce is not None:
        check_reduction("kl_div", reduction, size_average=size_average, reduce=reduce)
    if reduction == "mean":
        warnings.warn(
            "kl_div: reduction='mean' divides by the number of all elements; 'batchmean', which divides by that "
            "of samples, is the divergence as it is defined",
            stacklevel=2,
        )
    x, target = broadcast("kl_div", input=input, target=target)
    if reduction == "batchmean" and x.shape[:1] != input.shape[:1]:
        raise ValueError(f"kl_div: input must have all {x.shape[0]} samples of target, got {shape_of(input)}")
    return _likelihood.kl_div(*one_dtype(x, target), log_target, reduction)


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """Negative log likelihood of target under a normal distribution: `(log(var) + (input - target)**2 / var) / 2`.

    Args:
        input: means, (..., d).
        target: broadcasts with input. Differentiable too.
        var: variances, at least 0: input's shape, or that with one dimension of size 1, or without the last one;
            or a number. Differentiable too.
        full: whether to add the constant `log(2 * pi) / 2`.
        eps: var is taken for this, positive, where it is smaller; the gradient is not stopped there.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Returns:
        (), or (..., d) without reduction.

    Raises:
        TypeError: if an argument is not real, or none is floating.
        ValueError: if var is negative somewhere, the shapes do not fit, or `reduction` is none of the above.
    """
    name = "gaussian_nll_loss"
    check_reduction(name, reduction)
    if not isinstance(var, Tensor):
        var = torch.full_like(input, var)
    if readable() and var.device.type != "meta" and (var < 0).any():
        raise ValueError(f"{name}: var must not be negative, got {var.min()}")
    if var.shape != input.shape:
        differ = [n for n, m in zip(var.shape, input.shape, strict=False) if n != m]
        if var.shape == input.shape[:-1]:
            var = var.unsqueeze(-1)
        elif var.dim() != input.dim() or differ != [1]:
            raise ValueError(
                f"{name}: var must have input's shape {shape_of(input)}, or that with one dimension of size 1, or "
                f"without the last one, got {shape_of(var)}"
            )
    broadcast(name, input=input, target=target)
    return _likelihood.gaussian_nll_loss(*one_dtype(input, target, var), full, float(eps), reduction)


def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Negative log likelihood of target under a Poisson distribution: `exp(input) - target * input`.

    Args:
        input: logarithms of rates, or rates, (...).
        target: counts; broadcasts with input. Differentiable too.
        log_input: whether input holds logarithms; if not, the loss is `input - target * log(input + eps)`.
        full: whether to add Stirling's approximation of `log(target!)`, where target is larger than 1.
        size_average: deprecated in torch, refused here; use `reduction`.
        eps: keeps the logarithm of a rate finite.
        reduce: deprecated in torch, refused here; use `reduction`.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Returns:
        (), or (...) without reduction.

    Raises:
        TypeError: if an argument is not real, or none is floating.
        ValueError: if the shapes do not fit, `reduction` is none of the above, or a deprecated argument is given.
    """
    check_reduction("poisson_nll_loss", reduction, size_average=size_average, reduce=reduce)
    x, target = one_dtype(*broadcast("poisson_nll_loss", input=input, target=target))
    return _likelihood.poisson_nll_loss(x, target, log_input, full, float(eps), reduction)


def _check_equal_shapes(name: str, input: Tensor, target: Tensor) -> None:
    if target.shape != input.shape:
        raise ValueError(f"{name}: target must have input's shape {shape_of(input)}, got {shape_of(target)}")


def _check_factor(name: str, argument: str, factor: Tensor | None, input: Tensor) -> None:
    """A weight must broadcast to input's shape."""
    if factor is None:
        return
    pairs = zip(reversed(factor.shape), reversed(input.shape), strict=False)
    if factor.dim() > input.dim() or any(n not in (1, m) for n, m in pairs):
        raise ValueError(
            f"{name}: {argument} must broadcast to input's shape {shape_of(input)}, got {shape_of(factor)}"
        )
