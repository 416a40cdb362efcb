"""What a forward pass changes besides making gradients, put back after a step that was not taken."""

import torch
from torch import nn


class Rewind:
    """Remembers the buffers that modules in training mode write to, and torch's random state.

    Those buffers are of floating point (running statistics) or scalars (counters).
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, device: torch.device):
        self._buffers = [
            (module, name, buffer.clone())
            for module in model.modules()
            if module.training and module._buffers
            for name, buffer in module._buffers.items()
            if buffer is not None and (buffer.is_floating_point() or not buffer.ndim)
        ]
        self._device = device if device.type == "cuda" else None
        self._random = torch.get_rng_state(), self._device and torch.cuda.get_rng_state(device)

    @torch.no_grad()
    def buffers(self) -> None:
        """Put the buffers back."""
        for module, name, before in self._buffers:
            getattr(module, name).copy_(before)

    def random(self) -> None:
        """Put the random state back."""
        cpu, cuda = self._random
        torch.set_rng_state(cpu)
        if self._device:
            torch.cuda.set_rng_state(cuda, self._device)
