"""What hypothesis may draw for the ops that most networks are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases_foundation
import torch
import torch.nn.functional as F
from drawing import KINKS, REDUCTION, SIDE, Property, choice, elementwise, optional
from hypothesis import strategies as st
from torch import Tensor

import bptools.functional as B
from bptools.check._tools import exact_copy
from bptools.check.strategies import calls, indices, shapes, tensors


@st.composite
def linear(draw):
    rows, i, o = draw(shapes(0, 2, min_side=0, max_side=3)), draw(st.integers(0, 4)), draw(SIDE)
    return draw(calls(tensors((*rows, i)), tensors((o, i)), optional(tensors((o,)))))


@st.composite
def bilinear(draw):
    rows, i, j, o = draw(shapes(0, 2, min_side=0, max_side=3)), draw(SIDE), draw(SIDE), draw(SIDE)
    return draw(calls(tensors((*rows, i)), tensors((*rows, j)), tensors((o, i, j)), optional(tensors((o,)))))


@st.composite
def convolution(draw, dims):
    groups, i, o = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    k, s, p, d = (
        tuple(draw(st.integers(low, high)) for _ in range(dims)) for low, high in ((1, 3), (1, 2), (0, 2), (1, 2))
    )
    size = [
        draw(st.integers(m := max(1, d * (k - 1) + 1 - 2 * p), m + 2)) for k, p, d in zip(k, p, d, strict=True)
    ]
    n = draw(choice((2,), (1,), (0,), ()))
    x, w = tensors((*n, groups * i, *size)), tensors((groups * o, i, *k))
    return draw(calls(x, w, optional(tensors((groups * o,))), s, p, d, groups))


@st.composite
def pool(draw, **constants):
    """An image, and windows that fit into it."""
    k = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    d = draw(st.tuples(st.integers(1, 2), st.integers(1, 2))) if "dilation" in constants else (1, 1)
    p = tuple(draw(st.integers(0, k // 2)) for k in k)
    size = [draw(st.integers(m := d * (k - 1) + 1, m + 2)) for k, d in zip(k, d, strict=True)]
    x = tensors((*draw(choice((2,), (0,), ())), draw(SIDE), *size), numbers=KINKS)
    constants |= {"dilation": d} if "dilation" in constants else {}
    stride = optional(st.integers(1, 3))
    return draw(calls(x, k, stride, p, ceil_mode=st.booleans(), **constants))


@st.composite
def adaptive_pool(draw):
    x = tensors((*draw(choice((2,), (0,), ())), *draw(shapes(3, 3))))
    return draw(calls(x, (optional(SIDE), optional(SIDE))))


@st.composite
def softmax(draw):
    shape = draw(shapes(1, 4, min_side=0, max_side=4))
    return draw(calls(tensors(shape, numbers=KINKS), st.integers(-len(shape), len(shape) - 1)))


@st.composite
def norm(draw, parameters, eps):
    shape = draw(shapes(1, 2, max_side=4))
    x = tensors((*draw(shapes(0, 2, min_side=0, max_side=3)), *shape), numbers=KINKS)
    return draw(calls(x, shape, *[optional(tensors(shape)) for _ in range(parameters)], eps=eps))


@st.composite
def batch_norm(draw):
    training = draw(st.booleans())
    n, c, size = draw(st.integers(2, 4)), draw(SIDE), draw(shapes(0, 2, max_side=3))
    layout = choice("contiguous", "offset", "padded") if training else None  # what is written to is not expanded
    buffers = [tensors((c,), layout=layout, numbers=kind, requires_grad=False) for kind in ("normal", "positive")]
    parameters = optional(tensors((c,))), optional(tensors((c,)))
    return draw(calls(tensors((n, c, *size), numbers=KINKS), *buffers, *parameters, training))


def with_buffers(functions: Any) -> Callable[..., tuple[Tensor, ...]]:
    """Batch norm that writes to copies of its running statistics, and returns them."""

    def batch_norm(x, mean, var, weight, bias, training):
        mean, var = exact_copy(mean), exact_copy(var)
        return functions.batch_norm(x, mean, var, weight, bias, training), mean, var

    return batch_norm


@st.composite
def embedding(draw):
    rows = draw(SIDE)
    places = indices(rows, shapes(0, 3, min_side=0), dtype=choice(torch.int64, torch.int32))
    return draw(calls(places, tensors((rows, draw(SIDE))), optional(st.integers(-rows, rows - 1))))


@st.composite
def cross_entropy(draw):
    c, rest = draw(SIDE), draw(shapes(0, 2, max_side=3))
    n = draw(st.integers(0, 4)) if rest else draw(choice(None, 0, 3))
    rows = () if n is None else (n, *rest)
    shape = (c,) if n is None else (n, c, *rest)
    constants = {"reduction": REDUCTION, "label_smoothing": choice(0.0, 0.3, 1.0)}
    x = tensors(shape, numbers=KINKS)
    if draw(st.booleans()):
        weight = optional(tensors((c,), numbers="positive", requires_grad=False))
        return draw(calls(x, indices(c, rows), weight, ignore_index=choice(-100, 0), **constants))
    target = tensors(shape, numbers="positive")
    return draw(calls(x, target, optional(tensors((c,), numbers="positive")), **constants))


@st.composite
def mse_loss(draw):
    shape = draw(shapes(0, 3, min_side=0))
    weight = optional(tensors(shape, numbers="positive"))
    return draw(calls(tensors(shape), tensors(shape), reduction=REDUCTION, weight=weight))


@st.composite
def dropout(draw):
    p = draw(choice(0.0, 0.3, 1.0))
    layout = "contiguous" if p == 0.3 else None  # as torch's, the numbers are drawn in the order of memory
    return draw(calls(tensors(shapes(0, 4, min_side=0, max_side=4), layout=layout), p, training=st.booleans()))


@st.composite
def attention(draw):
    kv_heads, group = (draw(st.integers(1, 2)), draw(st.integers(1, 2))) if draw(st.booleans()) else (2, 1)
    n, l, s = draw(choice((), (2,), (0,))), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    e, f = draw(SIDE), draw(SIDE)
    q, k = tensors((*n, kv_heads * group, l, e)), tensors((*n, kv_heads, s, e))
    constants = {"scale": choice(None, 0.7), "enable_gqa": group > 1}
    where = draw(choice((l, s), (1, s), (kv_heads * group, l, 1)))
    biased = ("bias",) if all((*n, l, s)) else ()  # torch's result of nothing has no history
    mask = draw(choice(None, "causal", "boolean", *biased))
    if mask == "causal":
        constants["is_causal"] = True
    elif mask is not None:
        constants["attn_mask"] = indices(2, where, torch.bool) if mask == "boolean" else tensors(where)
    return draw(calls(q, k, tensors((*n, kv_heads, s, f)), **constants))


PROPERTIES = (
    Property("linear", linear()),
    Property("bilinear", bilinear()),
    *[Property(f"conv{dims}d", convolution(dims)) for dims in (1, 2, 3)],
    Property("max_pool2d", pool(dilation=True, return_indices=st.booleans())),
    Property("avg_pool2d", pool(count_include_pad=st.booleans(), divisor_override=choice(None, 3))),
    Property("adaptive_avg_pool2d", adaptive_pool()),
    Property("relu", elementwise()),
    Property("leaky_relu", elementwise(negative_slope=choice(0.01, 0.3, -0.3))),
    Property("gelu", elementwise(approximate=choice("none", "tanh"))),
    Property("silu", elementwise()),
    Property("sigmoid", elementwise(), theirs=torch.sigmoid),
    Property("tanh", elementwise(), theirs=torch.tanh),
    Property("softmax", softmax()),
    Property("log_softmax", softmax()),
    Property("layer_norm", norm(2, choice(1e-5, 1e-3))),
    Property("rms_norm", norm(1, choice(None, 1e-3))),
    Property("batch_norm", batch_norm(), with_buffers(B), with_buffers(F)),
    Property("embedding", embedding()),
    Property("cross_entropy", cross_entropy()),
    Property("mse_loss", mse_loss()),
    Property("dropout", dropout()),
    Property("scaled_dot_product_attention", attention(), theirs=cases_foundation.attention),
)
