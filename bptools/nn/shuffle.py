"""Shuffles of places and channels: (n, c, *) -> (n, c, *)."""

from __future__ import annotations

import torch
from torch import Tensor

from bptools import functional


class PixelShuffle(torch.nn.PixelShuffle):
    """`torch.nn.PixelShuffle` on `bptools.functional.pixel_shuffle`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.pixel_shuffle(input, self.upscale_factor)


class PixelUnshuffle(torch.nn.PixelUnshuffle):
    """`torch.nn.PixelUnshuffle` on `bptools.functional.pixel_unshuffle`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.pixel_unshuffle(input, self.downscale_factor)


class ChannelShuffle(torch.nn.ChannelShuffle):
    """`torch.nn.ChannelShuffle` on `bptools.functional.channel_shuffle`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.channel_shuffle(input, self.groups)
