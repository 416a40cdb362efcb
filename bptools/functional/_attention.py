"""Attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from bptools.functional._checks import check_probability, each_once, readable, shape_of
from bptools.functional._dropout import dropout
from bptools.functional._linear import linear
from bptools.functional._softmax import softmax
from bptools.ops import attention as _attention
from bptools.ops import dropout as _dropout
from bptools.ops import matmul as _matmul


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`softmax(scale * query @ key.mT + bias) @ value`, without keeping the attention matrix for backward.

    Args:
        query: (..., heads, l, e).
        key: (..., heads, s, e).
        value: (..., heads, s, f).
        attn_mask: broadcasts to (..., heads, l, s). Boolean: True takes part. Floating: added to the scores. The
            output of a query that may attend to nothing is 0.
        dropout_p: the probability with which an attention weight is zeroed. Unlike a module, this function cannot
            know that it is in evaluation: pass 0 there. Up to 256 queries the numbers drawn are torch's; beyond,
            they are drawn piece by piece from a seed, so that their memory does not grow with l * s.
        is_causal: a query sees the keys up to its own index; not together with attn_mask.
        scale: of the scores; None for 1 / √e.
        enable_gqa: key and value may have fewer heads than query, each serving a group of consecutive ones.

    Returns:
        (..., heads, l, f).

    Raises:
        ValueError: if the shapes do not fit, or is_causal comes with attn_mask.
        TypeError: if the dtypes of query, key and value differ, or attn_mask has an unfit one.
    """
    scores = _check_attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if scale is None:
        scale = 1 / math.sqrt(max(query.shape[-1], 1))
    attn_mask = None if attn_mask is None else torch.atleast_2d(attn_mask)
    boolean = attn_mask is not None and attn_mask.dtype is torch.bool
    bias, mask = (None, attn_mask) if boolean else (attn_mask, None)
    constants = is_causal, dropout_p, scale, enable_gqa, _attention.TILE
    keep = seed = None
    if dropout_p > 0:
        tier = _attention.scaled_dot_product_attention.tier(query, key, value, bias, mask, None, 0, *constants)
        if query.shape[-2] > _attention.TILE and readable() and tier == "formula" and query.device.type != "meta":
            seed = int(torch.randint(2**62, ()))
        else:
            keep = _dropout.draw(torch.empty(scores, dtype=torch.uint8, device=query.device), dropout_p)
    o, _ = _attention.scaled_dot_product_attention(query, key, value, bias, mask, keep, seed, *constants)
    return o


