"""Stepping within the backward pass: no two gradients need be there at once.

Ordinarily the backward pass leaves the gradient of every parameter, and the optimizer then takes them all: at its
end there are as many bytes of gradients as of parameters. But an update of w needs w's gradient alone. A hook on
each parameter steps as soon as its gradient is whole, and frees it.

Source: Lv et al., Full Parameter Fine-tuning for Large Language Models with Limited Resources, arXiv 2306.09782.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bptools.optim._lamb import Lamb


class StepInBackward:
    """Have an optimizer step each parameter in the backward pass, as its gradient arrives, and free the gradient.

    The steps are the very ones that `optimizer.step()` would take after the backward pass::

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        with StepInBackward(optimizer):
            for x, y in batches:
                loss_fn(model(x), y).backward()  # and that was the step

    The optimizer stays what it was: its `state_dict` and its groups' options are read and written as ever, so
    schedules of the learning rate work as they do. What needs all gradients at once cannot be had along: clipping
    by their norm, accumulating over several backward passes, and a `GradScaler`, which may want to skip the step.
    A parameter that is used several times is stepped once, with the sum. What is read again in the same backward
    pass after it was stepped, by a second graph or a recomputation, would be read changed: autograd refuses that.

    Args:
        optimizer: whose steps treat each parameter by itself, as all of torch.optim's do but LBFGS.

    Raises:
        ValueError: if the optimizer looks at all gradients together: LBFGS, or `Lamb` with `max_grad_norm`.
        RuntimeError: in the backward pass, if a parameter has a gradient already.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("StepInBackward: optimizer must treat each parameter by itself, got LBFGS")
        if isinstance(optimizer, Lamb) and optimizer.param_groups[0]["max_grad_norm"] is not None:
            raise ValueError("StepInBackward: Lamb must have max_grad_norm=None, it needs all gradients at once")
        self.optimizer = optimizer
        self._groups: dict[Tensor, dict[str, Any]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> StepInBackward:
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                self._groups[p] = group
                if p.grad is not None:
                    self.__exit__()
                    raise RuntimeError(
                        "StepInBackward: parameters must have no gradient at the start, got one of shape "
                        f"{tuple(p.shape)}; call optimizer.zero_grad()"
                    )
                if p.requires_grad:
                    self._hooks.append(p.register_post_accumulate_grad_hook(self._step))
        return self

    def __exit__(self, *exc: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def _step(self, p: Tensor) -> None:
        # An optimizer of this parameter alone, made without its constructor: it shares the state of all.
        single = object.__new__(type(self.optimizer))
        single.__dict__.update(self.optimizer.__dict__, param_groups=[{**self._groups[p], "params": [p]}])
        type(self.optimizer).step(single)
        self.optimizer._opt_called = True  # for schedules of the learning rate, which ask for it
        p.grad = None
