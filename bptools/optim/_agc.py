"""Adaptive gradient clipping: a gradient is clipped where it is large *beside its own weights*.

For each output unit i of a parameter W, with gradient G,

    Gᵢ ← Gᵢ · min(1, λ · max(‖Wᵢ‖, ε) / ‖Gᵢ‖)

so no unit's weights are asked to change by more than the part λ of their norm (times the learning rate), however
steep the loss. One threshold then suits layers of every scale, as the threshold of a global norm does not.

Source: Brock et al., High-Performance Large-Scale Image Recognition Without Normalization, arXiv 2102.06171,
section 4. They leave out the last linear layer: pass the parameters that are to be clipped.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def clip_grad_adaptive_(
    parameters: Tensor | Iterable[Tensor], clip_factor: float = 0.01, eps: float = 1e-3, norm_type: float = 2.0
) -> Tensor:
    """Clip gradients in place, each unit's by the norm of its weights.

    A unit is a row, or an output channel: what has one index of the first dimension. A parameter of one
    dimension, a bias or the weight of a norm, is one unit; so is a scalar.

    Args:
        parameters: their `grad`s are clipped; those without one are passed over.
        clip_factor: λ: the largest norm of a unit's gradient, as a part of the norm of its weights.
        eps: ε: the least that a unit's weights count, so that those that start from zero can move.
        norm_type: p of the p-norm.

    Returns:
        A scalar: the share of the units that were clipped, from 0 to 1.

    Raises:
        ValueError: if `clip_factor` or `eps` is not positive.
    """
    for name, value in (("clip_factor", clip_factor), ("eps", eps)):
        if not value > 0:
            raise ValueError(f"clip_grad_adaptive_: {name} must be positive, got {value}")
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    clipped, units = [], 0
    for p in parameters:
        if p.grad is None:
            continue
        limit = clip_factor * _unit_norms(p, norm_type).clamp(min=eps)
        norm = _unit_norms(p.grad, norm_type)
        over = norm > limit
        p.grad.mul_(torch.where(over, limit / norm, 1.0).to(p.grad.dtype))
        clipped.append(over.sum().to("cpu", torch.float32))
        units += over.numel()
    return torch.stack(clipped).sum() / max(units, 1) if clipped else torch.zeros(())


def _unit_norms(t: Tensor, norm_type: float) -> Tensor:
    """Norms of the units, in float32 at least, shaped to be multiplied with the tensor."""
    dtype = torch.promote_types(t.dtype, torch.float32)
    dims = tuple(range(1, t.dim())) if t.dim() > 1 else None
    return torch.linalg.vector_norm(t, norm_type, dims, keepdim=True, dtype=dtype)
