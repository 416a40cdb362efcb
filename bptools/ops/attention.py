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

Nor is there ever a whole P. Rows do not mix, so the formula takes the queries in tiles, one after the other, and
of S, P and dS there are (tile, s) at a time. A tile's rows are whole: they need no running maximum. What belongs
to a query (o, lse, dq) is put side by side; what is summed over queries (dk, dv) is summed over tiles too. A
causal tile does not look at the keys behind its last query. Where a gradient is to be differentiated again, the
graph of a tile is not kept either, but made again from its do, o, q, lse, k and v. Up to `TILE` queries are one.

What stays O(l s): a bias or mask of that shape, which the caller made, and the gradient of such a bias; `keep`, a
byte a score, wherever dropout is not drawn tile by tile from a seed (up to `TILE` queries, where the numbers are
torch's; under torch.func and torch.compile); the graphs of torch.func's transforms and of forward mode; and the
formula where torch.compile sees sizes that vary, for then it is one tile.

Sources: Vaswani et al., "Attention is all you need", arXiv 1706.03762; the backward is that of Dao et al.,
"FlashAttention", arXiv 2205.14135, appendix B.2. Tiles of queries alone: Rabe and Staats, "Self-attention does not
need O(n²) memory", arXiv 2112.05682.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from bptools.ops._core import EVERY, Kernel, Op, outside_transforms
from bptools.ops.dropout import draw, dropout_factor

aten = torch.ops.aten

TILE = 256  # queries that the formula looks at together


def attention_scores(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
    first: int = 0,
) -> Tensor:
    """q (..., h, l, e), k (..., h, s, e), bias and mask (..., h, l, s) -> S (..., h, l, s), -∞ where excluded.

    `first` is the index among all queries of the first of these.
    """
    scores = (q * scale) @ _repeat_heads(k, q, enable_gqa).mT
    if bias is not None:
        scores = scores + bias
    if is_causal:
        seen = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril(first)
        scores = torch.where(seen, scores, -math.inf)
    return scores if mask is None else torch.where(mask, scores, -math.inf)


def attention_log_sum_exp(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
    tile: int,
) -> Tensor:
    """The arguments of `attention_scores` -> lse (..., h, l)."""

    def of_tile(q, k, bias, mask, first):
        scores = attention_scores(q, k, bias, mask, is_causal, scale, enable_gqa, first)
        return _log_sum_exp(scores, bias, mask)

    tiles = _tiles(q, k, is_causal, tile)
    return _beside(list(_each(of_tile, tiles, (q,), (k,), (bias, mask))), -1)


def scaled_dot_product_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    keep: Tensor | None,
    seed: int | None,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    enable_gqa: bool,
    tile: int,
) -> tuple[Tensor, Tensor]:
    """q (..., h, l, e), k (..., h, s, e), v (..., h, s, f) -> o (..., h, l, f), lse (..., h, l).

    bias is added to the scores; mask is boolean, True for those that take part; keep is 1 for those that dropout
    leaves, else 0, and is drawn tile by tile if there is a seed. All three broadcast to (..., h, l, s), and have
    two dimensions at least. With is_causal a query sees the keys up to its own index. With enable_gqa, k and v may
    have fewer heads than q: each serves a group of consecutive heads of q.
    """

    def of_tile(q, k, v, bias, mask, keep, first):
        scores = attention_scores(q, k, bias, mask, is_causal, scale, enable_gqa, first)
        lse = _log_sum_exp(scores, bias, mask)
        p = _probabilities(scores, lse.unsqueeze(-1))
        z = _dropout(p, keep, seed, first, dropout_p)
        return (p if z is None else p * z) @ _repeat_heads(v, q, enable_gqa), lse

    tiles = _tiles(q, k, is_causal, tile)
    o, lse = zip(*_each(of_tile, tiles, (q,), (k, v), (bias, mask, keep)), strict=True)
    return _beside(o, -2), _beside(lse, -1)


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
    seed: int | None,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    enable_gqa: bool,
    tile: int,
    needs=EVERY,
) -> tuple[Tensor | None, ...]:
    """do, o (..., h, l, f), lse (..., h, l), the rest as in the forward -> dq, dk, dv, dbias (as they are)."""
    tiles, s = _tiles(q, k, is_causal, tile), k.shape[-2]
    several = len(tiles) > 1
    rows, columns = (1, 1) if bias is None else bias.shape[-2:]

    def of_tile(do, o, q, lse, k, v, bias, mask, keep, first):
        dq = dk = dv = ds = None
        scores = attention_scores(q, k, bias, mask, is_causal, scale, enable_gqa, first)
        p = _probabilities(scores, lse)  # (..., h, l, s), of the tile
        z = _dropout(p, keep, seed, first, dropout_p)
        if "v" in needs:
            dv = _widen(_sum_heads((p if z is None else p * z).mT @ do, v, enable_gqa), -2, s)
        if "q" in needs or "k" in needs or "bias" in needs:
            dp = do @ _repeat_heads(v, q, enable_gqa).mT
            ds = p * ((dp if z is None else dp * z) - (do * o).sum(-1, keepdim=True))
        if "q" in needs:
            dq = scale * (ds @ _repeat_heads(k, q, enable_gqa))
        if "k" in needs:
            dk = _widen(_sum_heads(ds.mT @ (scale * q), k, enable_gqa), -2, s)
        if "bias" in needs and several:  # of one tile the core does it
            ds = _widen(ds.sum_to_size(bias.shape), -1, columns)
        return dq, dk, dv, ds if "bias" in needs else None

    parts = _each(of_tile, tiles, (do, o, q, lse.unsqueeze(-1)), (k, v), (bias, mask, keep))
    if not several:
        return next(parts)
    dq, dbias, dk, dv, sum_dbias = [], [], None, None, None
    for dq_part, dk_part, dv_part, dbias_part in parts:
        dq.append(dq_part)
        dbias.append(dbias_part if rows > 1 else None)
        dk, dv = _plus(dk, dk_part), _plus(dv, dv_part)
        sum_dbias = _plus(sum_dbias, dbias_part if rows == 1 else None)
    return _beside(dq, -2), dk, dv, _beside(dbias, -2) if rows > 1 else sum_dbias


