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
]


def covering(op: str, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Deviation | None:
    """The deviation that says so, if one does."""
    return next((d for d in DEVIATIONS if d.op == op and d.kind == kind and d.when(*args, **kwargs)), None)
