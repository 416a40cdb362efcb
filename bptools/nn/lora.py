"""A linear layer with a low-rank update: (..., in_features) -> (..., out_features)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bptools import functional
from bptools.functional._checks import check_probability, is_int


class LoRALinear(torch.nn.Linear):
    """A frozen linear layer with a low-rank update that learns: `bptools.functional.lora_linear`.

    A starts as torch.nn.Linear's weights do and B at zero, so that the layer starts as the one below.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        r: the rank of the update.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: the probability with which an element of the update's input is zeroed in training.
        bias: whether there is a bias, which is frozen, too.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: if r is not an int of at least 1, or lora_dropout not between 0 and 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float = 1.0,
        lora_dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not is_int(r) or r < 1:
            raise ValueError(f"LoRALinear: r must be an int of at least 1, got {r!r}")
        check_probability("LoRALinear", "lora_dropout", lora_dropout)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.r, self.lora_alpha, self.lora_dropout, self.merged = r, lora_alpha, lora_dropout, False
        self.lora_A = torch.nn.Parameter(self.weight.new_empty(r, in_features))
        self.lora_B = torch.nn.Parameter(self.weight.new_empty(out_features, r))
        self.reset_lora_parameters()
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)

    @classmethod
    def from_linear(
        cls, linear: torch.nn.Linear, r: int, lora_alpha: float = 1.0, lora_dropout: float = 0.0
    ) -> LoRALinear:
        """The same layer with an update: weight and bias are the same parameters, frozen from now on."""
        with torch.device("meta"):
            bias = linear.bias is not None
            layer = cls(linear.in_features, linear.out_features, r, lora_alpha, lora_dropout, bias)
        layer.weight, layer.bias = linear.weight.requires_grad_(False), linear.bias
        if bias:
            layer.bias.requires_grad_(False)
        layer.lora_A = torch.nn.Parameter(linear.weight.new_empty(r, linear.in_features))
        layer.lora_B = torch.nn.Parameter(linear.weight.new_empty(linear.out_features, r))
        layer.reset_lora_parameters()
        return layer.train(linear.training)

    def reset_lora_parameters(self) -> None:
        """Start the update anew, from zero."""
        torch.nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        torch.nn.init.zeros_(self.lora_B)

    @property
    def scaling(self) -> float:
        """What the update is multiplied by: lora_alpha / r."""
        return self.lora_alpha / self.r

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to weight, so that the layer costs what a linear one does; once, however often called."""
        if not self.merged:
            self.weight += (self.scaling * self.lora_B @ self.lora_A).to(self.weight.dtype)
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the update from weight again, but for rounding."""
        if self.merged:
            self.weight -= (self.scaling * self.lora_B @ self.lora_A).to(self.weight.dtype)
            self.merged = False

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        if self.merged:
            return functional.linear(input, self.weight, self.bias)
        update = self.lora_A, self.lora_B
        options = self.scaling, self.lora_dropout, self.training
        return functional.lora_linear(input, self.weight, *update, self.bias, *options)

    def extra_repr(self) -> str:
        """What tells this layer from others."""
        return (
            f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
        )
