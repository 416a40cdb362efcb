"""Reparametrised weights: weight normalisation and spectral normalisation.

Index legend: `o` the slices of the weight along `dim`, `e` the elements of a slice.

**Weight normalisation** gives length and direction their own parameters, g and v:

    n[o] = √(Σ_e v[o,e]²)            w[o,e] = g[o] v[o,e] / n[o] = g[o] u[o,e],        u = v / n

    dg[o]   = Σ_e dw[o,e] u[o,e]
    dv[o,e] = g[o] / n[o] (dw[o,e] - u[o,e] dg[o])

for ∂u[e]/∂v[f] = ([e = f] - u[e] u[f]) / n: u does not change with the length of v, so the part of dw along u is
taken out. With dim = -1 all of v is one slice. v, g and n are kept.

**Spectral normalisation** divides a weight, read as a matrix (o × e), by an estimate of its largest singular
value, given unit vectors a and b that are near its singular vectors and taken for constants:

    σ = Σ_o,e a[o] w[o,e] b[e]            y = w / σ

    dw = (dy - S a bᵀ) / σ,            S = Σ_o,e dy[o,e] y[o,e]

since ∂σ/∂w = a bᵀ (for the true singular vectors also if they are not held constant: ‖a‖ = ‖b‖ = 1 does not let
them move along themselves, and across, σ has its maximum). w, a, b and σ are kept.

Sources: Salimans and Kingma, "Weight normalization", arXiv 1602.07868; Miyato et al., "Spectral normalization for
generative adversarial networks", arXiv 1802.05957.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op

aten = torch.ops.aten


def weight_norm_lengths(v: Tensor, dim: int) -> Tensor:
    """v (o, ...) -> n (o, 1, ...), o being the dimension dim; () for all of v."""
    others = _others(v, dim)
    return torch.linalg.vector_norm(v, 2, others, keepdim=len(others) < v.dim()) if others else v.abs()


def weight_norm_forward(v: Tensor, g: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """v (o, ...), g (o, 1, ...), o being the dimension dim -> w (o, ...), n (o, 1, ...)."""
    n = weight_norm_lengths(v, dim)
    return v * (g / n), n


def weight_norm_backward(
    dw: Tensor, v: Tensor, g: Tensor, n: Tensor, dim: int, needs=EVERY
) -> tuple[Tensor | None, Tensor | None]:
    """dw, v (o, ...), g and n (o, 1, ...) -> dv (o, ...), dg (o, 1, ...)."""
    u = v / n
    others = _others(v, dim)
    dg = (dw * u).sum(others, keepdim=len(others) < v.dim()) if others else dw * u
    dv = g / n * (dw - u * dg) if "v" in needs else None
    return dv, dg if "g" in needs else None


def _others(v: Tensor, dim: int) -> tuple[int, ...]:
    return tuple(d for d in range(v.dim()) if d != dim)


def _kernel_backward(dw, v, g, n, dim, needs):
    dv, dg = aten._weight_norm_interface_backward(dw.contiguous(), v, g, n, dim)
    return dv if "v" in needs else None, dg if "g" in needs else None


def _kernel_usable(v, g, dim):
    """The kernel takes the first or the last dimension, without gaps."""
    plain = v.is_contiguous() and g.is_contiguous() and v.numel() > 0
    return dim in (0, v.dim() - 1) and v.dim() > 1 and plain


def spectral_norm_sigma(w: Tensor, a: Tensor, b: Tensor, dim: int) -> Tensor:
    """w (o, ...), o being the dimension dim, a (o,), b (e,) -> sigma ()."""
    return a @ (w.movedim(dim, 0).flatten(1) @ b)


def spectral_norm_forward(w: Tensor, a: Tensor, b: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """w (o, ...), o being the dimension dim, a (o,), b (e,) -> y (o, ...), sigma ()."""
    sigma = spectral_norm_sigma(w, a, b, dim)
    return w / sigma, sigma


def spectral_norm_backward(
    dy: Tensor, w: Tensor, a: Tensor, b: Tensor, sigma: Tensor, dim: int, needs=EVERY
) -> tuple[Tensor]:
    """dy, w (o, ...), a (o,), b (e,), sigma () -> dw (o, ...)."""
    matrix = w.movedim(dim, 0)
    slope = torch.outer(a, b).reshape(matrix.shape).movedim(0, dim)
    return ((dy - (dy * w).sum() / sigma * slope) / sigma,)


weight_norm = Op(
    weight_norm_forward,
    weight_norm_backward,
    outputs="w n",
    grads="v g",
    residuals=weight_norm_lengths,
    kernel=Kernel(aten._weight_norm_interface, _kernel_backward, _kernel_usable),
)

spectral_norm = Op(
    spectral_norm_forward,
    spectral_norm_backward,
    outputs="y sigma",
    grads="w",
    residuals=spectral_norm_sigma,
)
