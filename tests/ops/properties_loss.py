"""What hypothesis may draw for the losses and distances."""

from __future__ import annotations

from typing import Any

import cases_loss
import torch
import torch.nn.functional as F
from drawing import KINKS, REDUCTION, SIDE, Property, choice, optional
from hypothesis import strategies as st
from torchvision.ops import sigmoid_focal_loss

import bptools.functional as B
from bptools.check.strategies import calls, indices, shapes, tensors

BY_ONE = 1.0  # no magnitude but this: what is squared or divided by a constant has one


@st.composite
def pairs(draw, numbers="normal", target="normal", magnitude=None, weight=None, **constants: Any):
    """An input and a target of one shape, and perhaps a weight."""
    shape = draw(shapes(0, 3, min_side=0))
    x = tensors(shape, numbers=numbers, magnitude=magnitude)
    t = tensors(shape, numbers=target, magnitude=BY_ONE)
    weights = {} if weight is None else {weight: optional(tensors(shape, numbers="positive", magnitude=BY_ONE))}
    return draw(calls(x, t, reduction=REDUCTION, **weights, **constants))


@st.composite
def signed(draw, **constants: Any):
    shape = draw(shapes(0, 3, min_side=0))
    sign = draw(indices(2, shape)) * 2 - 1
    return draw(calls(tensors(shape), sign, reduction=REDUCTION, **constants))


@st.composite
def nll_loss(draw):
    c, rest = draw(SIDE), draw(shapes(0, 2, max_side=3))
    n = draw(st.integers(0, 4))
    weight = optional(tensors((c,), numbers="positive", requires_grad=False))
    options = {"ignore_index": choice(-100, 0), "reduction": REDUCTION}
    return draw(calls(tensors((n, c, *rest)), indices(c, (n, *rest)), weight, **options))


@st.composite
def vectors(draw, count, *more, **constants: Any):
    shape = (draw(st.integers(0, 4)), draw(SIDE))
    return draw(calls(*[tensors(shape, magnitude=BY_ONE) for _ in range(count)], *more, **constants))


@st.composite
def ranking(draw):
    shape = draw(shapes(0, 3, min_side=0))
    sign = draw(indices(2, shape)) * 2 - 1
    return draw(calls(tensors(shape), tensors(shape), sign, margin=choice(0.0, 0.5), reduction=REDUCTION))


@st.composite
def cosines(draw):
    n = draw(st.integers(0, 4))
    x = tensors((n, draw(SIDE)), magnitude=BY_ONE)
    sign = draw(indices(2, (n,))) * 2 - 1
    return draw(calls(x, x, sign, margin=choice(0.0, 0.5), reduction=REDUCTION))


@st.composite
def multi_margin(draw):
    n, c = draw(st.integers(1, 4)), draw(SIDE)
    weight = optional(tensors((c,), numbers="positive", requires_grad=False))
    return draw(calls(tensors((n, c)), indices(c, (n,)), choice(1, 2), 1.0, weight, reduction=REDUCTION))


@st.composite
def multilabel_margin(draw):
    n, c = draw(st.integers(1, 3)), draw(SIDE)
    return draw(calls(tensors((n, c)), draw(indices(c + 1, (n, c))) - 1, reduction=REDUCTION))


@st.composite
def ctc(draw):
    t, n, c, s = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(2, 4)), draw(st.integers(1, 3))
    steps, labels = draw(indices(t, (n,))) + 1, draw(indices(s + 1, (n,)))
    targets = draw(indices(c - 1, (n, s))) + 1
    options = {"zero_infinity": True, "reduction": REDUCTION}
    return draw(calls(tensors((t, n, c), magnitude=BY_ONE), targets, steps, labels, **options))


@st.composite
def images(draw):
    shape = (2, *draw(shapes(2, 3)))
    x = tensors(shape, numbers="positive", magnitude=BY_ONE)
    return draw(calls(x, x, smooth=choice(1.0, 0.1), reduction=REDUCTION))


PROPERTIES = (
    Property("nll_loss", nll_loss()),
    Property("l1_loss", pairs(numbers=KINKS, weight="weight")),
    Property("smooth_l1_loss", pairs(beta=choice(0.0, 0.5, 1.0))),
    Property("huber_loss", pairs(delta=choice(0.5, 1.0), weight="weight")),
    Property(
        "binary_cross_entropy",
        pairs(magnitude=BY_ONE),  # where a logarithm is under -100, the target's gradient is not that of torch's
        cases_loss.squashed(B.binary_cross_entropy),
        cases_loss.squashed(F.binary_cross_entropy),
    ),
    Property("binary_cross_entropy_with_logits", pairs(target="positive")),
    Property("kl_div", pairs(target="positive").filter(lambda call: call.kwargs["reduction"] != "mean")),
    Property("poisson_nll_loss", vectors(2, full=st.booleans(), reduction=REDUCTION)),
    Property(
        "gaussian_nll_loss",
        shapes(1, 3).flatmap(
            lambda s: calls(
                *[tensors(s, magnitude=BY_ONE)] * 2,
                tensors(s, numbers="positive", magnitude=BY_ONE),
                full=st.booleans(),
                reduction=REDUCTION,
            )
        ),
    ),
    Property("cosine_similarity", vectors(2)),
    Property("pairwise_distance", vectors(2, choice(1, 2, 3, torch.inf), keepdim=st.booleans())),
    Property("margin_ranking_loss", ranking()),
    Property("hinge_embedding_loss", signed(margin=choice(0.5, 1.0))),
    Property("soft_margin_loss", signed(), theirs=cases_loss.logistic),  # torch's overflows, see test_peers
    Property("cosine_embedding_loss", cosines()),
    Property("triplet_margin_loss", vectors(3, p=choice(1, 2), swap=st.booleans(), reduction=REDUCTION)),
    Property("triplet_margin_with_distance_loss", vectors(3, swap=st.booleans(), reduction=REDUCTION)),
    Property("multi_margin_loss", multi_margin()),
    Property("multilabel_margin_loss", multilabel_margin()),
    Property("multilabel_soft_margin_loss", vectors(3, reduction=REDUCTION)),
    Property(
        "ctc_loss",
        ctc(),
        cases_loss.behind_log_softmax(B.ctc_loss),
        cases_loss.behind_log_softmax(F.ctc_loss),
    ),
    Property("focal_loss", pairs(target="positive", gamma=choice(2, 1.0)), theirs=sigmoid_focal_loss),
    Property("dice_loss", images(), theirs=cases_loss.dice),
    Property("l1_penalty", calls(tensors(), tensors()), lambda *w: B.l1_penalty(w), cases_loss.wide(torch.abs)),
    Property(
        "l2_penalty",
        calls(tensors(), tensors()),
        lambda *w: B.l2_penalty(w),
        cases_loss.wide(lambda w: w.square() / 2),
    ),
)
