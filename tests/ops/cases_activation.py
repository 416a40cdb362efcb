"""Cases of activations, gated products and dropouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from case import CAPABILITIES, EMPTY, NO_HESSIAN, Case, call
from timm.layers import drop_path
from torch import Tensor
from torchvision.ops import stochastic_depth

# The arguments of each in its first case, which is compiled in the default suite, and in a second.
POINTWISE: dict[str, tuple[dict[str, Any], ...]] = {
    "logsigmoid": ({},),
    "tanhshrink": ({},),
    "softsign": ({},),
    "softplus": ({"beta": 2.0, "threshold": 1.0}, {}),
    "elu": ({"alpha": 0.7}, {"alpha": -0.7}, {"alpha": 0.0}),
    "selu": ({},),
    "celu": ({"alpha": 0.7}, {"alpha": -1.3}),
    "mish": ({},),
    "hardtanh": ({"min_val": -0.7, "max_val": 0.3},),
    "relu6": ({},),
    "hardsigmoid": ({},),
    "hardswish": ({},),
    "threshold": ({"threshold": 0.3, "value": -0.2}, {"threshold": 0.3, "value": 0.9}),
    "hardshrink": ({"lambd": 0.3}, {"lambd": -0.3}),
    "softshrink": ({"lambd": 0.3}, {"lambd": 0.0}),
    "rrelu": ({"lower": 0.1, "upper": 0.3},),
}
# The gated products that torch lacks, written out: gate and up are x and y.
GATED: dict[str, Callable[..., Tensor]] = {
    "swiglu": lambda x, y: F.silu(x) * y,
    "geglu": lambda x, y, approximate="none": F.gelu(x, approximate=approximate) * y,
    "reglu": lambda x, y: F.relu(x) * y,
}


def celu(x: Tensor, alpha: float) -> Tensor:
    """Celu by way of elu: torch's own gradient computes 1 / alpha in float32, see test_peers."""
    return torch.ops.aten.elu(x, alpha, 1, 1 / alpha)


def hardsigmoid(x: Tensor) -> Tensor:
    """Hardsigmoid by way of relu6: torch's own cannot be differentiated twice."""
    return F.relu6(x + 3) / 6


THEIRS = {"celu": celu, "hardsigmoid": hardsigmoid}  # else torch's of that name

CASES: list[Case] = [
    *[
        Case(op, "-".join(["plain", *map(str, kwargs.values())]), call(3, 5, **kwargs), theirs=THEIRS.get(op))
        for op, options in POINTWISE.items()
        for kwargs in options
    ],
    *[
        Case(op, id, call(*shape, **kwargs), theirs=THEIRS.get(op), only=EMPTY)
        for op, (kwargs, *_) in POINTWISE.items()
        for id, shape in (("scalar", ()), ("empty", (0, 3)))
    ],
    # rrelu in training
    Case("rrelu", "training", call(3, 5, training=True), random=True, raises=NO_HESSIAN),
    # prelu
    Case("prelu", "channels", lambda t: ((t(2, 3, 4), t(3)), {})),
    Case("prelu", "one", lambda t: ((t(3, 5), t(1)), {})),
    Case("prelu", "vector", lambda t: ((t(5), t()), {})),
    Case("prelu", "scalar", lambda t: ((t(), t(1)), {}), only=EMPTY),
    Case("prelu", "empty", lambda t: ((t(0, 3, 2), t(3)), {}), only=EMPTY),
    # glu and what torch lacks
    Case("glu", "last", call(3, 4)),
    Case("glu", "middle", call(2, 6, 3, dim=1)),
    Case("glu", "empty", call(0, 4, dim=-1), only=EMPTY),
    *[
        case
        for op, theirs in GATED.items()
        for case in (
            Case(op, "matrix", lambda t: ((t(3, 5), t(3, 5)), {}), theirs=theirs),
            Case(op, "empty", lambda t: ((t(0, 5), t(0, 5)), {}), theirs=theirs, only=EMPTY),
        )
    ],
    Case("geglu", "tanh", lambda t: ((t(3, 5), t(3, 5)), {"approximate": "tanh"}), theirs=GATED["geglu"]),
    # softmin and gumbel_softmax
    Case("softmin", "last", call(3, 5, dim=-1)),
    Case("softmin", "cast", call(2, 3, 4, dim=1, dtype=torch.float64), only=("values", "half", "autocast")),
    Case("softmin", "no-rows", call(0, 3, dim=1), only=EMPTY),
    Case("gumbel_softmax", "soft", call(3, 5, tau=0.7), random=True, raises=NO_HESSIAN),
    Case(
        "gumbel_softmax",
        "hard",
        call(2, 4, 3, tau=2.0, hard=True, dim=1),
        random=True,
        raises=NO_HESSIAN,
        # not "gradcheck": the gradient passes straight through what is flat; for the same reason not "jvp"
        only=tuple(c for c in CAPABILITIES if c not in ("gradcheck", "gradgradcheck", "jvp")),
    ),
    Case("gumbel_softmax", "no-rows", call(0, 3, hard=True), random=True, only=EMPTY),
    # dropouts
    Case("dropout1d", "batch", call(3, 4, 2, p=0.3), random=True, raises=NO_HESSIAN),
    Case("dropout1d", "one-sample", call(4, 3), random=True, only=("values", "gradcheck", "masks")),
    Case("dropout2d", "images", call(2, 3, 2, 2, p=0.3), random=True, raises=NO_HESSIAN),
    Case("dropout2d", "all", call(2, 3, 2, 2, p=1.0), random=True, only=("values", "gradcheck", "masks")),
    Case("dropout3d", "batch", call(2, 3, 2, 1, 2, p=0.3), random=True, raises=NO_HESSIAN),
    Case("dropout3d", "one-sample", call(3, 2, 1, 2), random=True, only=("values", "gradcheck", "masks")),
    Case("alpha_dropout", "training", call(3, 5, p=0.3, training=True), random=True, raises=NO_HESSIAN),
    Case("alpha_dropout", "all", call(3, 5, p=1.0, training=True), random=True, only=("values", "gradcheck")),
    Case("alpha_dropout", "empty", call(0, 5, training=True), random=True, only=EMPTY),
    Case(
        "feature_alpha_dropout",
        "images",
        call(2, 3, 2, 2, p=0.3, training=True),
        random=True,
        raises=NO_HESSIAN,
    ),
    Case(
        "drop_path",
        "scaled",
        call(4, 3, drop_prob=0.3, training=True),
        theirs=drop_path,
        random=True,
        raises=NO_HESSIAN,
    ),
    Case(
        "drop_path",
        "unscaled",
        call(4, 3, drop_prob=0.3, training=True, scale_by_keep=False),
        theirs=drop_path,
        random=True,
        only=("values", "gradcheck"),
    ),
    Case(
        "stochastic_depth",
        "row",
        call(4, 3, p=0.3, mode="row"),
        theirs=stochastic_depth,
        random=True,
        raises=NO_HESSIAN,
    ),
    Case(
        "stochastic_depth",
        "batch",
        call(4, 3, p=0.3, mode="batch"),
        theirs=stochastic_depth,
        random=True,
        only=("values", "gradcheck"),
    ),
]
