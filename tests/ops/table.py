"""The one table of cases that the op contract runs over.

A case is a call: of our function and of torch's, with the same arguments. An op may have many cases; together they
are its row in the support matrix. To add an op, add its cases to `CASES`; see CONTRIBUTING.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bptools.functional as B

CAPABILITIES = {
    "values": "value and every gradient equal torch's",
    "gradcheck": "numerical derivative, float64",
    "gradgradcheck": "numerical second derivative, float64",
    "layouts": "strided, expanded, NaN-padded inputs and gradients",
    "masks": "every combination of frozen inputs; no gradient and no memory for the frozen",
    "half": "bf16 and fp16: error at most twice torch's",
    "autocast": "torch's dtypes under autocast",
    "jvp": "forward mode",
    "vmap": "equals a loop",
    "func": "torch.func: grad, jacrev over jacfwd, hessian",
    "compile": "torch.compile(fullgraph=True), forward and backward",
    "hygiene": "no input, gradient or buffer written; nothing leaks; backward twice; checkpointing",
}


class Maker:
    """Makes the tensors of a case: reproducible, of one floating dtype."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, grad: bool = True) -> Tensor:
        """Normal numbers of this shape, differentiable unless `grad=False`."""
        numbers = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return numbers.to(self.dtype).requires_grad_(grad)

    def positive(self, *shape: int, grad: bool = True) -> Tensor:
        """Numbers between 0.5 and 1.5."""
        numbers = torch.rand(shape, generator=self.generator, dtype=torch.float64) + 0.5
        return numbers.to(self.dtype).requires_grad_(grad)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers from 0 to high - 1."""
        return torch.randint(high, shape, generator=self.generator)

    def booleans(self, *shape: int) -> Tensor:
        """True two times in three."""
        return torch.rand(shape, generator=self.generator) < 0.67


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        op: the row of the support matrix, and the name of the function unless `ours` and `theirs` are given.
        id: what is particular about this case.
        make: from a Maker to (args, kwargs). Floating tensors made with grad=True are differentiated.
        ours, theirs: the functions to compare.
        raises: capability -> (exception, pattern) that must be raised instead.
        only: the capabilities that this case is run for; all, if empty.
        random: draws random numbers: the seed is set before each call.
    """

    op: str
    id: str
    make: Callable[[Maker], tuple[tuple[Any, ...], dict[str, Any]]]
    ours: Callable[..., Tensor] | None = None
    theirs: Callable[..., Tensor] | None = None
    raises: Mapping[str, tuple[type[Exception], str]] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    random: bool = False

    def __str__(self) -> str:
        return f"{self.op}-{self.id}"

    def plain(self, whose: str) -> Callable[..., Tensor]:
        """Our function or torch's."""
        given = self.ours if whose == "ours" else self.theirs
        return given or getattr(B if whose == "ours" else F, self.op)

    def function(self, whose: str) -> Callable[..., Tensor]:
        """The same, seeded before each call if it draws random numbers."""
        call = self.plain(whose)
        if not self.random:
            return call

        def seeded(*args, **kwargs):
            torch.manual_seed(0)
            return call(*args, **kwargs)

        return seeded


def call(*shape: int, **kwargs: Any) -> Callable[[Maker], tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of an op of one tensor of this shape and some constants."""
    return lambda t: ((t(*shape),), kwargs)


EMPTY = ("values", "masks", "layouts")  # what can be said of zero-size inputs

CASES: list[Case] = [
    # linear
    Case("linear", "bias", lambda t: ((t(3, 5), t(4, 5), t(4)), {})),
    Case("linear", "no-bias", lambda t: ((t(2, 3, 5), t(4, 5)), {})),
    Case("linear", "vector-input", lambda t: ((t(5), t(4, 5), t(4)), {})),
    Case("linear", "vector-weight", lambda t: ((t(3, 5), t(5)), {})),
    Case("linear", "no-rows", lambda t: ((t(0, 5), t(4, 5), t(4)), {}), only=EMPTY),
    Case("linear", "no-features", lambda t: ((t(3, 0), t(4, 0), t(4)), {}), only=EMPTY),
    # activations
    *[
        case
        for op in ("relu", "leaky_relu", "gelu", "silu", "sigmoid", "tanh")
        for case in (
            Case(op, "matrix", call(3, 5), theirs=getattr(torch, op, None)),
            Case(op, "scalar", call(), theirs=getattr(torch, op, None), only=EMPTY),
            Case(op, "empty", call(0, 3), theirs=getattr(torch, op, None), only=EMPTY),
        )
    ],
    Case("leaky_relu", "slope", call(7, negative_slope=0.3)),
    Case("leaky_relu", "negative-slope", call(7, negative_slope=-0.3)),
    Case("gelu", "approximate", call(3, 5, approximate="tanh")),
    # layer_norm
    Case("layer_norm", "affine", lambda t: ((t(3, 5), (5,), t(5), t(5)), {})),
    Case("layer_norm", "plain", lambda t: ((t(2, 3, 5), (3, 5)), {"eps": 1e-3})),
    Case("layer_norm", "weight-only", lambda t: ((t(2, 3, 5), [3, 5], t(3, 5)), {})),
    Case("layer_norm", "one-row", lambda t: ((t(5), (5,), t(5), t(5)), {})),
    Case("layer_norm", "no-rows", lambda t: ((t(0, 5), (5,), t(5), t(5)), {}), only=EMPTY),
]
