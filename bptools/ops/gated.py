"""Gated products: one half of the features decides how much of the other half passes.

    y = f(gate) up        dgate = dy up f'(gate)        dup = dy f(gate)

    glu       f = σ                  swiglu    f = silu, g σ(g)
    reglu     f = relu               geglu     f = gelu, g Φ(g)

f and f' are those of activation.py. The two inputs are kept, and nothing else: f(gate) is computed again in the
backward, where autograd would have kept it as a third tensor. If only one of the two learns, dup reads the gate
alone, so up is not kept for it.

glu takes both from one tensor, x = (up, gate), two halves of a dimension, as torch does.

Sources: Dauphin et al., arXiv 1612.08083 (glu); Shazeer, arXiv 2002.05202 (the others).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op
from bptools.ops.activation import (
    gelu_backward,
    gelu_forward,
    pointwise,
    silu_backward,
    silu_forward,
)

aten = torch.ops.aten

product = functools.partial(Op, outputs="y", grads="gate up", keep_for={"up": "gate"})


def glu_forward(x: Tensor, dim: int) -> Tensor:
    """x (..., 2d, ...) -> y (..., d, ...)."""
    up, gate = x.chunk(2, dim)
    return up * torch.sigmoid(gate)


def glu_backward(dy: Tensor, x: Tensor, dim: int, needs=EVERY) -> tuple[Tensor]:
    """dy (..., d, ...), x (..., 2d, ...) -> dx (..., 2d, ...)."""
    up, gate = x.chunk(2, dim)
    s = torch.sigmoid(gate)
    return (torch.cat([dy * s, dy * up * (s * (1 - s))], dim),)


glu = pointwise(
    glu_forward,
    glu_backward,
    kernel=Kernel(aten.glu, lambda dy, x, dim, needs: (aten.glu_backward(dy, x, dim),)),
)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (...) -> y (...)."""
    return silu_forward(gate) * up


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor, needs=EVERY) -> tuple[Tensor | None, ...]:
    """dy, gate, up (...) -> dgate, dup (...)."""
    dgate = silu_backward(dy * up, gate)[0] if "gate" in needs else None
    return dgate, (dy * silu_forward(gate) if "up" in needs else None)


def _swiglu_kernel_backward(dy, gate, up, needs):
    dgate = aten.silu_backward(dy * up, gate) if "gate" in needs else None
    return dgate, (dy * aten.silu(gate) if "up" in needs else None)


swiglu = product(
    swiglu_forward,
    swiglu_backward,
    kernel=Kernel(lambda gate, up: aten.silu(gate) * up, _swiglu_kernel_backward),
)


def geglu_forward(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    """gate, up (...), approximate "none" or "tanh" -> y (...)."""
    return gelu_forward(gate, approximate) * up


def geglu_backward(
    dy: Tensor, gate: Tensor, up: Tensor, approximate: str, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy, gate, up (...) -> dgate, dup (...)."""
    dgate = gelu_backward(dy * up, gate, approximate)[0] if "gate" in needs else None
    return dgate, (dy * gelu_forward(gate, approximate) if "up" in needs else None)


def _geglu_kernel_backward(dy, gate, up, approximate, needs):
    dgate = aten.gelu_backward(dy * up, gate, approximate=approximate) if "gate" in needs else None
    return dgate, (dy * aten.gelu(gate, approximate=approximate) if "up" in needs else None)


geglu = product(
    geglu_forward,
    geglu_backward,
    kernel=Kernel(
        lambda gate, up, approximate: aten.gelu(gate, approximate=approximate) * up, _geglu_kernel_backward
    ),
)


def reglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (...) -> y (...)."""
    return gate.clamp_min(0) * up


def reglu_backward(dy: Tensor, gate: Tensor, up: Tensor, needs=EVERY) -> tuple[Tensor | None, ...]:
    """dy, gate, up (...) -> dgate, dup (...)."""
    dgate = torch.where(gate <= 0, 0, dy * up) if "gate" in needs else None
    return dgate, (dy * gate.clamp_min(0) if "up" in needs else None)


# In the input's own precision, as torch: one product has no sum to be careful with.
reglu = product(reglu_forward, reglu_backward, kernel=Kernel(reglu_forward, reglu_backward))
