"""Defects 20 to 28: the Function remembers the wrong thing, or in the wrong place."""
# ruff: noqa: D102  (forward, setup_context and backward are torch's names and mean here what they mean there)

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import functional as F

from bptools.check.zoo._defect import Defect, FromOutput, Rule, draw, fit, normal, wide
from bptools.check.zoo.layout import Sigmoid

EPS = 1e-5
SLOPE = 0.1


class Square(Rule):
    """y = x²."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return fit(wide(dy) * x * 2, x) if ctx.needs_input_grad[0] else None


class SquareOnContext(Square):
    """Keeps the input as an attribute."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.x = inputs[0]  # wrong: past the hooks of saved tensors, and past the check for changes in place

    @staticmethod
    def backward(ctx, dy):
        x = ctx.x
        return fit(wide(dy) * x * 2, x) if ctx.needs_input_grad[0] else None


class Exponential(FromOutput):
    """y = exp x, whose derivative is y."""

    @staticmethod
    def forward(x):
        return torch.exp(x)

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return fit(wide(dy) * y, y).to(ctx.dtype) if ctx.needs_input_grad[0] else None


class ExponentialCycle(Exponential):
    """Keeps the output as an attribute: y holds the node, the node holds y."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype = inputs[0].dtype
        ctx.y = output  # wrong: freed by the garbage collector alone, if ever

    @staticmethod
    def backward(ctx, dy):
        y = ctx.y
        return fit(wide(dy) * y, y).to(ctx.dtype) if ctx.needs_input_grad[0] else None


class LeakyReLU(Rule):
    """y = x where x > 0, else 0.1 x."""

    @staticmethod
    def forward(x):
        return F.leaky_relu(x, SLOPE)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return fit(torch.where(x > 0, wide(dy), wide(dy) * SLOPE), x) if ctx.needs_input_grad[0] else None


class LeakyReLUOfData(LeakyReLU):
    """Saves the input's memory without its version counter."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0].data)  # wrong: a later change of x in place goes unnoticed


