"""Layer normalisation and its kin."""

from __future__ import annotations

import torch
from torch import Tensor

from bptools import functional


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on `bptools.functional.layer_norm`: (..., *normalized_shape) -> the same."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on `bptools.functional.rms_norm`: (..., *normalized_shape) -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class _BatchNorm:
    """The forward of the batch norms; their constructor, parameters and buffers are torch's."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer; in training, move the running statistics if there are any."""
        self._check_input_dim(input)
        tracked = self.training and self.track_running_stats
        if tracked and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # the cumulative average
            momentum = 1.0 / float(self.num_batches_tracked) if tracked else 0.0
        mean, var = (self.running_mean, self.running_var) if tracked or not self.training else (None, None)
        training = self.training or mean is None
        return functional.batch_norm(input, mean, var, self.weight, self.bias, training, momentum, self.eps)


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on `bptools.functional.batch_norm`: (n, c) or (n, c, l) -> the same."""


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on `bptools.functional.batch_norm`: (n, c, h, w) -> the same."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on `bptools.functional.batch_norm`: (n, c, d, h, w) -> the same."""
