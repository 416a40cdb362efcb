"""Dropout, of elements, of channels and of samples: (...) -> (...)."""

from __future__ import annotations

import torch
from torch import Tensor

from bptools import functional


class Dropout(torch.nn.Dropout):
    """`torch.nn.Dropout` on `bptools.functional.dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.dropout(input, self.p, self.training, self.inplace)


class Dropout1d(torch.nn.Dropout1d):
    """`torch.nn.Dropout1d` on `bptools.functional.dropout1d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(torch.nn.Dropout2d):
    """`torch.nn.Dropout2d` on `bptools.functional.dropout2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(torch.nn.Dropout3d):
    """`torch.nn.Dropout3d` on `bptools.functional.dropout3d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.dropout3d(input, self.p, self.training, self.inplace)


class AlphaDropout(torch.nn.AlphaDropout):
    """`torch.nn.AlphaDropout` on `bptools.functional.alpha_dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.alpha_dropout(input, self.p, self.training, self.inplace)


class FeatureAlphaDropout(torch.nn.FeatureAlphaDropout):
    """`torch.nn.FeatureAlphaDropout` on `bptools.functional.feature_alpha_dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.feature_alpha_dropout(input, self.p, self.training, self.inplace)


class DropPath(torch.nn.Module):
    """`timm.layers.DropPath` on `bptools.functional.drop_path`: zeroes whole samples of (n, ...) in training.

    Args:
        drop_prob: the probability of zero, from 0 to 1.
        scale_by_keep: multiply the other samples by 1 / (1 - drop_prob).
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.drop_path(x, self.drop_prob, self.training, self.scale_by_keep)

    def extra_repr(self) -> str:
        """Say how probable."""
        return f"drop_prob={self.drop_prob:0.3f}"


class StochasticDepth(torch.nn.Module):
    """`torchvision.ops.StochasticDepth` on `bptools.functional.stochastic_depth`: (n, ...) -> the same.

    Args:
        p: the probability of zero, from 0 to 1.
        mode: `"row"`: of each sample; `"batch"`: of all of them together.
    """

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.stochastic_depth(input, self.p, self.mode, self.training)

    def extra_repr(self) -> str:
        """Say how probable, and in which mode."""
        return f"p={self.p}, mode={self.mode}"
