"""Scaled dot-product attention, which never keeps the attention matrix.

Index legend: `l` queries, `s` keys, `e` features of query and key, `f` features of value. Each line holds for
every sample and head. β is the scale, B the bias that is added to the scores (or nothing), and a score that the
mask or causality excludes is -∞.

    S[l,s] = β Σ_e q[l,e] k[s,e] + B[l,s]        lse[l] = log Σ_s e^S[l,s]        P = e^(S - lse)
    Z[l,s] = keep[l,s] / (1 - p), dropout's factor, or 1              o[l,f] = Σ_s P[l,s] Z[l,s] v[s,f]

The products give, as for any matrix product,

    dv[s,f] = Σ_l P[l,s] Z[l,s] do[l,f]          dP[l,s] = Z[l,s] Σ_f do[l,f] v[s,f]
    dq[l,e] = β Σ_s dS[l,s] k[s,e]               dk[s,e] = β Σ_l dS[l,s] q[l,e]              dB = dS

and between dP and dS stands the softmax, whose Jacobian within a row is ∂P[s]/∂S[t] = P[s] ([s = t] - P[t]):

    dS[t] = Σ_s dP[s] ∂P[s]/∂S[t] = P[t] (dP[t] - D),        D = Σ_s P[s] dP[s]

D looks as if it needed a row of dP, but P Z is what turned v into o, so the sum over s has been done already:

    D = Σ_s P[s] Z[s] Σ_f do[f] v[s,f] = Σ_f do[f] o[f]

Hence q, k, v, o and one number a row are kept, O(l + s) instead of the O(l s) of P, which is rebuilt from lse by
one exponential. A row that excludes every key has P = 0 and o = 0, as in torch: its lse is some finite number, and
e^(-∞ - lse) = 0.

Sources: Vaswani et al., "Attention is all you need", arXiv 1706.03762; the backward is that of Dao et al.,
"FlashAttention", arXiv 2205.14135, appendix B.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op
from bptools.ops.dropout import dropout_factor

aten = torch.ops.aten


def attention_scores(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> Tensor:
    """q (..., h, l, e), k (..., h, s, e), bias and mask (..., h, l, s) -> S (..., h, l, s), -∞ where excluded."""
    scores = (q * scale) @ _repeat_heads(k, q, enable_gqa).mT
    if bias is not None:
        scores = scores + bias
    if is_causal:
        scores = torch.where(torch.ones_like(scores, dtype=torch.bool).tril(), scores, -math.inf)
    return scores if mask is None else torch.where(mask, scores, -math.inf)


def attention_log_sum_exp(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> Tensor:
    """The arguments of `attention_scores` -> lse (..., h, l)."""
    scores = attention_scores(q, k, bias, mask, is_causal, scale, enable_gqa)
    return _log_sum_exp(scores, bias, mask)


def scaled_dot_product_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    keep: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor]:
    """q (..., h, l, e), k (..., h, s, e), v (..., h, s, f) -> o (..., h, l, f), lse (..., h, l).

    bias is added to the scores; mask is boolean, True for those that take part; keep is 1 for those that dropout
    leaves, else 0. All three broadcast to (..., h, l, s). With is_causal a query sees the keys up to its own
    index. With enable_gqa, k and v may have fewer heads than q: each serves a group of consecutive heads of q.
    """
    scores = attention_scores(q, k, bias, mask, is_causal, scale, enable_gqa)
    lse = _log_sum_exp(scores, bias, mask)
    p = _probabilities(scores, lse)
    if keep is not None:
        p = p * dropout_factor(p, keep, dropout_p)
    return p @ _repeat_heads(v, q, enable_gqa), lse


def scaled_dot_product_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    keep: Tensor | None,
    o: Tensor,
    lse: Tensor,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    enable_gqa: bool,
    needs=EVERY,
) -> tuple[Tensor | None, ...]:
    """do, o (..., h, l, f), lse (..., h, l), the rest as in the forward -> dq, dk, dv, dbias (..., h, l, s)."""
    dq = dk = dv = ds = None
    scores = attention_scores(q, k, bias, mask, is_causal, scale, enable_gqa)
    p = _probabilities(scores, lse)  # (..., h, l, s)
    z = None if keep is None else dropout_factor(p, keep, dropout_p)
    if "v" in needs:
        dv = _sum_heads((p if z is None else p * z).mT @ do, v, enable_gqa)
    if "q" in needs or "k" in needs or "bias" in needs:
        dp = do @ _repeat_heads(v, q, enable_gqa).mT
        ds = p * ((dp if z is None else dp * z) - (do * o).sum(-1, keepdim=True))
    if "q" in needs:
        dq = scale * (ds @ _repeat_heads(k, q, enable_gqa))
    if "k" in needs:
        dk = _sum_heads(ds.mT @ (scale * q), k, enable_gqa)
    return dq, dk, dv, ds if "bias" in needs else None


def _log_sum_exp(scores: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """(..., s) -> (...), finite for a row that bias or mask made all -∞: its logarithm has no derivative."""
    if bias is not None or mask is not None:
        scores = scores.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0)
    return scores.logsumexp(-1)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """S (..., l, s), lse (..., l) -> P (..., l, s), also where a mask of -1e9 leaves lse no digits for log s."""
    p = torch.exp(scores - lse.unsqueeze(-1))
    total = p.sum(-1, keepdim=True)  # 1, but for the rounding of lse; 0 for a row that excludes every key
    return p / torch.where(total > 0, total, 1)


def _repeat_heads(t: Tensor, q: Tensor, enable_gqa: bool) -> Tensor:
    """k or v (..., h / g, s, e) -> (..., h, s, e), the same for each group of g heads of q."""
    return t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) if enable_gqa else t


def _sum_heads(dt: Tensor, t: Tensor, enable_gqa: bool) -> Tensor:
    """The transpose of `_repeat_heads`: (..., h, s, e) -> (..., h / g, s, e)."""
    if not enable_gqa:
        return dt
    *batch, heads, s, e = dt.shape
    return dt.reshape(*batch, t.shape[-3], heads // t.shape[-3], s, e).sum(-3)


def _kernel_usable(q, k, v, bias, mask, keep, is_causal, dropout_p, scale, enable_gqa):
    """Whether ATen's flash attention for the CPU computes this: 4-D, one head size, nothing empty, no dropout."""
    if torch._C._are_functorch_transforms_active():  # it has no vmap rule, torch would loop
        return False
    if keep is not None or (bias is not None and bias.requires_grad):
        return False
    if (bias is not None) + (mask is not None) + is_causal > 1 or not q.dim() == k.dim() == v.dim() == 4:
        return False
    if not (k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]):
        return False
    if not (enable_gqa or q.shape[1] == k.shape[1]):
        return False
    return all(t.device.type == "cpu" and t.numel() > 0 and t.stride(-1) == 1 for t in (q, k, v))


