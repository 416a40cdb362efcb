"""Where our functions do not do what torch's do with PyTorch's own sample inputs, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Deviation:
    """A difference that is meant.

    Attributes:
        op: the function.
        kind: `"refuses"`: ours raises where torch gives a result; `"accepts"`: the reverse, of a call that
            PyTorch's suite wants to fail; `"differs"`: both give results, and not the same ones.
        reason: why.
        when: of the call's arguments: whether the deviation is to be expected there.
    """

    op: str
    kind: str
    reason: str
    when: Callable[..., bool] = lambda *args, **kwargs: True


DEVIATIONS: list[Deviation] = [
    Deviation(
        "batch_norm",
        "refuses",
        "an input of one dimension has no channels: torch takes it if it is empty",
        lambda input, *args, **kwargs: input.dim() < 2,
    ),
    Deviation(
        "multi_head_attention_forward",
        "refuses",
        "bias_k and bias_v must have shape (1, 1, embed_dim), as the module makes them: torch stretches others",
        lambda *args, **kwargs: args[7] is not None and args[7].dim() != 3,
    ),
    Deviation(
        "ctc_loss",
        "differs",
        "the gradient is the derivative with respect to log_probs; torch's is that with respect to what a "
        "log_softmax before them was given, even where there is none: behind a log_softmax both are the same",
    ),
    Deviation("CTCLoss", "differs", "as ctc_loss"),
    *[
        Deviation(
            op,
            "refuses",
            "target is compared and has no derivative: torch takes one that requires a gradient and gives it none",
            lambda *args, **kwargs: args[2 if len(args) > 2 else 1].requires_grad,
        )
        for op in ("cosine_embedding_loss", "hinge_embedding_loss")
    ],
    Deviation(
        "pairwise_distance",
        "refuses",
        "p must be at least 0, or it is no distance",
        lambda *args, **kwargs: kwargs.get("p", 2.0) < 0,
    ),
    *[
        Deviation(
            op,
            "refuses",
            "an input of one row has a target without dimensions, and has a dimension: torch takes others for one",
            lambda input, target, *args, **kwargs: input.dim() != target.dim() + 1,
        )
        for op in ("multi_margin_loss", "multilabel_margin_loss")
    ],
]

# Functions that PyTorch's suite draws samples for and that are not here.
ABSENT = {
    "grid_sample": "not written yet",
    "one_hot": "gives integers: nothing to differentiate, torch's serves",
    "pdist": "not written yet; pairwise_distance takes pairs",
    "upsample_bilinear": "deprecated by torch for interpolate",
    "upsample_nearest": "deprecated by torch for interpolate",
}


def covering(op: str, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Deviation | None:
    """The deviation that says so, if one does."""
    return next((d for d in DEVIATIONS if d.op == op and d.kind == kind and d.when(*args, **kwargs)), None)