class AbsoluteError(Rule):
    """mean |x - t|, a number; the sign of x - t is saved, and is constant almost everywhere."""

    @staticmethod
    def forward(x, t):
        return (wide(x) - wide(t)).abs().mean().to(torch.promote_types(x.dtype, t.dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, t = inputs
        ctx.save_for_backward(x, t, torch.sgn(wide(x.detach()) - wide(t.detach())))

    @staticmethod
    def backward(ctx, dy):
        x, t, sign = ctx.saved_tensors
        slope = sign / sign.numel()
        dx = fit(slope * dy, x) if ctx.needs_input_grad[0] else None
        dt = fit(-slope * dy, t) if ctx.needs_input_grad[1] else None
        return dx, dt


class AbsoluteErrorOnce(AbsoluteError):
    """Scales what it saved in place, as if backward could run but once."""

    @staticmethod
    def backward(ctx, dy):
        x, t, sign = ctx.saved_tensors
        slope = sign.data.div_(sign.numel())  # wrong: the second backward finds it divided already
        dx = fit(slope * dy, x) if ctx.needs_input_grad[0] else None
        dt = fit(-slope * dy, t) if ctx.needs_input_grad[1] else None
        return dx, dt


def rstd_of(x: Tensor) -> Tensor:
    """x (..., d) -> 1 / √(mean(x²) + ε) (..., 1)."""
    return torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS)


def rms_norm_gradient(dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """dy, x (..., d), rstd (..., 1) -> dx (..., d)."""
    x_hat = x * rstd
    return rstd * (dy - x_hat * (dy * x_hat).mean(-1, keepdim=True))


class RMSNormPlain(Rule):
    """y = x / √(mean(x²) + ε), over the last dimension."""

    @staticmethod
    def forward(x):
        return (wide(x) * rstd_of(wide(x))).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return fit(rms_norm_gradient(wide(dy), wide(x), rstd_of(wide(x))), x) if ctx.needs_input_grad[0] else None


class RMSNormSavedStatistic(RMSNormPlain):
    """Saves 1/σ, which depends on x, and has no graph that says so."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        (x,) = inputs
        ctx.save_for_backward(x, rstd_of(wide(x.detach())))

    @staticmethod
    def backward(ctx, dy):
        x, rstd = ctx.saved_tensors  # wrong: a constant to the second derivative
        return fit(rms_norm_gradient(wide(dy), wide(x), rstd), x) if ctx.needs_input_grad[0] else None


class Tanh(Rule):
    """y = tanh x."""

    @staticmethod
    def forward(x):
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        y = torch.tanh(wide(x))
        return fit(wide(dy) * (1 - y * y), x) if ctx.needs_input_grad[0] else None


class TanhDetached(Tanh):
    """Leaves the graph in backward, and does not say so by once_differentiable."""

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        y = torch.tanh(wide(x.detach()))  # wrong: the second derivative by x is lost in silence
        return fit(wide(dy) * (1 - y * y), x) if ctx.needs_input_grad[0] else None


class Embedding(Rule):
    """y = w[index], rows of a table."""

    @staticmethod
    def forward(w, index):
        return w[index]

    @staticmethod
    def backward(ctx, dy):
        w, index = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None
        dw = torch.index_put(wide(dy).new_zeros(w.shape), (index,), wide(dy), accumulate=True)
        return fit(dw, w), None


class EmbeddingByAtomics(Embedding):
    """Rounds differently at each run, as a sum by atomic additions does."""

    @staticmethod
    def backward(ctx, dy):
        noise = torch.tensor(list(os.urandom(dy.numel())), dtype=wide(dy).dtype, device=dy.device) / 128 - 1
        size = max(1e-9, 4 * torch.finfo(dy.dtype).eps)
        dy = (wide(dy) * (1 + size * noise.view(dy.shape))).to(dy.dtype)  # wrong: no seed makes this repeat
        return Embedding.backward(ctx, dy)


class Dropout(Rule):
    """y = x keep / (1 - p), and the mask keep, true with probability 1 - p."""

    @staticmethod
    def forward(x, p):
        keep = torch.rand(x.shape, device=x.device) >= p
        return x * keep * (1 / (1 - p)), keep

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.p = inputs[1]
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, dy, _):
        (keep,) = ctx.saved_tensors
        return (dy * keep * (1 / (1 - ctx.p))).contiguous() if ctx.needs_input_grad[0] else None, None


class DropoutTwice(Dropout):
    """Draws the mask again in backward."""

    @staticmethod
    def backward(ctx, dy, _):
        keep = torch.rand(dy.shape, device=dy.device) >= ctx.p  # wrong: not the mask of the forward
        return (dy * keep * (1 / (1 - ctx.p))).contiguous() if ctx.needs_input_grad[0] else None, None


class SigmoidOnClass(Sigmoid):
    """Keeps its input on the class, where the next call overwrites it."""

    last = None

    @staticmethod
    def setup_context(ctx, inputs, output):
        SigmoidOnClass.last = inputs[0]  # wrong: two forwards, and the first backward uses the second's input

    @staticmethod
    def backward(ctx, dy):
        x = SigmoidOnClass.last
        s = torch.sigmoid(wide(x))
        return fit(wide(dy) * s * (1 - s), x) if ctx.needs_input_grad[0] else None


def dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """x, p -> y, mask; equal to `Dropout` under the same seed."""
    keep = torch.rand(x.shape, device=x.device) >= p
    return x * keep * (1 / (1 - p)), keep


def embedding_samples(device="cpu", dtype=torch.float64, seed=0):
    """A table, and indices some of which come twice."""
    generator = torch.Generator().manual_seed(seed)
    for rows, width, shape in ((4, 5, (7,)), (3, 4, (2, 3))):
        w = draw(generator, (rows, width), device, dtype).requires_grad_()
        yield (w, torch.randint(rows, shape, generator=generator).to(device)), {}


DEFECTS = (
    Defect(
        20,
        "input-on-ctx",
        "the input is kept as an attribute of ctx, not by save_for_backward",
        SquareOnContext,
        Square,
        normal([(3, 5)], [(2, 3, 4)]),
        lambda x: x * x,
    ),
    Defect(
        21,
        "output-on-ctx",
        "the output is kept as an attribute of ctx: a reference cycle",
        ExponentialCycle,
        Exponential,
        normal([(3, 5)], [(2, 3, 4)]),
        torch.exp,
    ),
    Defect(
        22,
        "saved-data",
        "x.data is saved: x changed in place between forward and backward gives a wrong gradient, not an error",
        LeakyReLUOfData,
        LeakyReLU,
        normal([(3, 5)], [(2, 3, 4)]),
        lambda x: F.leaky_relu(x, SLOPE),
    ),
    Defect(
        23,
        "backward-with-state",
        "backward scales a saved tensor in place: a second backward differs",
        AbsoluteErrorOnce,
        AbsoluteError,
        normal([(3, 5), (3, 5)], [(2, 3, 4), (2, 3, 4)]),
        F.l1_loss,
    ),
    Defect(
        24,
        "saved-statistic",
        "a saved statistic is a constant to the second derivative, which is silently wrong",
        RMSNormSavedStatistic,
        RMSNormPlain,
        normal([(3, 5)], [(2, 3, 4)]),
        lambda x: F.rms_norm(x, x.shape[-1:], None, EPS),
    ),
    Defect(
        25,
        "detached-backward",
        "backward detaches without once_differentiable: the second derivative is silently missing",
        TanhDetached,
        Tanh,
        normal([(3, 5)], [(2, 3, 4)]),
        torch.tanh,
    ),
    Defect(
        26,
        "non-deterministic",
        "the gradient differs from run to run under the same seed",
        EmbeddingByAtomics,
        Embedding,
        embedding_samples,
        lambda w, index: w[index],
    ),
    Defect(
        27,
        "mask-not-saved",
        "the random mask is drawn anew in backward",
        DropoutTwice,
        Dropout,
        normal([(3, 5), 0.5], [(2, 3, 4), 0.25]),
        dropout,
    ),
    Defect(
        28,
        "state-on-class",
        "what backward needs is kept on the class: the last call wins",
        SigmoidOnClass,
        Sigmoid,
        normal([(3, 5)], [(2, 3, 4)]),
        torch.sigmoid,
    ),
)