def _check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> torch.Size:
    """Checks the arguments and returns the shape of the scores, (..., heads, l, s)."""
    name = "scaled_dot_product_attention"
    check_probability(name, "dropout_p", dropout_p)
    least = 3 if enable_gqa else 2
    for argument, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() < least:
            raise ValueError(f"{name}: {argument} must have at least {least} dimensions, got {shape_of(t)}")
        if not t.is_floating_point():
            raise TypeError(f"{name}: {argument} must have a floating dtype, got {t.dtype}")
        if t.dtype is not query.dtype:
            raise TypeError(f"{name}: {argument} must have the dtype of query, {query.dtype}, got {t.dtype}")
        if enable_gqa and (t.shape[-3] == 0 or query.shape[-3] % t.shape[-3]):
            raise ValueError(
                f"{name}: the heads of {argument} must divide the {query.shape[-3]} of query, got {t.shape[-3]}"
            )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"{name}: key must have {query.shape[-1]} features, as query has, got {shape_of(key)}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"{name}: value must have {key.shape[-2]} rows, as key has, got {shape_of(value)}")
    cut = -3 if enable_gqa else -2
    heads = query.shape[cut:-2]
    batch = query.shape[:cut]
    if not batch == key.shape[:cut] == value.shape[:cut]:
        try:
            batch = torch.broadcast_shapes(batch, key.shape[:cut])
            torch.broadcast_shapes(batch, value.shape[:cut])
        except RuntimeError:
            raise ValueError(
                f"{name}: the leading dimensions of query, key and value must broadcast, got {shape_of(query)}, "
                f"{shape_of(key)} and {shape_of(value)}"
            ) from None
    scores = torch.Size((*batch, *heads, query.shape[-2], key.shape[-2]))
    if attn_mask is None:
        return scores
    if is_causal:
        raise ValueError(f"{name}: is_causal must be False when attn_mask is given, got both")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(
            f"{name}: attn_mask must be boolean, float32 or of query's dtype {query.dtype}, got {attn_mask.dtype}"
        )
    trailing = scores[max(len(scores) - attn_mask.dim(), 0) :]
    if attn_mask.dim() > len(scores) or any(
        m not in (1, n) for m, n in zip(attn_mask.shape, trailing, strict=True)
    ):
        raise ValueError(f"{name}: attn_mask must broadcast to {tuple(scores)}, got {shape_of(attn_mask)}")
    return scores


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of several heads, between a projection of query, key and value and one of the result.

    Without `need_weights` the attention matrix is not kept, see `scaled_dot_product_attention`. With it, it is
    computed and returned, and a query that may attend to nothing gives NaN, as in torch.

    Args:
        query: (l, n, e), or (l, e) without n.
        key: (s, n, e), or (s, e) without n.
        value: (s, n, e), or (s, e) without n.
        embed_dim_to_check: e.
        num_heads: h, a divisor of e.
        in_proj_weight: (3 e, e), the projections of query, key and value, one below the other.
        in_proj_bias: (3 e,), or None.
        bias_k: (1, 1, e), a key that every query may attend to, or None.
        bias_v: (1, 1, e), its value.
        add_zero_attn: another such key and value, of zeros.
        dropout_p: the probability with which an attention weight is zeroed in training.
        out_proj_weight: (o, e).
        out_proj_bias: (o,), or None.
        training: whether there is dropout.
        key_padding_mask: (n, s), or (s,) without n. Boolean: True is left out. Floating: added to the scores.
        need_weights: return the attention weights too.
        attn_mask: (l, s) or (n h, l, s), as key_padding_mask.
        use_separate_proj_weight: take the three next arguments in the place of in_proj_weight; the features of key
            and value may then differ from e.
        q_proj_weight: (e, e).
        k_proj_weight: (e, features of key).
        v_proj_weight: (e, features of value).
        static_k: (n h, s, e / h), taken in the place of the projected key.
        static_v: (n h, s, e / h), taken in the place of the projected value.
        average_attn_weights: of the weights return the mean over heads.
        is_causal: a hint that attn_mask, which must be given, is the causal mask. Where nothing else is masked and
            the weights are not asked for, it is then not read.

    Returns:
        The output (l, n, o), and the weights (n, l, s), or for each head (n, h, l, s), or None. Without n if query
        is.

    Raises:
        ValueError: if shapes or numbers do not fit.
        TypeError: if a mask is neither boolean nor of query's dtype or float32.
        NotImplementedError: if query, key or value is a nested tensor.
    """
    name = "multi_head_attention_forward"
    _check_sequences(name, query, key, value, embed_dim_to_check, num_heads, use_separate_proj_weight)
    e, s = query.shape[-1], key.shape[0] if static_k is None else static_k.shape[1]
    batch = query.shape[1:-1]
    heads = num_heads * (batch[0] if batch else 1)
    static, added = (heads, s, e // num_heads), (1, 1, e)
    mask = (query.shape[0], s) if attn_mask is None or attn_mask.dim() != 3 else (heads, query.shape[0], s)
    for argument, t, shape, required in (
        ("in_proj_weight", in_proj_weight, (3 * e, e), not use_separate_proj_weight),
        ("in_proj_bias", in_proj_bias, (3 * e,), False),
        ("q_proj_weight", q_proj_weight, (e, e), use_separate_proj_weight),
        ("k_proj_weight", k_proj_weight, (e, key.shape[-1]), use_separate_proj_weight),
        ("v_proj_weight", v_proj_weight, (e, value.shape[-1]), use_separate_proj_weight),
        ("out_proj_weight", out_proj_weight, (*out_proj_weight.shape[:1], e), True),
        ("out_proj_bias", out_proj_bias, out_proj_weight.shape[:1], False),
        ("static_k", static_k, static, False),
        ("static_v", static_v, static, False),
        ("bias_k", bias_k, added, bias_v is not None),
        ("bias_v", bias_v, added, bias_k is not None),
        ("attn_mask", attn_mask, mask, is_causal),
        ("key_padding_mask", key_padding_mask, (*batch, s), False),
    ):
        if (t is not None and tuple(t.shape) != tuple(shape)) or (t is None and required):
            got = None if t is None else shape_of(t)
            raise ValueError(f"{name}: {argument} must have shape {tuple(shape)}, got {got}")
        if t is not None and "mask" in argument and t.dtype not in (torch.bool, torch.float32, query.dtype):
            raise TypeError(f"{name}: {argument} must be boolean, float32 or {query.dtype}, got {t.dtype}")
    if bias_k is not None and not (static_k is None and static_v is None):
        raise ValueError(f"{name}: static_k and static_v must be None beside bias_k and bias_v")
    dropout_p = dropout_p if training else 0.0
    check_probability(name, "dropout_p", dropout_p)
    if not batch:
        query, key, value = each_once(lambda t: t.unsqueeze(1), query, key, value)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)

    if use_separate_proj_weight:
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        weights = q_proj_weight, k_proj_weight, v_proj_weight
        q, k, v = map(linear, (query, key, value), weights, biases)
    else:
        q, k, v = _projected_together(query, key, value, in_proj_weight, in_proj_bias)  # each (l or s, n, e)
    if bias_k is not None:
        k, v = (torch.cat([t, b.expand(1, t.shape[1], e)]) for t, b in ((k, bias_k), (v, bias_v)))
    q = _heads_first(q, num_heads)
    k = _heads_first(k, num_heads) if static_k is None else static_k.unflatten(0, (-1, num_heads))
    v = _heads_first(v, num_heads) if static_v is None else static_v.unflatten(0, (-1, num_heads))
    if add_zero_attn:
        k, v = (pad(t, (0, 0, 0, 1)) for t in (k, v))

    more = k.shape[-2] - s  # keys that every query may attend to
    implied = is_causal and key_padding_mask is None and not (need_weights or more or attn_mask.requires_grad)
    mask = None if implied else _merged(attn_mask, key_padding_mask, num_heads, query.dtype, need_weights)
    if mask is not None and more:
        mask = pad(mask, (0, more), value=float(mask.dtype is torch.bool))
    if need_weights:
        mask = None if mask is None else mask.to(q.dtype)
        weights = softmax(_matmul.matmul(q, k.mT, mask, 1 / math.sqrt(q.shape[-1])), -1)  # (n, h, l, s)
        weights = dropout(weights, dropout_p)
        o = _matmul.matmul(weights, v, None, 1.0)
    else:
        o, weights = scaled_dot_product_attention(q, k, v, mask, dropout_p, implied), None
    o = linear(o.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if need_weights and average_attn_weights:
        weights = weights.mean(1)
    if not batch:
        o, weights = o.squeeze(1), None if weights is None else weights.squeeze(0)
    return o, weights


def _check_sequences(
    name: str, query: Tensor, key: Tensor, value: Tensor, e: int, num_heads: int, separate: bool
) -> None:
    for argument, t in (("query", query), ("key", key), ("value", value)):
        if t.is_nested:
            raise NotImplementedError(f"{name}: {argument} must be a dense tensor, got a nested one")
    if query.dim() not in (2, 3) or query.shape[-1] != e:
        raise ValueError(
            f"{name}: query must have shape (l, n, {e}), or the same without n, got {shape_of(query)}"
        )
    if num_heads < 1 or e % num_heads:
        raise ValueError(f"{name}: num_heads must divide the {e} features of query, got {num_heads}")
    for argument, t in (("key", key), ("value", value)):
        shape = (*key.shape[:1], *query.shape[1:-1], *(t.shape[-1:] if separate else (e,)))
        if tuple(t.shape) != shape:
            raise ValueError(f"{name}: {argument} must have shape {shape}, got {shape_of(t)}")


def _projected_together(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """query (l, n, e), key and value (s, n, e), weight (3 e, e), bias (3 e,) -> q (l, n, e), k and v (s, n, e)."""
    if query is key and key is value:
        return linear(query, weight, bias).chunk(3, -1)
    e = query.shape[-1]
    sizes = (e, 2 * e) if key is value else (e, e, e)
    biases = (None,) * 3 if bias is None else bias.split(sizes)
    q, *kv = map(linear, (query, key, value), weight.split(sizes), biases)
    return (q, *(kv[0].chunk(2, -1) if key is value else kv))


def _heads_first(t: Tensor, num_heads: int) -> Tensor:
    """(s, n, e) -> (n, h, s, e / h)."""
    return t.unflatten(-1, (num_heads, t.shape[-1] // num_heads)).permute(1, 2, 0, 3)


def _merged(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, num_heads: int, dtype: torch.dtype, add: bool
) -> Tensor | None:
    """The masks as one that broadcasts to (n, h, l, s): boolean if both are, True takes part; else to be added."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.unflatten(0, (-1, num_heads)) if attn_mask.dim() == 3 else attn_mask)
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
    if not masks:
        return None
    if not add and all(m.dtype is torch.bool for m in masks):
        return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
    for i, m in enumerate(masks):
        if m.dtype is torch.bool:
            masks[i] = torch.zeros_like(m, dtype=dtype).masked_fill(m, -math.inf)
    return masks[0] if len(masks) == 1 else masks[0] + masks[1]
