"""Initialisation: the gain of every activation. All else here is torch.nn.init's.

A layer of weights with standard deviation gain / √fan_in turns numbers f(z) into pre-activations with variance
gain² E[f(z)²]. These have variance 1, as z had, and so has the next layer's, for

    gain = 1 / √E[f(z)²],    z normal, of mean 0 and variance 1

    torch.nn.init.normal_(layer.weight, std=gain("gelu") / math.sqrt(layer.in_features))

For a gated product f(gate) up, up is a second such z, independent: E[f(gate)² up²] = E[f(gate)²].

Where this is not torch.nn.init.calculate_gain: tanh (1.5925; 5/3 there, a number of older practice, with which the
variance settles above 1), sigmoid (1.8462; 1 there, with which the variance drops to 0.29 at once), selu (1, for
which it was made; 3/4 there, on purpose smaller). calculate_gain knows no other activation than these, relu and
leaky_relu, where the two agree.

A variance of 1 stays 1. One that is a little off, as it always is, returns to 1 where E[f(z)²] grows slower than
the variance of z: tanh, sigmoid, softplus, selu, elu and the like. With relu and its kin it stays as it is. With
gelu, silu, mish, hardswish, the shrinks and all gated products it goes on, farther with each layer: deep stacks of
these want a norm, whatever the gain.

Sources: Glorot and Bengio 2010; He et al., arXiv 1502.01852; Schoenholz et al., arXiv 1611.01232 (what is stable).
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bptools import functional
from bptools.nn import activation as _activation


def __getattr__(name: str) -> Any:
    """`bptools.nn.init.xavier_uniform_` and the like are torch's."""
    return getattr(torch.nn.init, name)


def _leaky(z: Tensor, square: float) -> Tensor:
    """leaky_relu at a slope of this square, for slopes of which E[f(z)²] needs no more than the mean square."""
    return functional.leaky_relu(z, math.sqrt(square))


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "relu": functional.relu,
    "leaky_relu": functional.leaky_relu,
    "relu6": functional.relu6,
    "sigmoid": functional.sigmoid,
    "logsigmoid": functional.logsigmoid,
    "hardsigmoid": functional.hardsigmoid,
    "tanh": functional.tanh,
    "hardtanh": functional.hardtanh,
    "tanhshrink": functional.tanhshrink,
    "softsign": functional.softsign,
    "softplus": functional.softplus,
    "elu": functional.elu,
    "selu": functional.selu,
    "celu": functional.celu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "mish": functional.mish,
    "hardswish": functional.hardswish,
    "threshold": functional.threshold,
    "hardshrink": functional.hardshrink,
    "softshrink": functional.softshrink,
    "linear": lambda z: z,
    "prelu": lambda z, weight=0.25: _leaky(z, float(torch.as_tensor(weight).double().square().mean())),
    "rrelu": lambda z, lower=1 / 8, upper=1 / 3: _leaky(z, (lower * lower + lower * upper + upper * upper) / 3),
    "glu": functional.sigmoid,
    "swiglu": functional.silu,
    "geglu": functional.gelu,
    "reglu": functional.relu,
}
# Modules that are not run on numbers as they are: the name that stands for each, and the attributes it takes.
_MODULES: dict[type[torch.nn.Module], tuple[str, ...]] = {
    torch.nn.PReLU: ("prelu", "weight"),
    torch.nn.RReLU: ("rrelu", "lower", "upper"),
    torch.nn.GLU: ("glu",),
    _activation.SwiGLU: ("swiglu",),
    _activation.GEGLU: ("geglu", "approximate"),
    _activation.ReGLU: ("reglu",),
}


def gain(activation: str | torch.nn.Module, **parameters: Any) -> float:
    """What the standard deviation of the weights behind an activation is to be, times √fan_in.

    Args:
        activation: the name of an activation or gated product in bptools.functional, or `"linear"`; or a module of
            bptools or torch, or any that acts on each number by itself, which is run as in evaluation.
        **parameters: of the function of that name, such as `negative_slope=0.2`.

    Returns:
        1 / √E[f(z)²], to about five digits, by quadrature.

    Raises:
        ValueError: if the name is not known, or the module does not act on each number by itself.
        TypeError: if parameters are given for a module, or the function has none of that name.

    Example:
        >>> round(gain("relu"), 6)
        1.414214
    """
    function = _resolve(activation, parameters)
    n, end = 2**18, 12.0  # fine enough for the jump of a hardshrink; beyond 12 the density is below 1e-31
    z = (torch.arange(n, dtype=torch.float64) + 0.5) * (2 * end / n) - end
    with torch.no_grad():
        y = function(z.clone())  # it may write to what it is given
        if y.shape != z.shape or not torch.allclose(function(z[1::2].clone()), y[1::2]):
            raise ValueError(f"gain: activation must act on each number by itself, got {activation!r}")
    density = torch.exp(-0.5 * z * z)
    return math.sqrt(density.sum() / (density * y * y).sum())


def _resolve(activation: str | torch.nn.Module, parameters: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """The function of one tensor."""
    if isinstance(activation, torch.nn.Module):
        if parameters:
            raise TypeError(f"gain: parameters must come with a name, got {', '.join(parameters)} with a module")
        for kind, (name, *attributes) in _MODULES.items():
            if isinstance(activation, kind):
                return _resolve(name, {a: getattr(activation, a) for a in attributes})
        return copy.deepcopy(activation).double().eval()
    if activation not in _FUNCTIONS:
        raise ValueError(f"gain: activation must be one of {', '.join(_FUNCTIONS)}, got {activation!r}")
    return functools.partial(_FUNCTIONS[activation], **parameters)
