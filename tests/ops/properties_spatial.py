"""What hypothesis may draw for transposed convolutions, padding, unfold and fold, interpolation and shuffles."""

from __future__ import annotations

from drawing import KINKS, SIDE, Property, choice, optional
from hypothesis import strategies as st

from bptools.check.strategies import calls, shapes, tensors


@st.composite
def transposed(draw, dims):
    groups, i, o = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    k, s, p, d, size = (
        tuple(draw(st.integers(low, high)) for _ in range(dims))
        for low, high in ((1, 3), (1, 3), (0, 1), (1, 2), (2, 3))
    )
    p = tuple(min(p, ((i - 1) * s + d * (k - 1)) // 2) for p, i, s, d, k in zip(p, size, s, d, k, strict=True))
    more = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(s, d, strict=True))
    n = draw(choice((2,), (1,), (0,), ()))
    x, w = tensors((*n, groups * i, *size)), tensors((groups * i, o, *k))
    return draw(calls(x, w, optional(tensors((groups * o,))), s, p, more, groups, d))


@st.composite
def pad(draw):
    mode = draw(choice("constant", "reflect", "replicate", "circular"))
    if mode == "constant":
        shape = draw(shapes(1, 4, min_side=0, max_side=4))
        padded = [draw(ends(i, least=-i, most=2)) for i in reversed(shape[draw(st.integers(0, len(shape))) :])]
        value = draw(choice(None, 0.5, -1))
        return draw(calls(tensors(shape), [n for pair in padded for n in pair], value=value))
    size = draw(shapes(1, 3, min_side=2, max_side=4))
    most = {"reflect": lambda i: i - 1, "replicate": lambda i: 5, "circular": lambda i: i}[mode]
    padded = [draw(ends(i, least=0 if mode == "circular" else 1 - i, most=most(i))) for i in reversed(size)]
    shape = (*draw(choice((2,), (0,), ())), draw(SIDE), *size)
    return draw(calls(tensors(shape, numbers=KINKS), [n for pair in padded for n in pair], mode))


@st.composite
def ends(draw, size, least, most):
    """Places added before and after so many, or cropped, but not more than there are."""
    before = draw(st.integers(least, most))
    return before, draw(st.integers(least - min(before, 0), most))


@st.composite
def window(draw):
    """The size of an image, and windows that fit into it: kernel_size, dilation, padding, stride."""
    k, d, p, s = (
        tuple(draw(st.integers(low, high)) for _ in range(2)) for low, high in ((1, 3), (1, 2), (0, 2), (1, 3))
    )
    size = [
        draw(st.integers(m := max(1, d * (k - 1) + 1 - 2 * p), m + 2)) for k, p, d in zip(k, p, d, strict=True)
    ]
    return size, (k, d, p, s)


@st.composite
def unfold(draw):
    size, constants = draw(window())
    return draw(calls(tensors((*draw(choice((2,), (0,), ())), draw(SIDE), *size)), *constants))


@st.composite
def fold(draw):
    size, (k, d, p, s) = draw(window())
    out = [(i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, d, p, s in zip(size, k, d, p, s, strict=True)]
    columns = draw(st.integers(1, 2)) * k[0] * k[1], out[0] * out[1]
    return draw(calls(tensors((*draw(choice((2,), (0,), ())), *columns)), size, k, d, p, s))


@st.composite
def shuffle(draw, deep):
    """An image of factor² channels for each that it will have, or of factor places."""
    r, c, h, w = (draw(st.integers(1, 3)) for _ in range(4))
    image = (c * r * r, h, w) if deep else (c, h * r, w * r)
    return draw(calls(tensors((*draw(shapes(0, 1, max_side=2)), *image)), r))


@st.composite
def channels(draw):
    groups = draw(st.integers(1, 3))
    x = tensors((draw(st.integers(0, 2)), groups * draw(st.integers(1, 3)), *draw(shapes(1, 2, max_side=3))))
    return draw(calls(x, groups))


@st.composite
def interpolate(draw):
    mode, dims = draw(
        choice(
            *[("nearest", 2), ("nearest-exact", 2), ("linear", 1), ("bilinear", 2), ("trilinear", 3)],
            *[("bicubic", 2), ("area", 1), ("area", 2), ("area", 3)],
        )
    )
    size = draw(shapes(dims, dims, min_side=1, max_side=5))
    constants = {"mode": mode}
    if mode == "nearest" or draw(st.booleans()):
        constants["size"] = draw(shapes(dims, dims, min_side=1, max_side=6))
    else:  # not nearly 1: torch's gradient is wrong then, see test_peers
        constants["scale_factor"] = draw(choice(1.0, 2.0, 3.0, 2.5))
    if mode in ("linear", "bilinear", "trilinear", "bicubic"):
        constants["align_corners"] = draw(choice(None, True, False))
    if mode in ("bilinear", "bicubic"):
        constants["antialias"] = draw(st.booleans())
    if constants.get("antialias") and constants.get("size", size)[1] == 1:
        constants["antialias"] = False  # torch's result is wrong where the width becomes 1, see test_peers
    x = tensors((draw(st.integers(0, 2)), draw(st.integers(1, 2)), *size))
    return draw(calls(x, **constants))


PROPERTIES = (
    *[Property(f"conv_transpose{dims}d", transposed(dims)) for dims in (1, 2, 3)],
    Property("pad", pad()),
    Property("unfold", unfold()),
    Property("fold", fold()),
    Property("pixel_shuffle", shuffle(deep=True)),
    Property("pixel_unshuffle", shuffle(deep=False)),
    Property("channel_shuffle", channels()),
    Property("interpolate", interpolate()),
)
