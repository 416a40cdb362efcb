"""What hypothesis may draw for pooling in other dimensions than two, and its rarer kinds."""

from __future__ import annotations

import torch
from cases_pooling import unpooling
from drawing import KINKS, SIDE, Property, choice, optional
from hypothesis import strategies as st

from bptools.check.strategies import calls, tensors


@st.composite
def pool(draw, dims, norm_type=None, dilated=False, padded=True, **constants):
    """A signal of some dimensions, and windows that fit into it."""
    k = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    # torch's max_pool3d fails for one volume in some layouts, its lp_pool1d for a kernel size in a tuple
    batch = draw(choice((2,), (0,), *[()] * (dims < 3)))
    d = tuple(draw(st.integers(1, 2)) if dilated else 1 for _ in range(dims))
    p = tuple(draw(st.integers(0, k // 2)) for k in k)
    size = [draw(st.integers(m := d * (k - 1) + 1, m + 2)) for k, d in zip(k, d, strict=True)]
    x = tensors((*batch, draw(SIDE), *size), numbers=KINKS if norm_type is None else "positive")
    constants |= {"dilation": d} if dilated else {}
    constants |= {"padding": p} if padded else {}
    before = () if norm_type is None else (norm_type,)
    return draw(calls(x, *before, k[0] if dims == 1 else k, optional(st.integers(1, 3)), **constants))


@st.composite
def adaptive(draw, dims, **constants):
    x = tensors((*draw(choice((2,), (0,), ())), draw(SIDE), *(draw(SIDE) for _ in range(dims))), numbers=KINKS)
    return draw(calls(x, draw(SIDE) if dims == 1 else tuple(draw(SIDE) for _ in range(dims)), **constants))


@st.composite
def fractional(draw, dims):
    k, out = (tuple(draw(st.integers(1, 3)) for _ in range(dims)) for _ in range(2))
    size = [draw(st.integers(o + k, o + k + 1)) for o, k in zip(out, k, strict=True)]
    n, c = draw(st.integers(1, 2)), draw(SIDE)
    samples = torch.rand(n, c, dims, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    x = tensors((n, c, *size), numbers=KINKS, dtype=torch.float32)
    return draw(calls(x, k, out, _random_samples=samples))


@st.composite
def unpool(draw, dims):
    """Windows that do not overlap, so that no place is written twice."""
    k = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    x = tensors((draw(SIDE), draw(SIDE), *(k * draw(st.integers(1, 2)) for k in k)))
    return draw(calls(x, k))


PROPERTIES = (
    Property("max_pool1d", pool(1, dilated=True, ceil_mode=st.booleans(), return_indices=st.booleans())),
    Property("max_pool3d", pool(3, dilated=True, ceil_mode=st.booleans(), return_indices=st.booleans())),
    *[Property(f"adaptive_max_pool{dims}d", adaptive(dims, return_indices=st.booleans())) for dims in (1, 2, 3)],
    *[Property(f"fractional_max_pool{dims}d", fractional(dims)) for dims in (2, 3)],
    *[Property(f"max_unpool{dims}d", unpool(dims), *unpooling(dims)) for dims in (1, 2, 3)],
    Property("avg_pool1d", pool(1, ceil_mode=st.booleans(), count_include_pad=st.booleans())),
    Property("avg_pool3d", pool(3, ceil_mode=st.booleans(), divisor_override=choice(None, 3))),
    *[Property(f"adaptive_avg_pool{dims}d", adaptive(dims)) for dims in (1, 3)],
    *[
        Property(
            f"lp_pool{dims}d",
            pool(dims, norm_type=choice(1.0, 2.0, 3.0), padded=False, ceil_mode=st.booleans()),
        )
        for dims in (1, 2, 3)
    ],
)
