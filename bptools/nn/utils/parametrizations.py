"""torch.nn.utils.parametrizations on bptools' ops: what is registered, and so the state_dict, is torch's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import parametrizations as _torchs

from bptools import functional


class WeightNorm(_torchs._WeightNorm):
    """The parametrization that `weight_norm` registers: lengths and directions -> the weight, (..., o, ...)."""

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        """Compute the weight."""
        return functional.weight_norm(weight_v, weight_g, self.dim)


class SpectralNorm(_torchs._SpectralNorm):
    """The parametrization that `spectral_norm` registers: (..., o, ...) -> the same, of spectral norm 1."""

    def forward(self, weight: Tensor) -> Tensor:
        """Compute the weight; in training, after some more steps of the power iteration."""
        if weight.ndim == 1:
            return functional.normalize(weight, dim=0, eps=self.eps)
        if self.training:
            self._power_method(self._reshape_weight_to_matrix(weight), self.n_power_iterations)
        # Copies, for the next forward writes to the buffers, maybe before this one's backward.
        return functional.spectral_norm(weight, self._u.clone(), self._v.clone(), self.dim)


def weight_norm(module: Module, name: str = "weight", dim: int | None = 0) -> Module:
    """Give a weight's slices along dim a length and a direction of their own, each a parameter.

    Args:
        module: is changed, and returned.
        name: of the parameter, (..., o, ...), o being the dimension dim.
        dim: of the slices; None for one slice, all of the weight.
    """
    return _register(WeightNorm, _torchs.weight_norm(module, name, dim), name)


def spectral_norm(
    module: Module, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> Module:
    """Divide a weight by its largest singular value, which a power iteration follows from forward to forward.

    Args:
        module: is changed, and returned.
        name: of the parameter, (..., o, ...), o being the dimension dim; the rows of a matrix.
        n_power_iterations: the steps of the power iteration in each forward in training.
        eps: the least that a vector is divided by.
        dim: of the rows; None for 1 of transposed convolutions, else 0.

    Raises:
        ValueError: if module has no parameter of that name, or n_power_iterations is not positive.
    """
    return _register(SpectralNorm, _torchs.spectral_norm(module, name, n_power_iterations, eps, dim), name)


def _register(kind: type[Module], module: torch.nn.Module, name: str) -> Module:
    """What torch registered last becomes ours; buffers, hooks and random numbers drawn stay."""
    module.parametrizations[name][-1].__class__ = kind
    return module
