"""Defects 1 to 8: the Function is right only for tensors that lie in memory as its author expected."""
# ruff: noqa: D102  (forward, setup_context and backward are torch's names and mean here what they mean there)

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bptools.check.zoo._defect import Defect, Rule, fit, linear_gradients, normal, wide


def packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor of that shape."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


class Scale(Rule):
    """y = x s, by torch's broadcasting."""

    @staticmethod
    def forward(x, s):
        return x * s

    @staticmethod
    def backward(ctx, dy):
        x, s = ctx.saved_tensors
        dx = fit(wide(dy) * s, x) if ctx.needs_input_grad[0] else None
        ds = fit(wide(dy) * x, s) if ctx.needs_input_grad[1] else None
        return dx, ds


class ScaleBeforeSum(Scale):
    """Takes a gradient of stride 0 for that of a .sum()."""

    @staticmethod
    def backward(ctx, dy):
        if 0 in dy.stride():
            dy = torch.ones_like(dy)  # wrong: "a .sum() follows"; .mean() and many others expand as well
        return Scale.backward(ctx, dy)


class Sine(Rule):
    """y = sin x."""

    @staticmethod
    def forward(x):
        return torch.sin(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return fit(wide(dy) * torch.cos(wide(x)), x) if ctx.needs_input_grad[0] else None


class SineOfPackedGradient(Sine):
    """Reads the gradient as a kernel does that is given a pointer and no strides."""

    @staticmethod
    def backward(ctx, dy):
        dy = dy.as_strided(dy.shape, packed(dy.shape))  # wrong: dy may be a slice of something wider
        return Sine.backward(ctx, dy)


class Sigmoid(Rule):
    """y = 1 / (1 + exp(-x))."""

    @staticmethod
    def forward(x):
        return torch.sigmoid(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(wide(x))
        return fit(wide(dy) * s * (1 - s), x) if ctx.needs_input_grad[0] else None


class SigmoidOfPackedInput(Sigmoid):
    """Reads the input as a kernel does that is given a pointer and no strides."""

    @staticmethod
    def forward(x):
        return torch.sigmoid(x.as_strided(x.shape, packed(x.shape)))  # wrong: x may be transposed or a slice


class Cosine(Rule):
    """y = cos x."""

    @staticmethod
    def forward(x):
        return torch.cos(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return fit(-wide(dy) * torch.sin(wide(x)), x) if ctx.needs_input_grad[0] else None


class CosineOfExpandedInput(Cosine):
    """Sums over the dimensions along which the input was expanded, which the engine will do again."""

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx = Cosine.backward(ctx, dy)
        for dim, stride in enumerate(x.stride()):
            if stride == 0 and dx is not None:
                dx = dx.sum(dim, keepdim=True).expand(x.shape).contiguous()  # wrong: expand's backward sums
        return dx


class Centre(Rule):
    """y = x - mean(x), the mean over all elements."""

    @staticmethod
    def forward(x):
        return (wide(x) - wide(x).mean()).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return fit(wide(dy) - wide(dy).mean(), x) if ctx.needs_input_grad[0] else None


class CentreOfSomething(Centre):
    """Divides by the number of elements in Python, where it may be zero."""

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        weight = 1 / x.numel()  # wrong: an empty batch raises ZeroDivisionError
        return fit(wide(dy) - wide(dy).sum() * weight, x) if ctx.needs_input_grad[0] else None


class Affine(Rule):
    """y = x w + b, elementwise, by torch's broadcasting."""

    @staticmethod
    def forward(x, w, b):
        dtype = torch.promote_types(torch.promote_types(x.dtype, w.dtype), b.dtype)
        return (wide(x) * wide(w) + wide(b)).to(dtype)

    @staticmethod
    def backward(ctx, dy):
        x, w, b = ctx.saved_tensors
        dx = fit(wide(dy) * w, x) if ctx.needs_input_grad[0] else None
        dw = fit(wide(dy) * x, w) if ctx.needs_input_grad[1] else None
        db = fit(wide(dy), b) if ctx.needs_input_grad[2] else None
        return dx, dw, db


class AffineOfFullBias(Affine):
    """Returns the gradient of the bias before it is summed."""

    @staticmethod
    def backward(ctx, dy):
        dx, dw, db = Affine.backward(ctx, dy)
        if db is not None:
            db = dy.to(db.dtype).contiguous()  # wrong: of dy's shape, not of b's; the engine sums in silence
        return dx, dw, db


class AffineInDouble(Affine):
    """Sums the gradient of w in float64 and leaves it there."""

    @staticmethod
    def backward(ctx, dy):
        x, w, _ = ctx.saved_tensors
        dx, dw, db = Affine.backward(ctx, dy)
        if dw is not None:
            dw = (dy.double() * x.double()).sum_to_size(w.shape).contiguous()  # wrong: not cast back to w's dtype
        return dx, dw, db


class Linear(Rule):
    """y = x wᵀ + b."""

    @staticmethod
    def forward(x, w, b):
        return F.linear(x, w, b)

    @staticmethod
    def backward(ctx, dy):
        return linear_gradients(dy, *ctx.saved_tensors, ctx.needs_input_grad)


class LinearTransposed(Linear):
    """Returns the gradient of a row-major weight column-major."""

    @staticmethod
    def backward(ctx, dy):
        dx, dw, db = Linear.backward(ctx, dy)
        if dw is not None:
            dw = dw.t().contiguous().t()  # wrong: as (xᵀ dy)ᵀ gives it; DDP's and optimizers' fast paths trip
        return dx, dw, db


def affine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """x w + b."""
    return x * w + b


DEFECTS = (
    Defect(
        1,
        "expanded-gradient",
        "an expanded grad_output is mistaken for the ones of a .sum()",
        ScaleBeforeSum,
        Scale,
        normal([(3, 5), (5,)], [(2, 3, 4), (3, 1)]),
        torch.mul,
    ),
    Defect(
        2,
        "packed-gradient",
        "grad_output is read as if it were contiguous",
        SineOfPackedGradient,
        Sine,
        normal([(3, 5)], [(2, 3, 4)]),
        torch.sin,
    ),
    Defect(
        3,
        "packed-input",
        "the input is read as if it were contiguous",
        SigmoidOfPackedInput,
        Sigmoid,
        normal([(3, 5)], [(2, 3, 4)]),
        torch.sigmoid,
    ),
    Defect(
        4,
        "expanded-input",
        "the gradient of an expanded input is summed by the Function and by the engine",
        CosineOfExpandedInput,
        Cosine,
        normal([(3, 5)], [(2, 3, 4)]),
        torch.cos,
    ),
    Defect(
        5,
        "size-zero",
        "backward divides by the number of elements and raises when there is none",
        CentreOfSomething,
        Centre,
        normal([(3, 5)], [(2, 3, 4)]),
        lambda x: x - x.mean(),
    ),
    Defect(
        6,
        "unreduced-gradient",
        "the gradient of a broadcast bias is returned in the output's shape",
        AffineOfFullBias,
        Affine,
        normal([(3, 5), (5,), (5,)], [(2, 3, 4), (4,), (3, 1)]),
        affine,
    ),
    Defect(
        7,
        "gradient-dtype",
        "the gradient of a parameter is returned in float64 whatever the parameter's dtype",
        AffineInDouble,
        Affine,
        normal([(3, 5), (5,), (5,)], [(2, 3, 4), (4,), (4,)]),
        affine,
    ),
    Defect(
        8,
        "gradient-strides",
        "the gradient of a contiguous weight has transposed strides",
        LinearTransposed,
        Linear,
        normal([(3, 5), (4, 5), (4,)], [(2, 3, 4), (5, 4), (5,)]),
        F.linear,
    ),
)
