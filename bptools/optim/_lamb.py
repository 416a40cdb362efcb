"""LAMB: Adam's direction, with a step as long as the layer allows.

With Adam's bias-corrected moments m and v of the gradient g, each parameter w is moved against

    r = m / (√v + ε) + λ w          by        η · ‖w‖ / ‖r‖ · r

so the step is η times the parameter's own norm, whatever the gradient's scale: a layer of small weights is not
torn apart by a learning rate that suits a layer of large ones, which is what large batches need.

Source: You et al., Large Batch Optimization for Deep Learning, arXiv 1904.00962, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lamb(Optimizer):
    """Layer-wise adaptive moments for batch training.

    Args:
        params: parameters, or groups of them; a group may have every option below to itself.
        lr: η. A step is at most this part of a parameter's norm, beside what `weight_decay` 0 exempts.
        betas: decay of the averages of g and of g².
        eps: ε, added to √v.
        weight_decay: λ. A group with 0 (biases, norms) takes Adam's own step, unless `always_adapt`.
        max_grad_norm: the gradients of all groups together are first scaled down to this norm; None: they are not.
        bias_correction: whether m and v are divided by what their start from zero lacks.
        trust_clip: whether ‖w‖ / ‖r‖ is at most 1.
        always_adapt: whether groups without weight decay are scaled by ‖w‖ / ‖r‖ too.

    A parameter whose norm, or whose r, is zero takes the step with a ratio of 1.

    Raises:
        ValueError: if an option is out of its range.
        RuntimeError: at a step, if a gradient is sparse.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        max_grad_norm: float | None = 1.0,
        bias_correction: bool = True,
        trust_clip: bool = False,
        always_adapt: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            "bias_correction": bias_correction,
            "trust_clip": trust_clip,
            "always_adapt": always_adapt,
        }
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its options checked."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        limits = {group["max_grad_norm"] for group in self.param_groups}
        if len(limits) > 1:
            self.param_groups.pop()
            raise ValueError(f"Lamb: max_grad_norm must be the same in every group, got {limits}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss, as `Optimizer.step` takes it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        shrink = self._shrink()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for device in {p.device for p in params}:
                self._move(group, [p for p in params if p.device == device], shrink)
        return loss

    def _shrink(self) -> Tensor | None:
        """By what the gradients are to be multiplied; None for nothing."""
        limit = self.param_groups[0]["max_grad_norm"]
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(g.is_sparse for g in grads):
            raise RuntimeError("Lamb: gradients must be dense, got a sparse one")
        if limit is None or not grads:
            return None
        return (limit / torch.nn.utils.get_total_norm(grads)).clamp(max=1)

    def _move(self, group: dict[str, Any], params: list[Tensor], shrink: Tensor | None) -> None:
        beta1, beta2 = group["betas"]
        states = [self._state(p) for p in params]
        grads = [p.grad for p in params]
        if shrink is not None:
            grads = [g * shrink.to(g.device, g.dtype) for g in grads]
        m, v = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        for s in states:
            s["step"] += 1
        r = torch._foreach_sqrt(v)
        if group["bias_correction"]:
            steps = [int(s["step"]) for s in states]
            torch._foreach_div_(r, [(1 - beta2**n) ** 0.5 for n in steps])
            torch._foreach_add_(r, group["eps"])
            r = torch._foreach_div(torch._foreach_div(m, [1 - beta1**n for n in steps]), r)
        else:
            torch._foreach_add_(r, group["eps"])
            r = torch._foreach_div(m, r)
        if group["weight_decay"]:
            torch._foreach_add_(r, params, alpha=group["weight_decay"])
        if group["weight_decay"] or group["always_adapt"]:
            torch._foreach_mul_(r, self._ratios(group, params, r))
        lr = group["lr"]
        torch._foreach_mul_(r, lr if not isinstance(lr, Tensor) else lr.to(params[0].device))
        torch._foreach_sub_(params, r)

    @staticmethod
    def _ratios(group: dict[str, Any], params: list[Tensor], r: list[Tensor]) -> list[Tensor]:
        ratios = torch._foreach_div(torch._foreach_norm(params), torch._foreach_norm(r))
        ratios = [torch.where((q > 0) & q.isfinite(), q, 1.0) for q in ratios]  # else one of the norms is zero
        return [q.clamp(max=1) for q in ratios] if group["trust_clip"] else ratios

    def _state(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state


def _check(options: dict[str, Any]) -> None:
    for name, low in (("lr", 0.0), ("eps", 0.0), ("weight_decay", 0.0), ("max_grad_norm", 0.0)):
        value = options[name]
        if value is not None and not float(value) >= low:
            raise ValueError(f"Lamb: {name} must be at least {low}, got {value}")
    if options["max_grad_norm"] == 0:
        raise ValueError("Lamb: max_grad_norm must be positive or None, got 0")
    if len(options["betas"]) != 2 or not all(0 <= beta < 1 for beta in options["betas"]):
        raise ValueError(f"Lamb: betas must be two numbers from 0 to below 1, got {options['betas']}")
