"""What a property of an op is: the calls that hypothesis may draw, and the functions that must agree on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bptools
import bptools.functional as B
from bptools.check.strategies import Call, calls, same_gradients, shapes, tensors

SIDE = st.integers(1, 4)
KINKS = st.sampled_from(["normal", "whole", "zeros"])  # 0 where a derivative jumps, and ties
REDUCTION = st.sampled_from(["mean", "sum", "none"])


def elementwise(**constants: Any) -> st.SearchStrategy[Call]:
    return calls(tensors(shapes(0, 4, min_side=0, max_side=4), numbers=KINKS), **constants)


def optional(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | strategy


def choice(*values: Any) -> st.SearchStrategy:
    return st.sampled_from(values)


@dataclass(frozen=True)
class Property:
    """An op's name, the strategy of its calls, and what is compared if not the functions of that name."""

    op: str
    calls: st.SearchStrategy[Call]
    ours: Callable[..., Any] | None = None
    theirs: Callable[..., Any] | None = None

    def __str__(self) -> str:
        return self.op

    def hold(self, tier: str, how: settings) -> None:
        ours, theirs = self.ours or getattr(B, self.op), self.theirs or getattr(F, self.op)

        @how
        @given(self.calls)
        def same(call):
            with bptools.backend(tier):
                same_gradients(ours, theirs, call)

        same()
