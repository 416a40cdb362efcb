"""A residual sum and its normalisation in one op: what stands between the blocks of a transformer.

Index legend: `n` rows, `d` features, as in layer_norm.py and rms_norm.py.

    h[n,d] = x[n,d] + r[n,d]                   y = layer_norm(h) w + b      or      y = rms_norm(h) w

Both are returned: y goes into the next block, and h past it, to the next sum. So h has two gradients, its own and
the one that comes back through the norm, and a sum hands what it gets to both of its terms:

    dx = dr = dh + (the norm's gradient of its input, for dy)

dw and db are the norm's. h and the statistics of its rows are kept; x and r, of its size each, are not.

Sources: Ba, Kiros and Hinton, arXiv 1607.06450; Zhang and Sennrich, arXiv 1910.07467.
"""

from __future__ import annotations

from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op
from bptools.ops.layer_norm import layer_norm, layer_norm_backward, layer_norm_forward, layer_norm_statistics
from bptools.ops.rms_norm import rms_norm_backward, rms_norm_forward, rms_norm_statistics


def add_layer_norm_statistics(h: Tensor, dims: int, eps: float) -> tuple[Tensor, Tensor]:
    """h (..., d) -> mean, rstd (..., 1): one 1 for each normalised dimension."""
    return layer_norm_statistics(h, dims, eps)


def add_layer_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float
) -> tuple[Tensor, ...]:
    """x, residual (..., d), weight, bias (d), which is `dims` dimensions -> y, mean, rstd (..., 1), h (..., d)."""
    h = x + residual
    return *layer_norm_forward(h, weight, bias, dims, eps), h


def add_layer_norm_backward(
    dy: Tensor,
    dh: Tensor,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dims: int,
    eps: float,
    needs=EVERY,
) -> tuple[Tensor | None, ...]:
    """dy, dh, h (..., d), weight (d), mean and rstd (..., 1) -> dx, dresidual (..., d), dw, db (d)."""
    dx, dw, db = layer_norm_backward(dy, h, weight, mean, rstd, dims, eps, _of_norm(needs))
    return *_shared(dx, dh, needs), dw, db


def _layer_norm_kernel_forward(x, residual, weight, bias, dims, eps):
    h = x + residual
    return *layer_norm.kernel.forward(h, weight, bias, dims, eps), h


def _layer_norm_kernel_backward(dy, dh, h, weight, mean, rstd, dims, eps, needs):
    dx, dw, db = layer_norm.kernel.backward(dy, h, weight, mean, rstd, dims, eps, _of_norm(needs))
    return *_shared(dx, dh, needs), dw, db


def add_rms_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, dims: int, eps: float
) -> tuple[Tensor, ...]:
    """x, residual (..., d), weight (d), which is `dims` dimensions -> y (..., d), rstd (..., 1), h (..., d)."""
    h = x + residual
    return *rms_norm_forward(h, weight, dims, eps), h


def add_rms_norm_statistics(h: Tensor, dims: int, eps: float) -> Tensor:
    """h (..., d) -> rstd (..., 1): one 1 for each normalised dimension."""
    return rms_norm_statistics(h, dims, eps)


def add_rms_norm_backward(
    dy: Tensor,
    dh: Tensor,
    h: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dims: int,
    eps: float,
    needs=EVERY,
) -> tuple[Tensor | None, ...]:
    """dy, dh, h (..., d), weight (d), rstd (..., 1) -> dx, dresidual (..., d), dw (d)."""
    dx, dw = rms_norm_backward(dy, h, weight, rstd, dims, eps, _of_norm(needs))
    return *_shared(dx, dh, needs), dw


def _of_norm(needs):
    """What is wanted of the norm's backward: its input is x + residual."""
    return needs if "residual" not in needs else {*(n for n in ("weight", "bias") if n in needs), "x"}


def _shared(dx: Tensor | None, dh: Tensor, needs) -> tuple[Tensor | None, Tensor | None]:
    """dx and dresidual: equal, but each with memory of its own, for who gets a gradient may write to it."""
    total = None if dx is None else dx + dh
    if "x" in needs and "residual" in needs:
        return total, total.clone()
    return total if "x" in needs else None, total if "residual" in needs else None


add_layer_norm = Op(
    add_layer_norm_forward,
    add_layer_norm_backward,
    outputs="y mean rstd h",
    grads="x residual weight bias",
    keep_for={
        "h": "x residual weight",
        "weight": "x residual",
        "mean": "x residual weight",
        "rstd": "x residual weight",
    },
    residuals=add_layer_norm_statistics,
    kernel=Kernel(_layer_norm_kernel_forward, _layer_norm_kernel_backward),
    autocast={"cuda": "float32"},
    mixed=True,
)

add_rms_norm = Op(
    add_rms_norm_forward,
    add_rms_norm_backward,
    outputs="y rstd h",
    grads="x residual weight",
    keep_for={"weight": "x residual"},
    residuals=add_rms_norm_statistics,
    # As rms_norm: ATen has no kernel on the CPU.
    fuses=lambda x, residual, weight, dims, eps: x.device.type == "cpu" and x.numel() >= 2**18,
    autocast={"cuda": "float32"},
    mixed=True,
)
