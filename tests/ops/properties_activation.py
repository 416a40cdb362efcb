"""What hypothesis may draw for activations, gated products and dropouts."""

from __future__ import annotations

import cases_activation
import timm.layers
import torchvision.ops
from drawing import KINKS, Property, choice, elementwise
from hypothesis import strategies as st

from bptools.check.strategies import calls, shapes, tensors

# The arguments that hypothesis chooses from; of those that have none here, torch's defaults.
CHOICES = {
    "softplus": {"beta": choice(1.0, 0.5, 3.0), "threshold": choice(20.0, 1.0)},
    "elu": {"alpha": choice(1.0, 0.3, -0.3, 0.0)},
    "celu": {"alpha": choice(1.0, 0.3, -0.7)},
    "hardtanh": {"min_val": choice(-1.0, -0.3), "max_val": choice(1.0, 0.0)},
    "threshold": {"threshold": choice(0.0, 1.0, -0.7), "value": choice(0.0, -3.0, 2.0)},
    "hardshrink": {"lambd": choice(0.5, 1.0, 0.0, -0.5)},
    "softshrink": {"lambd": choice(0.5, 1.0, 0.0)},
}


@st.composite
def rrelu(draw):
    training = draw(st.booleans())
    layout = "contiguous" if training else None  # the numbers are drawn in the order of memory
    x = tensors(shapes(0, 4, min_side=0, max_side=4), layout=layout, numbers=KINKS)
    return draw(calls(x, 0.1, 0.4, training))


@st.composite
def prelu(draw):
    shape = draw(shapes(0, 4, min_side=0, max_side=4))
    channels = (shape[1],) if len(shape) > 1 else (1,)
    return draw(calls(tensors(shape, numbers=KINKS), tensors(draw(choice(channels, (1,), ())))))


@st.composite
def glu(draw):
    shape = draw(shapes(1, 4, min_side=0, max_side=3))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    doubled = list(shape)
    doubled[dim] *= 2
    return draw(calls(tensors(tuple(doubled)), dim))


@st.composite
def pair(draw, **constants):
    shape = draw(shapes(0, 3, min_side=0, max_side=4))
    return draw(calls(tensors(shape, numbers=KINKS), tensors(shape), **constants))


@st.composite
def softmax(draw, least=0, **constants):
    shape = draw(shapes(1, 4, min_side=least, max_side=4))
    dim = st.integers(-len(shape), len(shape) - 1)
    return draw(calls(tensors(shape, layout="contiguous"), dim=dim, **constants))


@st.composite
def drop(draw, dims, p="p", layout=None, **constants):
    """A tensor of so many dimensions, and a probability under its name."""
    shape = draw(shapes(dims[0], dims[-1], min_side=0, max_side=3).filter(lambda shape: len(shape) in dims))
    return draw(calls(tensors(shape, layout=layout), **{p: choice(0.0, 0.3, 1.0)}, **constants))


TRAINING = {"training": st.booleans()}

PROPERTIES = (
    *[
        Property(op, elementwise(**CHOICES.get(op, {})), theirs=cases_activation.THEIRS.get(op))
        for op in cases_activation.POINTWISE
        if op != "rrelu"
    ],
    Property("rrelu", rrelu()),
    Property("prelu", prelu()),
    Property("glu", glu()),
    Property("swiglu", pair(), theirs=cases_activation.GATED["swiglu"]),
    Property("geglu", pair(approximate=choice("none", "tanh")), theirs=cases_activation.GATED["geglu"]),
    Property("reglu", pair(), theirs=cases_activation.GATED["reglu"]),
    Property("softmin", softmax()),
    Property("gumbel_softmax", softmax(least=1, tau=choice(1.0, 0.3), hard=st.booleans())),
    Property("dropout1d", drop((2, 3), **TRAINING)),
    Property("dropout2d", drop((4,), **TRAINING)),
    Property("dropout3d", drop((4, 5), **TRAINING)),
    Property("alpha_dropout", drop((0, 1, 2, 3), layout="contiguous", **TRAINING)),
    Property("feature_alpha_dropout", drop((2, 3, 4), **TRAINING)),
    Property(
        "drop_path",
        drop((1, 2, 3), "drop_prob", scale_by_keep=st.booleans(), **TRAINING),
        theirs=timm.layers.drop_path,
    ),
    Property(
        "stochastic_depth",
        drop((1, 2, 3), mode=choice("row", "batch"), **TRAINING),
        theirs=torchvision.ops.stochastic_depth,
    ),
)
