"""peft's LoRA layers: linear ones on the op that keeps its input alone, attention without writes to its weights.

Imported on first use, as it imports peft.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear, LoraLayer, MultiheadAttention
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

import bptools.nn
from bptools import functional

LINEAR = (nn.Linear, bptools.nn.Linear)
DROPOUT = (nn.Identity, nn.Dropout, bptools.nn.Dropout)


class Update(NamedTuple):
    """An adapter that is low-rank matrices and nothing else."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout: float


class FusedLinear(Linear):
    """`peft.tuners.lora.layer.Linear`, where one plain adapter is active; peft's own forward elsewhere."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer."""
        update = None if args or kwargs else self._update(x)
        if update is None:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        options = base.bias, update.scaling, update.dropout, self.training
        return functional.lora_linear(x, base.weight, update.a, update.b, *options)

    def _update(self, x: Tensor) -> Update | None:
        """The one active adapter, if it and the base are what the op computes."""
        base, active = self.base_layer, [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or self.fan_in_fan_out or len(active) != 1:
            return None
        (name,) = active
        a, b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        plain = type(base) in LINEAR and type(a) in LINEAR and type(b) in LINEAR and type(dropout) in DROPOUT
        if not plain or name in self.lora_variant or a.bias is not None or b.bias is not None:
            return None
        if any(_observed(module) for module in (base, a, b, dropout)):
            return None
        if not torch.is_autocast_enabled(x.device.type) and x.dtype is not base.weight.dtype:
            return None  # peft says what it says of this
        return Update(a.weight, b.weight, float(self.scaling[name]), getattr(dropout, "p", 0.0))


class FusedMultiheadAttention(MultiheadAttention):
    """`peft.tuners.lora.layer.MultiheadAttention`, which computes with the sum and leaves its parameters alone.

    peft's adds the update to the weights and takes it off again at each forward pass, so that frozen weights
    gather rounding errors, and makes new parameters whenever modules are listed, which no optimizer holds. The
    update of the output projection it adds twice (0.21), in merging too.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to the weights."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        base = self.get_base_layer()
        base.in_proj_weight.data = _updated(base.in_proj_weight, self, names).detach()
        base.out_proj.merge(safe_merge, names)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take the updates from the weights again, but for rounding."""
        base = self.get_base_layer()
        base.in_proj_weight.data = _updated(base.in_proj_weight, self, self.merged_adapters, -1).detach()
        base.out_proj.unmerge()
        self.merged_adapters.clear()

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Apply the layer."""
        base = self.get_base_layer()
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not active:
            return base(query, *args, **kwargs)
        self._check_forward_args(query, *args, **kwargs)
        out = base.out_proj
        weights = {
            "in_proj_weight": _updated(base.in_proj_weight, self, active),
            "out_proj.base_layer.weight": _updated(out.weight, out, active),
        }
        return torch.func.functional_call(base, weights, (query, *args), kwargs)

    def _restore_weights(self) -> None:
        pass  # nothing was taken out


def _updated(weight: Tensor, layer: LoraLayer, adapters: list[str], sign: int = 1) -> Tensor:
    for name in adapters:
        weight = weight + sign * layer.get_delta_weight(name).to(weight.dtype)
    return weight


def _observed(module: nn.Module) -> bool:
    """Whether somebody counts on the module being called: hooks, parametrizations, or a forward of its own."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in vars(module) or "parametrizations" in module._modules
