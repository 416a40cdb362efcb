"""Linear layers with weights of 4 bits an element: (..., in_features) -> (..., out_features)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from bptools import functional
from bptools.functional._nf4 import NF4Weight
from bptools.nn.linear import Linear
from bptools.ops import nf4 as _nf4

STATE = "quant_state.bitsandbytes__nf4"
STATISTICS = ("absmax", "nested_absmax", "offset")


class NF4Linear(nn.Linear):
    """A frozen linear layer in NF4: `bptools.functional.nf4_linear`, for QLoRA.

    `weight` is a parameter of packed bytes, (ceil(n / 2), 1), as in bitsandbytes' `Linear4bit`, and `state_dict`
    has that layer's keys and tensors: either loads what the other has saved. peft puts its LoRA layers around it
    as around any linear layer.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        bias: whether there is a bias, which is not quantised.
        block_size: elements that share a scale.
        double_quant: whether scales are quantised, too.
        device: of the parameters.
        dtype: of the bias, and of the weight when it is dequantised.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        block_size: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.block_size, self.double_quant = block_size, double_quant
        for name in STATISTICS:
            self.register_buffer(name, None, persistent=False)
        self._set(functional.quantize_nf4(self.weight.detach(), block_size, double_quant))

    @classmethod
    def from_linear(cls, linear: nn.Linear, block_size: int = 64, double_quant: bool = True) -> NF4Linear:
        """A layer with the quantised weight of another and the bias itself, both frozen."""
        quantised = functional.quantize_nf4(linear.weight.detach(), block_size, double_quant)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.block_size, layer.double_quant = block_size, double_quant
        for name in STATISTICS:
            layer.register_buffer(name, None, persistent=False)
        layer.bias = linear.bias
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        layer._set(quantised)
        return layer.train(linear.training)

    def _set(self, quantised: NF4Weight) -> None:
        old, new = self._parameters.get("weight"), quantised.packed
        if old is not None and (old.shape, old.device) == (new.shape, new.device):
            old.data = new  # whoever holds the parameter, such as an optimizer, has the new weight too
        else:
            self.weight = nn.Parameter(new, requires_grad=False)
        for name in STATISTICS:
            setattr(self, name, getattr(quantised, name))
        self.weight_dtype = quantised.dtype

    @property
    def quantised(self) -> NF4Weight:
        """The weight, as `bptools.functional.nf4_linear` takes it."""
        shape = self.out_features, self.in_features
        statistics = self.absmax, self.nested_absmax, self.offset
        return NF4Weight(self.weight.detach(), *statistics, shape, self.block_size, self.weight_dtype)

    def dequantize(self) -> nn.Linear:
        """An ordinary layer with this one's weight, as far as 4 bits hold it, and its bias."""
        with torch.device("meta"):
            layer = Linear(self.in_features, self.out_features, self.bias is not None)
        layer.weight = nn.Parameter(functional.dequantize_nf4(self.quantised))
        layer.bias = self.bias
        return layer.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.nf4_linear(input, self.quantised, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        """Move everything, and cast the bias alone: scales are what they are."""
        statistics = {id(getattr(self, name)) for name in STATISTICS}

        def moved(t: Tensor) -> Tensor:
            result = fn(t)
            return t.to(result.device) if id(t) in statistics and result.dtype is not t.dtype else result

        return super()._apply(moved, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        here = self.quantised
        said: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": here.block_size,
            "dtype": str(here.dtype).removeprefix("torch."),
            "shape": list(here.shape),
        }
        tensors = {"absmax": here.absmax, "quant_map": torch.tensor(_nf4.NF4, device=here.absmax.device)}
        if here.nested_absmax is not None:
            said |= {"nested_blocksize": _nf4.NESTED_BLOCK, "nested_dtype": "float32"}
            said["nested_offset"] = here.offset.item()
            code = torch.tensor(_nf4.CODE8, device=here.absmax.device)
            tensors |= {"nested_absmax": here.nested_absmax, "nested_quant_map": code}
        tensors[STATE] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
        destination.update({f"{prefix}weight.{name}": t for name, t in tensors.items()})

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        mine = f"{prefix}weight."
        found = {key.removeprefix(mine): t for key, t in state_dict.items() if key.startswith(mine)}
        if STATE not in found:
            missing.append(mine + STATE)
            return
        said = json.loads(bytes(found[STATE].tolist()))
        packed = state_dict.get(f"{prefix}weight")
        shape = (self.out_features, self.in_features)
        if said.get("quant_type") != "nf4" or tuple(said["shape"]) != shape or packed is None:
            errors.append(
                f"{prefix}weight: expected an NF4 weight of shape {shape}, got {said.get('quant_type')} of "
                f"{tuple(said['shape'])}"
            )
            return
        device, nested = self.weight.device, "nested_absmax" in found
        offset = torch.tensor(float(said["nested_offset"])) if nested else None
        parts = packed, found["absmax"], found.get("nested_absmax"), offset
        parts = [None if t is None else t.detach().clone().to(device) for t in parts]
        self.block_size, self.double_quant = said["blocksize"], nested
        self._set(NF4Weight(*parts, shape, said["blocksize"], getattr(torch, said["dtype"])))
        rest = {key: t for key, t in state_dict.items() if not key.startswith(mine)}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, [], errors)

    def extra_repr(self) -> str:
        """What tells this layer from others."""
        return f"{super().extra_repr()}, block_size={self.block_size}, double_quant={self.double_quant}"


def to_nf4(
    model: nn.Module,
    skip: Sequence[str] = ("*lm_head",),
    block_size: int = 64,
    double_quant: bool = True,
) -> list[str]:
    """Put `NF4Linear` in the place of a model's linear layers, in place, and freeze these.

    Args:
        model: any module that holds linear layers of torch.nn or bptools.nn, by exact class.
        skip: patterns of names, as in a shell, of layers that stay: the head, as a rule.
        block_size: elements that share a scale.
        double_quant: whether scales are quantised, too.

    Returns:
        The names of the layers that were replaced.

    Raises:
        ValueError: if there is none to replace.
    """
    names = [
        name
        for name, module in model.named_modules()
        if name and type(module) in (nn.Linear, Linear) and not any(fnmatchcase(name, p) for p in skip)
    ]
    if not names:
        raise ValueError(f"to_nf4: model must hold linear layers that skip {tuple(skip)} leaves, got none")
    for name in names:
        layer = NF4Linear.from_linear(model.get_submodule(name), block_size, double_quant)
        model.set_submodule(name, layer)
    return names
