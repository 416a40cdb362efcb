"""Multi-head attention, and the transformers that are built of it.

Sequences are (l, n, e), or (n, l, e) with `batch_first`, or (l, e) without a batch. The parts of a transformer are
bptools' too. There is no second, faster path for evaluation, and no nested tensor: what is computed there is what
is computed in training, without dropout.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bptools import functional
from bptools.functional._checks import each_once
from bptools.nn.dropout import Dropout
from bptools.nn.linear import Linear
from bptools.nn.normalization import LayerNorm


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on `bptools.functional.multi_head_attention_forward`."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the layer: the output, and the attention weights or None."""
        _refuse_nested(self, query=query, key=key, value=value)
        swap = self.batch_first and query.dim() == 3
        if swap:
            query, key, value = each_once(lambda t: t.transpose(0, 1), query, key, value)
        output, weights = functional.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not self._qkv_same_embed_dim,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return output.transpose(0, 1) if swap else output, weights


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` of bptools' modules."""

    @functools.wraps(torch.nn.TransformerEncoderLayer.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        _make_parts_ours(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Apply the layer."""
        _refuse_nested(self, src=src)
        x, masks = src, (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), *masks)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, *masks))
        return self.norm2(x + self._ff_block(x))


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` of bptools' modules."""

    @functools.wraps(torch.nn.TransformerDecoderLayer.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        _make_parts_ours(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Apply the layer."""
        _refuse_nested(self, tgt=tgt, memory=memory)
        x, own = tgt, (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        others = memory, memory_mask, memory_key_padding_mask, memory_is_causal
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), *own)
            x = x + self._mha_block(self.norm2(x), *others)
            return x + self._ff_block(self.norm3(x))
        x = self.norm1(x + self._sa_block(x, *own))
        x = self.norm2(x + self._mha_block(x, *others))
        return self.norm3(x + self._ff_block(x))


class TransformerEncoder(torch.nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder`: the layers one after another, then the norm."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Apply the layers. Where `is_causal` is None, the mask is compared with a causal one."""
        is_causal = _is_causal(mask, is_causal)
        for layer in self.layers:
            src = layer(src, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


class TransformerDecoder(torch.nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder`: the layers one after another, then the norm."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Apply the layers. Where `tgt_is_causal` is None, the mask is compared with a causal one."""
        masks = {
            "tgt_mask": tgt_mask,
            "memory_mask": memory_mask,
            "tgt_key_padding_mask": tgt_key_padding_mask,
            "memory_key_padding_mask": memory_key_padding_mask,
            "tgt_is_causal": _is_causal(tgt_mask, tgt_is_causal),
            "memory_is_causal": memory_is_causal,
        }
        for layer in self.layers:
            tgt = layer(tgt, memory, **masks)
        return tgt if self.norm is None else self.norm(tgt)


class Transformer(torch.nn.Transformer):
    """`torch.nn.Transformer` of bptools' encoder and decoder; a custom encoder or decoder stays what it is."""

    @functools.wraps(torch.nn.Transformer.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for stack, ours in ((self.encoder, TransformerEncoder), (self.decoder, TransformerDecoder)):
            if not any(stack is given for given in (*args, *kwargs.values())):
                stack.__class__ = ours
                _make_parts_ours(stack)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Apply encoder and decoder: the decoder's output, in the shape of tgt."""
        _refuse_nested(self, src=src, tgt=tgt)
        batch = 0 if self.batch_first else 1
        for argument, t in (("src", src), ("tgt", tgt)):
            if t.dim() not in (2, 3) or t.shape[-1] != self.d_model:
                raise ValueError(
                    f"Transformer: {argument} must have 2 or 3 dimensions, the last of {self.d_model} features, "
                    f"got {tuple(t.shape)}"
                )
        if src.dim() != tgt.dim() or (src.dim() == 3 and src.shape[batch] != tgt.shape[batch]):
            raise ValueError(
                f"Transformer: tgt must have the batch of src, {tuple(src.shape)}, got {tuple(tgt.shape)}"
            )
        memory = self.encoder(
            src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal
        )
        return self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )


OURS = {
    torch.nn.TransformerEncoderLayer: TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: TransformerDecoderLayer,
    torch.nn.MultiheadAttention: MultiheadAttention,
    torch.nn.LayerNorm: LayerNorm,
    torch.nn.Linear: Linear,
    torch.nn.Dropout: Dropout,
}
ACTIVATIONS = {F.relu: functional.relu, F.gelu: functional.gelu}


def _make_parts_ours(module: torch.nn.Module) -> None:
    """Turn the parts that torch's constructor made into ours: their classes, for those differ in forward alone.

    To make them anew would draw their first values anew. An activation that is a module came from the caller.
    """
    for name, part in module.named_children():
        if name != "activation":
            part.__class__ = OURS.get(type(part), type(part))
            _make_parts_ours(part)
    activation = getattr(module, "activation", None)
    if not isinstance(activation, torch.nn.Module) and activation in ACTIVATIONS:
        module.activation = ACTIVATIONS[activation]


def _is_causal(mask: Tensor | None, hint: bool | None) -> bool:
    """The hint; without one, whether the mask is causal, which a compiler cannot ask.

    It is then computed and not read, so one that learns counts as another.
    """
    if hint is not None or mask is None or torch.compiler.is_compiling() or mask.requires_grad:
        return bool(hint)
    causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype is not torch.bool:
        causal = torch.zeros_like(causal, dtype=mask.dtype).masked_fill(causal, -math.inf)
    return mask.shape[-2] == mask.shape[-1] and torch.equal(mask, causal)


def _refuse_nested(module: torch.nn.Module, **tensors: Tensor) -> None:
    for argument, t in tensors.items():
        if t.is_nested:
            name = type(module).__name__
            raise NotImplementedError(f"{name}: {argument} must be a dense tensor, got a nested one")
