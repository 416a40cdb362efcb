"""What a case of the op contract is: a call of our function and of torch's, with the same arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bptools.functional as B

# capability -> (what it says, the auditor's checks that ask for it, whether torch's function is the truth)
CAPABILITIES: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "values": (
        "value, every gradient and every second derivative equal torch's",
        ("values", "gradients", "linearity", "precision", "double_backward"),
        True,
    ),
    "gradcheck": ("numerical derivative, float64", ("gradients",), False),
    "gradgradcheck": ("numerical second derivative, float64", ("double_backward",), False),
    "extremes": (
        "small and large numbers, kinks, infinities and subnormals: right where torch's are",
        ("magnitudes", "kinks", "special_values"),
        True,
    ),
    "layouts": (
        "strided, offset, expanded, NaN-padded inputs and gradients; sizes of zero",
        ("grad_layouts", "input_layouts", "empty"),
        True,
    ),
    "masks": (
        "every combination of frozen inputs and undefined gradients; each gradient as its input is",
        (
            "masks",
            "raw_gradients",
            "unused_outputs",
            "non_differentiable",
            "shared_gradients",
            "same_tensor_twice",
        ),
        False,
    ),
    "half": ("float32, bf16 and fp16: error at most twice torch's; no overflow", ("dtypes", "overflow"), True),
    "autocast": ("forward and backward under autocast, with torch's dtypes", ("autocast",), True),
    "jvp": ("forward mode", ("jvp",), False),
    "vmap": ("equals a loop, and so do batched gradients", ("vmap", "batched_gradients"), False),
    "func": ("torch.func: vjp, hessian, jacrev over jacfwd", ("func", "hessian"), True),
    "compile": (
        "torch.compile(fullgraph=True), forward and backward, with static and dynamic sizes",
        ("compiled", "compiled_dynamic"),
        False,
    ),
    "hygiene": (
        "no argument written; nothing leaks; backward twice, interleaved, checkpointed, under hooks",
        (
            "mutation",
            "saved_tensors",
            "leaks",
            "modified_later",
            "backward_twice",
            "determinism",
            "randomness",
            "interleaved",
            "checkpoint",
            "saved_tensor_hooks",
        ),
        False,
    ),
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
        raises: check of the auditor -> (exception, pattern) that must be raised instead.
        only: the capabilities that this case is run for; all, if empty.
        random: draws random numbers.
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


def call(*shape: int, **kwargs: Any) -> Callable[[Maker], tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of an op of one tensor of this shape and some constants."""
    return lambda t: ((t(*shape),), kwargs)


NO_HESSIAN = {"hessian": (RuntimeError, "randomness error mode")}  # torch.func.hessian cannot be told another
EMPTY = ("values", "masks", "layouts")  # what can be said of zero-size inputs
