"""What hypothesis may draw for the norms beyond those of the foundation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cases_norm
from drawing import KINKS, SIDE, Property, choice, optional
from hypothesis import strategies as st

import bptools.functional as B
from bptools.check._tools import exact_copy
from bptools.check.strategies import calls, shapes, tensors

EPS = choice(1e-5, 1e-3)


@st.composite
def group_norm(draw):
    groups, n, size = draw(st.integers(1, 3)), draw(st.integers(2, 3)), draw(shapes(0, 2, max_side=3))
    c = groups * draw(st.integers(1, 3))
    x = tensors((n, c, *size), numbers=KINKS)
    return draw(calls(x, groups, *[optional(tensors((c,))) for _ in range(2)], EPS))


@st.composite
def instance_norm(draw):
    c, tracking = draw(SIDE), draw(st.booleans())
    size = (
        draw(st.integers(3, 4)),
        *draw(shapes(0, 1, max_side=3)),
    )  # of two places the gradient is rounding alone
    layout = choice("contiguous", "offset", "padded")  # what is written to is not expanded
    running = [tensors((c,), layout=layout, numbers=kind, requires_grad=False) for kind in ("normal", "positive")]
    parameters = optional(tensors((c,))), optional(tensors((c,)))
    x = tensors((draw(st.integers(1, 3)), c, *size), numbers=KINKS)
    return draw(calls(x, *(running if tracking else (None, None)), *parameters, not tracking or st.booleans()))


def with_buffers(functions: Any) -> Callable[..., tuple[Any, ...]]:
    """Instance norm that writes to copies of its running statistics, and returns them."""

    def instance_norm(x, mean, var, *rest):
        running = [] if mean is None else [exact_copy(mean), exact_copy(var)]
        return functions.instance_norm(x, *(running or (None, None)), *rest), *running

    return instance_norm


@st.composite
def local_response_norm(draw):
    x = tensors(draw(shapes(3, 5, max_side=3)), numbers=KINKS)
    return draw(calls(x, st.integers(1, 7), choice(1e-4, 0.5), choice(0.75, 0.5), choice(1.0, 2.0)))


@st.composite
def normalize(draw):
    shape = draw(shapes(1, 3, min_side=1, max_side=4))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    x = tensors(shape, numbers=choice("normal", "whole"))
    return draw(calls(x, choice(2.0, 1.0, 3.0, math.inf, 1.5), dim if len(shape) < 3 else (0, -1), 1e-12))


@st.composite
def add_norm(draw, parameters, eps):
    shape = draw(shapes(1, 2, max_side=4))
    whole = (*draw(shapes(0, 2, min_side=0, max_side=3)), *shape)
    terms = [tensors(whole, numbers=KINKS) for _ in range(2)]
    return draw(calls(*terms, shape, *[optional(tensors(shape)) for _ in range(parameters)], eps=eps))


@st.composite
def sync_batch_norm(draw):
    n, c, size = draw(st.integers(2, 4)), draw(SIDE), draw(shapes(0, 2, max_side=3))
    parameters = optional(tensors((c,))), optional(tensors((c,)))
    return draw(calls(tensors((n, c, *size), numbers=KINKS), *parameters))


@st.composite
def weight_norm(draw):
    shape = draw(shapes(2, 4, max_side=3))
    dim = draw(st.integers(-1, len(shape) - 1))
    g = () if dim == -1 else tuple(size if d == dim else 1 for d, size in enumerate(shape))
    return draw(calls(tensors(shape), tensors(g), dim))


@st.composite
def spectral_norm(draw):
    shape = draw(shapes(2, 4, max_side=3))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    u, v = (
        tensors((size,), numbers="positive", requires_grad=False)
        for size in (shape[dim], math.prod(shape) // shape[dim])
    )
    return draw(calls(tensors(shape, numbers="positive"), u, v, dim))  # a sum that cancels has no digits


PROPERTIES = (
    Property("group_norm", group_norm()),
    Property("instance_norm", instance_norm(), with_buffers(B), with_buffers(cases_norm.F)),
    Property("local_response_norm", local_response_norm()),
    Property("normalize", normalize()),
    Property("add_layer_norm", add_norm(2, EPS), theirs=cases_norm.add_layer_norm),
    Property("add_rms_norm", add_norm(1, choice(None, 1e-3)), theirs=cases_norm.add_rms_norm),
    Property("sync_batch_norm", sync_batch_norm(), cases_norm.alone, cases_norm.batch_norm),
    Property("weight_norm", weight_norm(), theirs=cases_norm.weight_norm),
    Property("spectral_norm", spectral_norm(), theirs=cases_norm.spectral_norm),
)