def _tiles(q: Tensor, k: Tensor, is_causal: bool, tile: int) -> list[tuple[int, int, int]]:
    """Of each tile: its first query, the end of its queries, and the end of the keys that they may see."""
    l, s = q.shape[-2], k.shape[-2]
    if torch.compiler.is_compiling() and not torch.fx.experimental.symbolic_shapes.has_static_value(l):
        return [(0, l, s)]  # a loop would make a constant of a size that varies
    if l <= tile:
        return [(0, l, s)]
    ends = [(first, min(first + tile, l)) for first in range(0, l, tile)]
    return [(first, end, min(end, s) if is_causal else s) for first, end in ends]


def _each(
    of_tile: Callable[..., Any],
    tiles: Sequence[tuple[int, int, int]],
    by_query: Sequence[Tensor],
    by_key: Sequence[Tensor],
    masks: Sequence[Tensor | None],
) -> Iterator[Any]:
    """What of_tile makes of each tile's parts of by_query (..., l, *), by_key (..., s, *) and masks (..., l, s).

    Where that will be differentiated again, autograd keeps the parts alone, which are views, and runs it again.
    """
    if len(tiles) == 1:
        yield of_tile(*by_query, *by_key, *masks, 0)
        return
    ordinary = not torch.compiler.is_compiling() and outside_transforms()
    again = torch.is_grad_enabled() and ordinary
    for first, end, seen in tiles:
        parts = [t[..., first:end, :] for t in by_query] + [t[..., :seen, :] for t in by_key]
        for t in masks:
            if t is not None and t.shape[-2] > 1:
                t = t[..., first:end, :]
            parts.append(t if t is None or t.shape[-1] == 1 else t[..., :seen])
        if again:
            yield checkpoint(of_tile, *parts, first, use_reentrant=False, preserve_rng_state=False)
        else:
            yield of_tile(*parts, first)


def _beside(parts: Sequence[Tensor | None], dim: int) -> Tensor | None:
    """The tiles' parts of one tensor, joined."""
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(tuple(parts), dim)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a + b


def _widen(t: Tensor, dim: int, size: int) -> Tensor:
    """Zeros behind t, up to this size of its last dimension or the one before."""
    missing = size - t.shape[dim]
    return pad(t, (0, missing) if dim == -1 else (0, 0, 0, missing)) if missing else t


def _dropout(p: Tensor, keep: Tensor | None, seed: int | None, first: int, dropout_p: float) -> Tensor | None:
    """Z of a tile with P (..., l, s), or None for 1."""
    if seed is not None:
        generator = torch.Generator(p.device).manual_seed(seed + first)
        keep = draw(torch.empty(p.shape, dtype=torch.uint8, device=p.device), dropout_p, generator)
    return None if keep is None else dropout_factor(p, keep, dropout_p)


def _log_sum_exp(scores: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """(..., s) -> (...), finite for a row that bias or mask made all -∞: its logarithm has no derivative."""
    if bias is not None or mask is not None:
        scores = scores.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0)
    return scores.logsumexp(-1)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """S (..., l, s), lse (..., l, 1) -> P (..., l, s), also where a mask of -1e9 leaves lse too few digits."""
    p = torch.exp(scores - lse)
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


def _kernel_usable(q, k, v, bias, mask, keep, seed, is_causal, dropout_p, scale, enable_gqa, tile):
    """Whether ATen's flash attention for the CPU computes this: 4-D, one head size, nothing empty, no dropout."""
    if not outside_transforms():  # it has no vmap rule, torch would loop
        return False
    if keep is not None or seed is not None or (bias is not None and bias.requires_grad):
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


def _kernel_forward(q, k, v, bias, mask, keep, seed, is_causal, dropout_p, scale, enable_gqa, tile):
    bias = _kernel_bias(q, k, bias, mask)
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)


def _kernel_backward(
    do, q, k, v, bias, mask, keep, o, lse, seed, is_causal, dropout_p, scale, enable_gqa, tile, needs
):
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
