"""Norms of weights and gradients, which may be spread over processes: clipping, and how far a step went."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from bptools.optim import clip_grad_adaptive_


def number(scalar: Tensor) -> float:
    """Return the value of a scalar; every process must ask for it."""
    return float(scalar.full_tensor() if isinstance(scalar, DTensor) else scalar)


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float, by: str, norm: Tensor) -> float:
    """Clip the gradients of ``parameters`` in place and return which share of them.

    Args:
        parameters: Those that have a gradient.
        limit: The largest norm of all, absolute value of an element, or norm of a unit's gradient as a part of its
            weights' norm.
        by: ``"norm"``, ``"value"`` or ``"adaptive"``.
        norm: Norm of the gradient before.
    """
    if by == "adaptive":
        return number(clip_grad_adaptive_(parameters, limit))
    if by == "value":
        over = sum(number((p.grad.abs() > limit).sum()) for p in parameters)
        clip_grad_value_(parameters, limit)
        return over / max(1, sum(p.numel() for p in parameters))
    over = number(norm) > limit
    if over:
        clip_grads_with_norm_(parameters, limit, norm)
    return float(over)


class Movement:
    """The weights before a step, to tell how far it goes.

    Args:
        optimizer: Whose trainable parameters are copied.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._weights = [[p.detach() for p in g["params"] if p.requires_grad] for g in optimizer.param_groups]
        self._before = [[w.clone() for w in group] for group in self._weights]

    def ratios(self) -> tuple[float, ...]:
        """Return for each parameter group the norm of the update over that of the weights, 0 if that is 0."""
        return tuple(map(_ratio, self._weights, self._before))


def _ratio(weights: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    norm = number(get_total_norm(before))
    return number(get_total_norm(torch._foreach_sub(weights, before))) / norm if norm else 0.0
