"""What the functions check and default alike."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bptools.ops._core import HALF, fit, outside_transforms, refusal
from bptools.ops._reduction import REDUCTIONS


def shape_of(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def per_dimension(name: str, argument: str, value: int | Sequence[int], dims: int, least: int) -> tuple[int, ...]:
    """One number for each of `dims` dimensions, from one for all or a sequence of them."""
    if type(value) is int and value >= least:
        return (value,) * dims
    numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(numbers) == 1:
        numbers *= dims
    if len(numbers) != dims or not all(is_int(n) and n >= least for n in numbers):
        them = f", or {dims} of them" if dims > 1 else ""
        raise ValueError(f"{name}: {argument} must be an int of at least {least}{them}, got {value!r}")
    return numbers


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_parameter_dtypes(name: str, input: Tensor, **parameters: Tensor | None) -> None:
    """A norm's parameters have the dtype of input, or float32 beside an input in half precision."""
    allowed = (input.dtype, torch.float32) if input.dtype in HALF else (input.dtype,)
    for argument, value in parameters.items():
        if value is not None and value.dtype not in allowed:
            raise TypeError(
                f"{name}: {argument} must have dtype {' or '.join(map(str, allowed))}, got {value.dtype}"
            )


def check_reduction(name: str, reduction: str, **deprecated: bool | None) -> None:
    for argument, value in deprecated.items():
        if value is not None:
            raise ValueError(f"{name}: {argument} is deprecated, use reduction instead; got {argument}={value!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")


def broadcast(name: str, **tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, expanded to the shape of all of them."""
    (first, shape), *rest = ((word, shape_of(t)) for word, t in tensors.items())
    try:
        torch.broadcast_shapes(*(t.shape for t in tensors.values()))
    except RuntimeError:
        others, got = " and ".join(w for w, _ in rest), ", ".join(str(s) for _, s in rest)
        raise ValueError(f"{name}: {others} must broadcast with {first}'s shape {shape}, got {got}") from None
    return torch.broadcast_tensors(*tensors.values())


def one_dtype(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype to which torch promotes them all."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors if t is not None))
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def check_probability(name: str, argument: str, p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"{name}: {argument} must be between 0 and 1, got {p}")


def check_input(name: str, input: Tensor, argument: str = "input") -> None:
    """What an op would say of its input, for functions that look at it before they call one."""
    if not fit(input):
        raise refusal(name, argument, input)


def check_dim(name: str, input: Tensor, dim: int) -> None:
    if not is_int(dim):
        raise TypeError(f"{name}: dim must be an int, got {dim!r}")
    dims = max(input.dim(), 1)
    if not -dims <= dim < dims:
        raise ValueError(f"{name}: dim must be from {-dims} to {dims - 1} for input {shape_of(input)}, got {dim}")


def rounded(value: float, dtype: torch.dtype) -> float:
    """A number as half precision holds it; for wider dtypes as it is."""
    if dtype not in HALF or not math.isfinite(value):
        return value
    fraction, exponent = math.frexp(value)
    digits = 8 if dtype is torch.bfloat16 else min(11, exponent + 24)  # float16 has fewer near 0
    return math.ldexp(round(math.ldexp(fraction, digits)), exponent - digits)


def readable() -> bool:
    """Whether numbers can be looked at: a compiler and a transform have none."""
    return not torch.compiler.is_compiling() and outside_transforms()


def check_power(name: str, p: float) -> None:
    if not p >= 0:
        raise ValueError(f"{name}: p must be at least 0, got {p}")


def each_once(f: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """f of each. Where they are one tensor the results are one, too: it shows that they are projected together."""
    q = f(query)
    k = q if key is query else f(key)
    return q, k, k if value is key else f(value)
