"""Bad input to the losses and distances."""

from __future__ import annotations

import torch

import bptools.functional as B

x = torch.randn(3, 5)
t = torch.tensor([0, 1, 4])

DEVIATIONS = dict.fromkeys(("dice_loss", "focal_loss", "l1_penalty", "l2_penalty"), "torch.nn.functional has none")

# A call, the exception, and what its message must say.
ERRORS = {
    **{
        f"{f.__name__}: reduction": (
            lambda f=f, args=args: f(*args, reduction="all"),
            ValueError,
            "reduction must be .* got 'all'",
        )
        for f, args in (
            (B.nll_loss, (x, t)),
            (B.l1_loss, (x, x)),
            (B.kl_div, (x, x)),
            (B.ctc_loss, (x, t, [3], [2])),
        )
    },
    "huber_loss: delta": (lambda: B.huber_loss(x, x, delta=0), ValueError, "delta must be positive, got 0"),
    "smooth_l1_loss: beta": (lambda: B.smooth_l1_loss(x, x, beta=-1), ValueError, "beta must .* got -1"),
    "soft_margin_loss: size_average": (
        lambda: B.soft_margin_loss(x, x, size_average=True),
        ValueError,
        "size_average is deprecated",
    ),
    "nll_loss: class": (lambda: B.nll_loss(x, t + 1), IndexError, "target must hold classes, 0 to 4.*got 1 to 5"),
    "nll_loss: target": (lambda: B.nll_loss(x, t[:2]), ValueError, r"target must have shape \(3,\), got \(2,\)"),
    "nll_loss: weight": (lambda: B.nll_loss(x, t, x[0, :3]), ValueError, r"weight must have shape \(5,\), got"),
    "l1_loss: weight": (lambda: B.l1_loss(x, x, weight=x[0]), ValueError, r"weight must .* got \(5,\)"),
    "binary_cross_entropy: input": (
        lambda: B.binary_cross_entropy(x.abs() + 1, x),
        ValueError,
        "input must be from 0 to 1",
    ),
    "binary_cross_entropy_with_logits: target": (
        lambda: B.binary_cross_entropy_with_logits(x, x[0]),
        ValueError,
        r"target must have input's shape \(3, 5\), got \(5,\)",
    ),
    "binary_cross_entropy_with_logits: pos_weight": (
        lambda: B.binary_cross_entropy_with_logits(x, x, pos_weight=x[0, :2]),
        ValueError,
        r"pos_weight must broadcast .* got \(2,\)",
    ),
    "gaussian_nll_loss: var": (lambda: B.gaussian_nll_loss(x, x, -x.abs() - 1), ValueError, "var must not be neg"),
    "gaussian_nll_loss: shape": (lambda: B.gaussian_nll_loss(x, x, x[0].abs()), ValueError, r"var .* got \(5,\)"),
    "poisson_nll_loss: target": (lambda: B.poisson_nll_loss(x, x[:2]), ValueError, r"target must .* got \(2, 5\)"),
    "cosine_similarity: dim": (lambda: B.cosine_similarity(x, x, 2), IndexError, "dim must .* got 2"),
    "pairwise_distance: p": (lambda: B.pairwise_distance(x, x, -1), ValueError, "p must be at least 0, got -1"),
    "triplet_margin_loss: margin": (
        lambda: B.triplet_margin_loss(x, x, x, margin=0),
        ValueError,
        "margin must be positive, got 0",
    ),
    "multi_margin_loss: p": (lambda: B.multi_margin_loss(x, t, p=3), ValueError, "p must be 1 or 2, got 3"),
    "multi_margin_loss: class": (lambda: B.multi_margin_loss(x, t + 1), IndexError, "0 to 4, got 1 to 5"),
    "multilabel_margin_loss: target": (
        lambda: B.multilabel_margin_loss(x, t),
        ValueError,
        r"target must have input's shape .* got \(3,\)",
    ),
    "margin_ranking_loss: dims": (
        lambda: B.margin_ranking_loss(x, x, x[0]),
        ValueError,
        "as many dimensions as input1",
    ),
    "cosine_embedding_loss: target": (
        lambda: B.cosine_embedding_loss(x, x, x),
        ValueError,
        r"got \(3, 5\), \(3, 5\) and \(3, 5\)",
    ),
    "ctc_loss: blank": (lambda: B.ctc_loss(x, t, [3], [2], blank=5), ValueError, "blank must .* got 5"),
    "ctc_loss: lengths": (
        lambda: B.ctc_loss(x, t, [4], [2]),
        ValueError,
        r"input_lengths must be from 0 to 3, got \[4\]",
    ),
    "focal_loss: alpha": (lambda: B.focal_loss(x, x, alpha=2), ValueError, "alpha must .* got 2"),
    "dice_loss: places": (lambda: B.dice_loss(x, x), ValueError, r"input must have shape .* got \(3, 5\)"),
    "l2_penalty: nothing": (lambda: B.l2_penalty([]), ValueError, "parameters must be .* got none"),
}
