"""Cases of the losses and distances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from case import EMPTY, Case, Maker
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

import bptools.functional as B


def signs(t: Maker, *shape: int) -> Tensor:
    """1 or -1, in the floating dtype."""
    return (2 * t.booleans(*shape) - 1).to(t.dtype)


def shares(t: Maker, *shape: int, grad: bool = True) -> Tensor:
    """Numbers between 0.25 and 0.75."""
    return (t.positive(*shape, grad=False) / 2).requires_grad_(grad)


def logs(t: Maker, *shape: int) -> Tensor:
    """Logarithms of probabilities, along the last dimension."""
    return t(*shape, grad=False).log_softmax(-1).requires_grad_()


def squashed(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss of probabilities as one of logits, input and target: any number is one."""
    return lambda x, target, *args, **kwargs: loss(torch.sigmoid(x), torch.sigmoid(target), *args, **kwargs)


def of_deviation(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss of a variance as one of its root: any number is one."""
    return lambda x, target, root, **kwargs: loss(x, target, root * root + 0.1, **kwargs)


def behind_log_softmax(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """CTC's loss as it is used. Torch's gradient is right there alone."""
    return lambda x, *args, **kwargs: loss(torch.log_softmax(x, -1), *args, **kwargs)


def multi_margin(x, target, p=1, margin=1.0, weight=None, reduction="mean"):
    """Torch's multi_margin_loss, which cannot be differentiated twice, written out."""
    x = cast(x)
    rows, t = x.reshape(-1, x.shape[-1]), target.reshape(-1, 1)
    h = (margin - rows.gather(1, t) + rows).clamp_min(0) ** p
    h = h.scatter(1, t, 0).mean(1)
    return reduced(h if weight is None else weight[t[:, 0]] * h, reduction).reshape(
        target.shape if reduction == "none" else ()
    )


def multilabel_margin(x, target, reduction="mean"):
    """Torch's multilabel_margin_loss, which cannot be differentiated twice, written out."""
    losses, x = [], cast(x)
    for row, labels in zip(x.reshape(-1, x.shape[-1]), target.reshape(-1, x.shape[-1]), strict=True):
        labels = labels.tolist()
        labels = labels[: labels.index(-1)] if -1 in labels else labels
        others = [c for c in range(len(row)) if c not in labels]
        terms = [(1 - row[j] + row[c]).clamp_min(0) for j in labels for c in others]
        losses.append(sum(terms, 0 * row.sum()) / len(row))
    losses = torch.stack(losses).reshape(x.shape[:-1])
    return reduced(losses, reduction)


def logistic(x, target, reduction="mean"):
    """Torch's soft_margin_loss, written out so that it does not overflow."""
    return reduced(-F.logsigmoid(target * x), reduction)


def cosine(x1, x2, dim, eps):
    """Torch's cosine_similarity, written out."""
    lengths = [torch.linalg.vector_norm(x, 2, dim, keepdim=True).clamp_min(eps) for x in (x1, x2)]
    return (x1 / lengths[0] * (x2 / lengths[1])).sum(dim)


def cast(x: Tensor) -> Tensor:
    """What autocast makes of the input of one of torch's losses."""
    return x.float() if torch.is_autocast_enabled("cpu") and x.dtype is not torch.float64 else x


def reduced(rows: Tensor, reduction: str) -> Tensor:
    return {"none": lambda: rows, "mean": rows.mean, "sum": rows.sum}[reduction]()


def dice(x, target, smooth=1.0, reduction="mean"):
    """Dice's loss, written out."""
    x, target = x.flatten(2), target.flatten(2)
    overlap = (2 * (x * target).sum(-1) + smooth) / (x.sum(-1) + target.sum(-1) + smooth)
    return reduced(1 - overlap, reduction)


def wide(penalty: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A penalty of each of the tensors, in float32 at least."""

    def total(*tensors):
        return sum(penalty(w.to(torch.promote_types(w.dtype, torch.float32))).sum() for w in tensors)

    return total


LISTS = torch.tensor([[1, 3, -1, 0], [2, -1, 2, 2], [-1, 0, 1, 2]])
LABELS = torch.tensor([[1, 2], [2, 2], [1, 3]])
LENGTHS = torch.tensor([4, 5, 3]), torch.tensor([2, 2, 1])


def pair(op: str, *shape: int, target: Callable[..., Tensor] = Maker.__call__, **kwargs: Any) -> list[Case]:
    """An input and a target of one shape: with each reduction, of which one has other constants, and empty."""
    return [
        Case(op, "mean", lambda t: ((t(*shape), target(t, *shape)), {})),
        Case(op, "none", lambda t: ((t(2, 3), target(t, 2, 3)), {"reduction": "none", **kwargs})),
        Case(op, "empty", lambda t: ((t(0, 3), target(t, 0, 3)), {"reduction": "sum"}), only=EMPTY),
    ]


CASES: list[Case] = [
    # nll_loss
    Case("nll_loss", "matrix", lambda t: ((t(4, 5), t.integers(5, 4)), {})),
    Case(
        "nll_loss",
        "image",
        lambda t: (
            (t(2, 3, 2, 2), t.integers(3, 2, 2, 2), t.positive(3, grad=False)),
            {"ignore_index": 1, "reduction": "none"},
        ),
    ),
    Case("nll_loss", "one-row", lambda t: ((t(5), t.integers(5)), {"reduction": "sum"})),
    Case("nll_loss", "no-rows", lambda t: ((t(0, 3), t.integers(3, 0)), {}), only=EMPTY),
    # errors
    *pair("l1_loss", 3, 4),
    Case(
        "l1_loss",
        "weight",
        lambda t: ((t(3, 4), t(3, 4)), {"weight": t.positive(3, 4)}),
    ),
    *pair("smooth_l1_loss", 3, 4, beta=0.4),
    *pair("huber_loss", 3, 4, delta=0.4),
    Case("huber_loss", "weight", lambda t: ((t(3, 4), t(3, 4)), {"weight": t.positive(3, 4)})),
    # likelihoods
    Case(
        "binary_cross_entropy",
        "mean",
        lambda t: ((t(3, 4), shares(t, 3, 4)), {}),
        squashed(B.binary_cross_entropy),
        squashed(F.binary_cross_entropy),
    ),
    Case(
        "binary_cross_entropy",
        "weight",
        lambda t: ((t(3, 4), shares(t, 3, 4), t.positive(4, grad=False)), {"reduction": "none"}),
        squashed(B.binary_cross_entropy),
        squashed(F.binary_cross_entropy),
    ),
    *pair("binary_cross_entropy_with_logits", 3, 4, target=shares),
    Case(
        "binary_cross_entropy_with_logits",
        "weights",
        lambda t: (
            (t(3, 4), shares(t, 3, 4), t.positive(3, 1, grad=False)),
            {"pos_weight": t.positive(4, grad=False)},
        ),
    ),
    Case("kl_div", "batchmean", lambda t: ((logs(t, 3, 4), shares(t, 3, 4)), {"reduction": "batchmean"})),
    Case("kl_div", "logs", lambda t: ((logs(t, 3, 4), logs(t, 4)), {"reduction": "none", "log_target": True})),
    Case("kl_div", "empty", lambda t: ((t(0, 4), shares(t, 0, 4)), {"reduction": "sum"}), only=EMPTY),
    Case(
        "gaussian_nll_loss",
        "mean",
        lambda t: ((t(3, 4), t(3, 4), t.positive(3, 4)), {}),
        of_deviation(B.gaussian_nll_loss),
        of_deviation(F.gaussian_nll_loss),
    ),
    Case(
        "gaussian_nll_loss",
        "full",
        lambda t: ((t(3, 4), t(3, 4), t.positive(3)), {"full": True, "reduction": "none", "eps": 1e-3}),
        of_deviation(B.gaussian_nll_loss),
        of_deviation(F.gaussian_nll_loss),
    ),
    Case("poisson_nll_loss", "mean", lambda t: ((t(3, 4), t.positive(3, 4)), {})),
    Case(
        "poisson_nll_loss",
        "full",
        lambda t: (
            (t.positive(3, 4), 2 * t.positive(3, 4, grad=False)),
            {"log_input": False, "full": True, "reduction": "none", "eps": 1e-2},
        ),
    ),
    # distances
    Case("cosine_similarity", "rows", lambda t: ((t(3, 5), t(3, 5)), {})),
    Case(
        "cosine_similarity",
        "middle",
        lambda t: ((t(2, 3, 2), t(3, 1)), {"dim": -2, "eps": 1.5}),
        theirs=cosine,  # torch differentiates the length where its lower bound has taken its place
    ),
    Case("pairwise_distance", "rows", lambda t: ((t(3, 5), t(3, 5)), {})),
    Case("pairwise_distance", "city", lambda t: ((t(3, 5), t(5)), {"p": 1, "keepdim": True})),
    Case("pairwise_distance", "cubic", lambda t: ((t(3, 5), t(3, 5)), {"p": 3, "eps": 0.1})),
    Case("pairwise_distance", "largest", lambda t: ((t(3, 5), t(3, 5)), {"p": torch.inf})),
    # margins
    Case("margin_ranking_loss", "mean", lambda t: ((t(5), t(5), signs(t, 5)), {"margin": 0.3})),
    Case("margin_ranking_loss", "none", lambda t: ((t(2, 3), t(2, 1), t(2, 3)), {"reduction": "none"})),
    *pair("hinge_embedding_loss", 3, 4, target=signs, margin=0.5),
    *pair("soft_margin_loss", 3, 4, target=signs),
    Case("cosine_embedding_loss", "mean", lambda t: ((t(4, 3), t(4, 3), signs(t, 4)), {})),
    Case(
        "cosine_embedding_loss",
        "none",
        lambda t: ((t(4, 3), t(4, 3), signs(t, 4)), {"margin": 0.2, "reduction": "none"}),
    ),
    Case("triplet_margin_loss", "mean", lambda t: ((t(4, 3), t(4, 3), t(4, 3)), {})),
    Case(
        "triplet_margin_loss",
        "swap",
        lambda t: (
            (t(4, 3), t(4, 3), t(4, 3)),
            {"margin": 2.0, "p": 3, "eps": 1e-3, "swap": True, "reduction": "none"},
        ),
    ),
    Case("triplet_margin_with_distance_loss", "mean", lambda t: ((t(4, 3), t(4, 3), t(4, 3)), {})),
    Case(
        "triplet_margin_with_distance_loss",
        "swap",
        lambda t: (
            (t(4, 3), t(4, 3), t(4, 3)),
            {"distance_function": lambda a, b: (a - b).square().sum(1), "swap": True, "reduction": "sum"},
        ),
    ),
    Case("multi_margin_loss", "mean", lambda t: ((t(4, 3), t.integers(3, 4)), {}), theirs=multi_margin),
    Case(
        "multi_margin_loss",
        "square",
        lambda t: ((t(4, 3), t.integers(3, 4), 2, 0.7, t.positive(3, grad=False)), {"reduction": "none"}),
        theirs=multi_margin,
    ),
    Case("multilabel_margin_loss", "mean", lambda t: ((t(3, 4), LISTS), {}), theirs=multilabel_margin),
    Case(
        "multilabel_margin_loss",
        "none",
        lambda t: ((t(3, 4), LISTS), {"reduction": "none"}),
        theirs=multilabel_margin,
    ),
    Case("multilabel_soft_margin_loss", "mean", lambda t: ((t(3, 4), shares(t, 3, 4)), {})),
    Case(
        "multilabel_soft_margin_loss",
        "none",
        lambda t: ((t(3, 4), shares(t, 3, 4), t.positive(4)), {"reduction": "none"}),
    ),
    # ctc_loss
    *[
        Case(
            "ctc_loss",
            id,
            lambda t, more=more: ((t(5, 3, 4), LABELS, *LENGTHS), more),
            behind_log_softmax(B.ctc_loss),
            behind_log_softmax(F.ctc_loss),
            only=only,
        )
        for id, more, only in (
            (
                "mean",
                {},
                (
                    "gradcheck",
                    "gradgradcheck",
                    "layouts",
                    "masks",
                    "autocast",
                    "jvp",
                    "vmap",
                    "compile",
                    "hygiene",
                ),
            ),
            ("none", {"reduction": "none"}, ("gradcheck", "masks")),
        )
    ],
    # what torch lacks
    Case(
        "focal_loss",
        "none",
        lambda t: ((t(3, 4), shares(t, 3, 4)), {}),
        theirs=sigmoid_focal_loss,
    ),
    Case(
        "focal_loss",
        "mean",
        lambda t: ((t(3, 4), shares(t, 3, 4)), {"alpha": -1, "gamma": 0.5, "reduction": "mean"}),
        theirs=sigmoid_focal_loss,
    ),
    Case("dice_loss", "mean", lambda t: ((shares(t, 2, 3, 4), shares(t, 2, 3, 4)), {}), theirs=dice),
    Case(
        "dice_loss",
        "none",
        lambda t: ((shares(t, 2, 1, 2, 2), shares(t, 2, 1, 2, 2)), {"smooth": 0.1, "reduction": "none"}),
        theirs=dice,
    ),
    Case(
        "l1_penalty",
        "two",
        lambda t: ((t(3, 2), t(4)), {}),
        lambda *w: B.l1_penalty(w),
        wide(torch.abs),
    ),
    Case(
        "l2_penalty",
        "two",
        lambda t: ((t(3, 2), t(4)), {}),
        lambda *w: B.l2_penalty(w),
        wide(lambda w: w.square() / 2),
    ),
]
