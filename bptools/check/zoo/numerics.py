"""Defects 29 to 38: the numbers are wrong, in some dtype, at some magnitude, or in one element."""
# ruff: noqa: D102  (forward, setup_context and backward are torch's names and mean here what they mean there)

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from bptools.check.zoo._defect import Defect, FromOutput, Rule, draw, fit, normal, wide
from bptools.check.zoo.state import EPS, RMSNormPlain, Tanh

SLOPE = 0.25


class SiLU(Rule):
    """y = x σ(x)."""

    @staticmethod
    def forward(x):
        return F.silu(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        xf = wide(x)
        s = torch.sigmoid(xf)
        return fit(wide(dy) * s * (1 + xf * (1 - s)), x) if ctx.needs_input_grad[0] else None


class SiLUInFloat(SiLU):
    """Computes the gradient in float32, whatever comes in."""

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        xf = x.float()  # wrong: narrows float64
        s = torch.sigmoid(xf)
        return fit(dy.float() * s * (1 + xf * (1 - s)), x) if ctx.needs_input_grad[0] else None


class TanhFastPath(Tanh):
    """Has a path of its own for every dtype but the one that gradcheck is run with."""

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        if x.dtype == torch.float64:
            return Tanh.backward(ctx, dy)
        y = torch.tanh(wide(x))
        return fit(wide(dy) * (1 - y), x) if ctx.needs_input_grad[0] else None  # wrong: y is not squared


class RMSNormSquaredInHalf(RMSNormPlain):
    """Squares before it widens: 65504 is the largest float16, and 256² is beyond it."""

    @staticmethod
    def forward(x):
        rstd = torch.rsqrt(wide(x * x).mean(-1, keepdim=True) + EPS)  # wrong: x * x is still float16
        return (wide(x) * rstd).to(x.dtype)


class Exp2(FromOutput):
    """y = 2ˣ, whose derivative is y ln 2."""

    @staticmethod
    def forward(x):
        return torch.exp2(x)

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return fit(wide(dy) * y * math.log(2), y).to(ctx.dtype) if ctx.needs_input_grad[0] else None


class Exp2Rounded(Exp2):
    """Mistypes a constant: the gradient is off by 5e-4 of itself."""

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        ln2 = 0.6935  # wrong: ln 2 is 0.693147...
        return fit(wide(dy) * y * ln2, y).to(ctx.dtype) if ctx.needs_input_grad[0] else None


class RowNorm(Rule):
    """y = √Σx², over the last dimension; the gradient at 0 is 0."""

    @staticmethod
    def forward(x):
        return torch.linalg.vector_norm(wide(x), dim=-1).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        norm = torch.linalg.vector_norm(wide(x), dim=-1, keepdim=True)
        unit = wide(x) / torch.where(norm == 0, 1, norm)
        return fit(wide(dy).unsqueeze(-1) * unit, x) if ctx.needs_input_grad[0] else None


class RowNormClamped(RowNorm):
    """Guards the division by a constant that is not small beside small values."""

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        norm = torch.linalg.vector_norm(wide(x), dim=-1, keepdim=True)
        unit = wide(x) / norm.clamp(min=1e-6)  # wrong: no unit vector when the norm is 1e-7
        return fit(wide(dy).unsqueeze(-1) * unit, x) if ctx.needs_input_grad[0] else None


class Softsign(Rule):
    """y = x / (1 + |x|)."""

    @staticmethod
    def forward(x):
        return (wide(x) / (1 + wide(x).abs())).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        r = 1 / (1 + wide(x).abs())
        return fit(wide(dy) * r * r, x) if ctx.needs_input_grad[0] else None


class SoftsignTiled(Softsign):
    """Masks its tiles as a kernel does, by one too few."""

    @staticmethod
    def backward(ctx, dy):
        dx = Softsign.backward(ctx, dy)
        if dx is None:
            return None
        offsets = torch.arange(dx.numel(), device=dx.device).view(dx.shape)
        return torch.where(offsets < dx.numel() - 1, dx, 0)  # wrong: offsets < n is the mask


class Softplus(Rule):
    """y = log(1 + exp x)."""

    @staticmethod
    def forward(x):
        xf = wide(x)
        return (xf.clamp(min=0) + torch.log1p(torch.exp(-xf.abs()))).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return fit(wide(dy) * torch.sigmoid(wide(x)), x) if ctx.needs_input_grad[0] else None


class SoftplusThreshold(Softplus):
    """Takes the straight branch much too early."""

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        slope = torch.where(wide(x) > 4, 1, torch.sigmoid(wide(x)))  # wrong: 0.982 at 4; torch changes over at 20
        return fit(wide(dy) * slope, x) if ctx.needs_input_grad[0] else None


class LeakyReLUQuarter(Rule):
    """y = x where x > 0, else x / 4."""

    @staticmethod
    def forward(x):
        return F.leaky_relu(x, SLOPE)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        g = wide(dy)
        return fit(torch.where(x > 0, g, g * SLOPE), x) if ctx.needs_input_grad[0] else None


class LeakyReLUBothSides(LeakyReLUQuarter):
    """Adds the two branches, each with the border in it."""

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        g = wide(dy)
        # wrong: 1.25 at 0, where any number from 0.25 to 1 would do
        g = torch.where(x < 0, 0, g) + torch.where(x > 0, 0, g * SLOPE)
        return fit(g, x) if ctx.needs_input_grad[0] else None


class Absolute(Rule):
    """y = |x|; the gradient at 0 is 0."""

    @staticmethod
    def forward(x):
        return x.abs()

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return fit(wide(dy) * torch.sgn(x), x) if ctx.needs_input_grad[0] else None


class AbsoluteByQuotient(Absolute):
    """Writes the sign as x / |x|."""

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return fit(wide(dy) * (x / x.abs()), x) if ctx.needs_input_grad[0] else None  # wrong: NaN at 0 and inf


class ComplexProduct(Rule):
    """y = x z for complex x and z; the gradient of x is dy z̄."""

    @staticmethod
    def forward(x, z):
        return x * z

    @staticmethod
    def backward(ctx, dy):
        x, z = ctx.saved_tensors
        dx = fit(dy * z.conj(), x) if ctx.needs_input_grad[0] else None
        dz = fit(dy * x.conj(), z) if ctx.needs_input_grad[1] else None
        return dx, dz


class ComplexProductUnconjugated(ComplexProduct):
    """Right for real numbers."""

    @staticmethod
    def backward(ctx, dy):
        x, z = ctx.saved_tensors
        dx = fit(dy * z, x) if ctx.needs_input_grad[0] else None  # wrong: the conjugate of z is missing
        dz = fit(dy * x.conj(), z) if ctx.needs_input_grad[1] else None
        return dx, dz


def row_norm(x: Tensor) -> Tensor:
    """x (..., d) -> √Σx² (...)."""
    return torch.linalg.vector_norm(x, dim=-1)


def complex_samples(device="cpu", dtype=torch.float64, seed=0):
    """Two complex tensors; nothing in the halves, which have no complex numbers worth the name."""
    if dtype not in (torch.float32, torch.float64):
        return
    generator = torch.Generator().manual_seed(seed)
    for shapes in (((3, 5), (3, 5)), ((2, 3, 4), (4,))):
        yield (
            tuple(
                torch.complex(
                    draw(generator, shape, device, dtype), draw(generator, shape, device, dtype)
                ).requires_grad_()
                for shape in shapes
            ),
            {},
        )


DEFECTS = (
    Defect(
        29,
        "inner-downcast",
        "float64 is computed in float32 inside backward",
        SiLUInFloat,
        SiLU,
        normal([(3, 5)], [(2, 3, 4)]),
        F.silu,
    ),
    Defect(
        30,
        "dtype-branch",
        "the branch for every dtype but float64 is wrong",
        TanhFastPath,
        Tanh,
        normal([(3, 5)], [(2, 3, 4)]),
        torch.tanh,
    ),
    Defect(
        31,
        "half-overflow",
        "squares overflow in float16 where the result would not",
        RMSNormSquaredInHalf,
        RMSNormPlain,
        normal([(3, 5)], [(2, 3, 4)]),
        lambda x: F.rms_norm(x, x.shape[-1:], None, EPS),
    ),
    Defect(
        32,
        "constant-off",
        "a constant is wrong by 5e-4 of itself",
        Exp2Rounded,
        Exp2,
        normal([(3, 5)], [(2, 3, 4)]),
        torch.exp2,
    ),
    Defect(
        33,
        "small-values",
        "an absolute 1e-6 guards a division, and is wrong where values are smaller",
        RowNormClamped,
        RowNorm,
        normal([(3, 5)], [(2, 3, 4)]),
        row_norm,
    ),
    Defect(
        34,
        "one-element",
        "the last element is masked off: one of 4,096",
        SoftsignTiled,
        Softsign,
        normal([(64, 64)]),
        F.softsign,
    ),
    Defect(
        35,
        "rare-branch",
        "a branch that is taken only for x > 4 is wrong",
        SoftplusThreshold,
        Softplus,
        normal([(3, 5)], [(2, 3, 4)]),
        lambda x: F.softplus(x, threshold=40.0),
    ),
    Defect(
        36,
        "kink",
        "the gradient at the kink lies outside the derivatives to its left and right",
        LeakyReLUBothSides,
        LeakyReLUQuarter,
        normal([(3, 5)], [(2, 3, 4)]),
        lambda x: F.leaky_relu(x, SLOPE),
    ),
    Defect(
        37,
        "nan-at-zero",
        "the gradient is NaN at 0 and at infinity, where the true one is finite",
        AbsoluteByQuotient,
        Absolute,
        normal([(3, 5)], [(2, 3, 4)]),
        torch.abs,
    ),
    Defect(
        38,
        "complex-conjugate",
        "the gradient of a complex product lacks a conjugate",
        ComplexProductUnconjugated,
        ComplexProduct,
        complex_samples,
        torch.mul,
    ),
)
