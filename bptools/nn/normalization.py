"""Layer normalisation and its kin."""

from __future__ import annotations

from typing import Any

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


class GroupNorm(torch.nn.GroupNorm):
    """`torch.nn.GroupNorm` on `bptools.functional.group_norm`: (n, c, ...) -> the same."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class LocalResponseNorm(torch.nn.LocalResponseNorm):
    """`torch.nn.LocalResponseNorm` on `bptools.functional.local_response_norm`: (n, c, ...) -> the same."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.local_response_norm(input, self.size, self.alpha, self.beta, self.k)


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
        return self._normalise(input, mean, var, momentum)

    def _normalise(self, input: Tensor, mean: Tensor | None, var: Tensor | None, momentum: float) -> Tensor:
        training = self.training or mean is None
        return functional.batch_norm(input, mean, var, self.weight, self.bias, training, momentum, self.eps)


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on `bptools.functional.batch_norm`: (n, c) or (n, c, l) -> the same."""


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on `bptools.functional.batch_norm`: (n, c, h, w) -> the same."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on `bptools.functional.batch_norm`: (n, c, d, h, w) -> the same."""


class SyncBatchNorm(_BatchNorm, torch.nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` on `bptools.functional.sync_batch_norm`: (n, c, ...) -> the same, on any device.

    Without a process group, with one of a single process, and in evaluation it is batch norm. On the CPU
    DistributedDataParallel refuses every torch.nn.SyncBatchNorm by its class, and so this one.
    """

    def _normalise(self, input: Tensor, mean: Tensor | None, var: Tensor | None, momentum: float) -> Tensor:
        self._check_non_zero_input_channels(input)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (self.training and distributed and torch.distributed.get_world_size(self.process_group) > 1):
            return super()._normalise(input, mean, var, momentum)
        parameters = self.weight, self.bias
        return functional.sync_batch_norm(input, mean, var, *parameters, momentum, self.eps, self.process_group)

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """Exchange every batch norm in a module for one of this class, with the same parameters and buffers.

        Args:
            module: is changed, and returned; of a batch norm itself, the other layer is returned.
            process_group: of the layers; None for all processes.
        """
        converted = module
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            constants = module.eps, module.momentum, module.affine, module.track_running_stats
            converted = cls(module.num_features, *constants, process_group)
            converted._parameters.update(module._parameters)
            converted._buffers.update(module._buffers)
            converted.training = module.training
        for name, child in module.named_children():
            converted.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return converted


class _InstanceNorm:
    """The forward of the instance norms; all else is torch's."""

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return functional.instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
        )


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d` on `bptools.functional.instance_norm`: (n, c, l) or (c, l) -> the same."""


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` on `bptools.functional.instance_norm`: (n, c, h, w) or (c, h, w) -> the same."""


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` on `bptools.functional.instance_norm`: (n, c, d, h, w), (c, d, h, w) -> same."""