def _kernel_bias(q, k, bias, mask):
    """What the kernel adds to the scores: (b, h, l, s) in the dtype of q, or None."""
    if mask is not None:
        bias = mask.to(q.dtype).log()  # 0 where it takes part, -∞ elsewhere
    return None if bias is None else bias.expand(*q.shape[:3], k.shape[2])


def _kernel_forward(q, k, v, bias, mask, keep, is_causal, dropout_p, scale, enable_gqa):
    bias = _kernel_bias(q, k, bias, mask)
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)


def _kernel_backward(do, q, k, v, bias, mask, keep, o, lse, is_causal, dropout_p, scale, enable_gqa, needs):
    bias = _kernel_bias(q, k, bias, mask)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, o, lse, 0.0, is_causal, attn_mask=bias, scale=scale
    )
    return dq if "q" in needs else None, dk if "k" in needs else None, dv if "v" in needs else None, None


scaled_dot_product_attention = Op(
    scaled_dot_product_attention_forward,
    scaled_dot_product_attention_backward,
    outputs="o lse",
    grads="q k v bias",
    residuals=attention_log_sum_exp,
    kernel=Kernel(_kernel_forward, _kernel_backward, _kernel_usable),
    trace="kernel",
    autocast={"cpu": "lower", "cuda": "lower"},
    mixed=True,  # a float32 bias beside half precision
)
