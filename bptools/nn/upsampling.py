"""Upsampling: (n, c, *) -> (n, c, *), over 1, 2 or 3 dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from bptools import functional


def _interpolate(layer: torch.nn.Upsample, input: Tensor) -> Tensor:
    size, factor, recompute = layer.size, layer.scale_factor, layer.recompute_scale_factor
    return functional.interpolate(input, size, factor, layer.mode, layer.align_corners, recompute)


class Upsample(torch.nn.Upsample):
    """`torch.nn.Upsample` on `bptools.functional.interpolate`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return _interpolate(self, input)


class UpsamplingNearest2d(torch.nn.UpsamplingNearest2d):
    """`torch.nn.UpsamplingNearest2d` on `bptools.functional.interpolate`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return _interpolate(self, input)


class UpsamplingBilinear2d(torch.nn.UpsamplingBilinear2d):
    """`torch.nn.UpsamplingBilinear2d` on `bptools.functional.interpolate`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return _interpolate(self, input)
