"""The embedding table."""

from __future__ import annotations

import torch
from torch import Tensor

from bptools import functional


class Embedding(torch.nn.Embedding):
    """`torch.nn.Embedding` on `bptools.functional.embedding`: (...) of indices -> (..., embedding_dim)."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
