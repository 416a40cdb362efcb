"""What an entry of the zoo is, and what its Functions share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Defect:
    """One way in which an autograd.Function goes wrong: a broken Function, its correct twin and the truth.

    `broken` and `correct` are autograd.Functions of the same signature. `samples(device, dtype, seed)` yields
    `(args, kwargs)`; tensors that are differentiated require grad. `reference` is a plain function of the same
    arguments, differentiated by autograd. `visible` is "cuda" where the CPU gives the right answer.
    """

    number: int
    name: str
    title: str
    broken: Any
    correct: Any
    samples: Callable
    reference: Callable
    visible: str = "cpu"


class Rule(torch.autograd.Function):
    """A Function that saves its inputs, all of them tensors, and that torch may vmap by itself."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Save the inputs: what backward computes from them is differentiable again."""
        ctx.save_for_backward(*inputs)


class FromOutput(Rule):
    """A Function of one tensor that saves its output: what backward computes from that is differentiable again."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Save the output, and the input's dtype: y's is another where autocast computes in float32."""
        ctx.save_for_backward(output)
        ctx.dtype = inputs[0].dtype


def wide(x: Tensor) -> Tensor:
    """x in the dtype to compute in: float32 for the halves, else its own."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def fit(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient as x wants it: summed over what was broadcast, of x's dtype, contiguous."""
    return gradient.sum_to_size(x.shape).to(x.dtype).contiguous()


def draw(generator: torch.Generator, shape: tuple[int, ...], device, dtype) -> Tensor:
    """Random normal numbers, the same in each dtype and on each device but for rounding."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def normal(*rows: list) -> Callable:
    """`samples` of one call for each row; a tuple in a row is a tensor's shape, the rest is constant."""

    def samples(device="cpu", dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        for row in rows:
            yield (
                tuple(
                    draw(generator, part, device, dtype).requires_grad_() if isinstance(part, tuple) else part
                    for part in row
                ),
                {},
            )

    return samples


def over_rows(dy: Tensor, x: Tensor) -> Tensor:
    """dy (..., o), x (..., i) -> dyᵀ x (o, i), summed over all dimensions but the last."""
    rows = tuple(range(dy.dim() - 1))
    return torch.tensordot(dy, x, dims=(rows, rows))


def linear_gradients(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, needs) -> tuple[Tensor | None, ...]:
    """dy (..., o), x (..., i), weight (o, i), bias (o) -> dx (..., i), dw (o, i), db (o) or None."""
    dy = dy.to(weight.dtype)  # under autocast dy is of another dtype than the parameters
    dx = fit(dy @ weight, x) if needs[0] else None
    dw = fit(over_rows(dy, x), weight) if needs[1] else None
    db = fit(wide(dy), bias) if needs[2] else None
    return dx, dw, db
