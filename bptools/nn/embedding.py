"""Embeddings: of tokens, of bags of them, and of positions."""

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


class EmbeddingBag(torch.nn.EmbeddingBag):
    """`torch.nn.EmbeddingBag` on `bptools.functional.embedding_bag`: (n,) or (b, l) -> (b, embedding_dim)."""

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Apply the layer."""
        return functional.embedding_bag(
            input,
            self.weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )


class RotaryEmbedding(torch.nn.Module):
    """The tables of `bptools.functional.rotary_embedding`: angles l / base^(2i / dim) for pair i at position l.

    The tables are computed once, in float32, and grow when a longer input comes. They are not in the state_dict.

    Args:
        dim: of the features that are turned, even.
        base: the wavelengths go from 2π to 2π base positions.
        positions: how many the tables hold at first.
        interleaved: the pairs are features 0 and 1, 2 and 3, ... (GPT-J); else i and i + dim / 2 (Llama).
        device: of the tables.

    Raises:
        ValueError: if dim is odd or not positive.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        positions: int = 2048,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"RotaryEmbedding: dim must be even and positive, got {dim}")
        self.dim, self.base, self.interleaved = dim, base, interleaved
        cos, sin = self._tables(positions, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The tables for x, in its dtype.

        Args:
            x: (..., l, d). Its length is what counts if there are no position_ids.
            position_ids: (...), the positions that are asked for; None for 0 to l - 1.

        Returns:
            cos and sin: (l, dim), or (..., dim) of position_ids (...).
        """
        wanted = x.shape[-2] if position_ids is None else int(position_ids.max()) + 1
        if wanted > self.cos.shape[0]:
            longer = self._tables(max(wanted, 2 * self.cos.shape[0]), self.cos.device)
            self.cos, self.sin = (t.to(self.cos.dtype) for t in longer)
        place = slice(wanted) if position_ids is None else position_ids
        return self.cos[place].to(x.dtype), self.sin[place].to(x.dtype)

    def _tables(self, positions: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        frequencies = 1 / self.base ** (torch.arange(0, self.dim, 2, device=device).float() / self.dim)
        angles = torch.outer(torch.arange(positions, device=device).float(), frequencies)  # (positions, dim / 2)
        angles = angles.repeat_interleave(2, -1) if self.interleaved else angles.repeat(1, 2)
        return angles.cos(), angles.sin()

    def extra_repr(self) -> str:
        """The arguments that shape the tables."""
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}"
