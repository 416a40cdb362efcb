"""Defects 9 to 19: the Function does not keep the contract between autograd and a Function."""
# ruff: noqa: D102  (forward, setup_context and backward are torch's names and mean here what they mean there)

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bptools.check.zoo._defect import Defect, Rule, draw, fit, normal, over_rows, wide
from bptools.check.zoo.layout import Linear, Sine

EPS = 1e-5
MOMENTUM = 0.1


class LinearWrongIndex(Linear):
    """Asks whether the weight is trained, and means the bias."""

    @staticmethod
    def backward(ctx, dy):
        needs = ctx.needs_input_grad
        b = ctx.saved_tensors[2]
        dx, dw, _ = Linear.backward(ctx, dy)
        db = fit(wide(dy), b) if needs[1] else None  # wrong: the bias is input 2
        return dx, dw, db


class LinearAllGradients(Linear):
    """Computes the gradient of frozen inputs too."""

    @staticmethod
    def backward(ctx, dy):
        x, w, b = ctx.saved_tensors
        dy = dy.to(w.dtype)
        # wrong: needs_input_grad is never read
        return fit(dy @ w, x), fit(over_rows(dy, x), w), fit(wide(dy), b)


class SineCosine(Rule):
    """sin x and cos x."""

    @staticmethod
    def forward(x):
        return torch.sin(x), torch.cos(x)

    @staticmethod
    def backward(ctx, dsin, dcos):
        (x,) = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None
        return fit(wide(dsin) * torch.cos(wide(x)) - wide(dcos) * torch.sin(wide(x)), x)


class SineCosineUnmaterialized(SineCosine):
    """Asks for None in place of zeros, and computes with it."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)  # wrong: backward does not expect the None of an unused output


class RMSNorm(Rule):
    """y = x / √(mean(x²) + ε) w, the mean over the last dimension."""

    @staticmethod
    def forward(x, w):
        xf = wide(x)
        rstd = torch.rsqrt((xf * xf).mean(-1, keepdim=True) + EPS)
        return (xf * rstd * wide(w)).to(torch.promote_types(x.dtype, w.dtype))

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        xf, g = wide(x), wide(dy) * w
        rstd = torch.rsqrt((xf * xf).mean(-1, keepdim=True) + EPS)
        x_hat = xf * rstd
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = fit(rstd * (g - x_hat * (g * x_hat).mean(-1, keepdim=True)), x)
        if ctx.needs_input_grad[1]:
            dw = fit(wide(dy) * x_hat, w)
        return dx, dw


class RMSNormFrozen(RMSNorm):
    """Has no gradient for the weight."""

    @staticmethod
    def backward(ctx, dy):
        dx, _ = RMSNorm.backward(ctx, dy)
        return dx, None  # wrong: the weight is trained as well


class SquaredError(Rule):
    """mean((x - t)²), a number."""

    @staticmethod
    def forward(x, t):
        difference = wide(x) - wide(t)
        return (difference * difference).mean().to(torch.promote_types(x.dtype, t.dtype))

    @staticmethod
    def backward(ctx, dy):
        x, t = ctx.saved_tensors
        difference = wide(x) - wide(t)
        slope = difference * (2 * wide(dy) / difference.numel())
        dx = fit(slope, x) if ctx.needs_input_grad[0] else None
        dt = fit(-slope, t) if ctx.needs_input_grad[1] else None
        return dx, dt


class SquaredErrorOfLast(SquaredError):
    """A loss that takes itself for the last operation."""

    @staticmethod
    def backward(ctx, dy):
        return SquaredError.backward(ctx, torch.ones_like(dy))  # wrong: the loss may be scaled, or one of several


class SineInPlace(Sine):
    """Saves an allocation at the expense of whoever else holds the gradient."""

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return dy.mul_(torch.cos(x)) if ctx.needs_input_grad[0] else None  # wrong: dy is not ours


class Softmax(Rule):
    """y = exp(x - max x) / Σ exp(x - max x), over the last dimension."""

    @staticmethod
    def forward(x):
        z = wide(x)
        if z.numel():  # the maximum of nothing raises
            z = z - z.amax(-1, keepdim=True)
        e = torch.exp(z)
        return (e / e.sum(-1, keepdim=True)).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None
        y, g = torch.softmax(wide(x), -1), wide(dy)
        return fit(y * (g - (g * y).sum(-1, keepdim=True)), x)


class SoftmaxInPlace(Softmax):
    """Shifts the caller's logits; neither y nor its gradient tells."""

    @staticmethod
    def forward(x):
        if x.numel():
            x.sub_(x.amax(-1, keepdim=True))  # wrong: x is the caller's, and not marked dirty
        return Softmax.forward(x)


class RunningCentre(Rule):
    """y = x - m with m = 0.9 running + 0.1 mean(x) over the first dimension."""

    @staticmethod
    def forward(x, running):
        mean = wide(x).mean(0)
        return (wide(x) - (wide(running) * (1 - MOMENTUM) + mean * MOMENTUM)).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, running = ctx.saved_tensors
        g = wide(dy)
        dx = fit(g - g.mean(0, keepdim=True) * MOMENTUM, x) if ctx.needs_input_grad[0] else None
        drunning = fit(g * (MOMENTUM - 1), running) if ctx.needs_input_grad[1] else None
        return dx, drunning


class RunningCentreUpdated(RunningCentre):
    """Moves the running mean on as it reads it."""

    @staticmethod
    def forward(x, running):
        running.mul_(1 - MOMENTUM).add_(x.mean(0) * MOMENTUM)  # wrong: no mark_dirty; compile and vmap can't know
        return (wide(x) - wide(running)).to(x.dtype)


class ReLUWithMask(Rule):
    """max(x, 0), and where x > 0 as numbers 0 and 1."""

    @staticmethod
    def forward(x):
        return torch.relu(x), (x > 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, dy, _):
        (x,) = ctx.saved_tensors
        return fit(torch.where(x <= 0, 0, dy), x) if ctx.needs_input_grad[0] else None


class ReLUWithUnmarkedMask(ReLUWithMask):
    """Lets the mask require grad."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)  # wrong: the mask is not marked as non-differentiable


class Average(Rule):
    """y = (x + z) / 2, by torch's broadcasting."""

    @staticmethod
    def forward(x, z):
        return ((wide(x) + wide(z)) * 0.5).to(torch.promote_types(x.dtype, z.dtype))

    @staticmethod
    def backward(ctx, dy):
        x, z = ctx.saved_tensors
        dx = fit(wide(dy) * 0.5, x) if ctx.needs_input_grad[0] else None
        dz = fit(wide(dy) * 0.5, z) if ctx.needs_input_grad[1] else None
        return dx, dz


class AverageShared(Average):
    """Computes the gradient once for both."""

    @staticmethod
    def backward(ctx, dy):
        x, z = ctx.saved_tensors
        g = (wide(dy) * 0.5).to(dy.dtype)
        dx = fit(g, x) if ctx.needs_input_grad[0] else None
        dz = fit(g, z) if ctx.needs_input_grad[1] else None
        return dx, dz  # wrong: one tensor twice; who scales one in place scales both


class Product(Rule):
    """y = x z, by torch's broadcasting."""

    @staticmethod
    def forward(x, z):
        return x * z

    @staticmethod
    def backward(ctx, dy):
        x, z = ctx.saved_tensors
        dx = fit(wide(dy) * z, x) if ctx.needs_input_grad[0] else None
        dz = fit(wide(dy) * x, z) if ctx.needs_input_grad[1] else None
        return dx, dz


class ProductOrSquare(Product):
    """Knows that the derivative of a square is 2 x, and forgets that the engine adds the two slots up."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.square = inputs[0] is inputs[1]

    @staticmethod
    def backward(ctx, dy):
        return Product.backward(ctx, 2 * dy if ctx.square else dy)  # wrong: the sum of both slots is 2 x already


def two_of_one(x: Tensor) -> tuple[Tensor, Tensor]:
    """sin x, cos x."""
    return torch.sin(x), torch.cos(x)


def running_samples(device="cpu", dtype=torch.float64, seed=0):
    """x to differentiate, and a buffer that is not."""
    generator = torch.Generator().manual_seed(seed)
    for shape in ((3, 5), (4, 2, 3)):
        x = draw(generator, shape, device, dtype).requires_grad_()
        yield (x, draw(generator, shape[1:], device, dtype)), {}


DEFECTS = (
    Defect(
        9,
        "needs-wrong-index",
        "needs_input_grad of the weight decides on the gradient of the bias",
        LinearWrongIndex,
        Linear,
        normal([(3, 5), (4, 5), (4,)], [(2, 3, 4), (5, 4), (5,)]),
        F.linear,
    ),
    Defect(
        10,
        "needs-ignored",
        "gradients of frozen inputs are computed and returned",
        LinearAllGradients,
        Linear,
        normal([(3, 5), (4, 5), (4,)], [(2, 3, 4), (5, 4), (5,)]),
        F.linear,
    ),
    Defect(
        11,
        "unused-output",
        "set_materialize_grads(False), and no check for None: an output that is not used makes backward raise",
        SineCosineUnmaterialized,
        SineCosine,
        normal([(3, 5)], [(2, 3, 4)]),
        two_of_one,
    ),
    Defect(
        12,
        "none-gradient",
        "None is returned for a weight that matters",
        RMSNormFrozen,
        RMSNorm,
        normal([(3, 5), (5,)], [(2, 3, 4), (4,)]),
        lambda x, w: F.rms_norm(x, x.shape[-1:], w, EPS),
    ),
    Defect(
        13,
        "gradient-not-multiplied",
        "the gradient of a loss ignores grad_output",
        SquaredErrorOfLast,
        SquaredError,
        normal([(3, 5), (3, 5)], [(2, 3, 4), (2, 3, 4)]),
        F.mse_loss,
    ),
    Defect(
        14,
        "gradient-mutated",
        "grad_output is multiplied in place",
        SineInPlace,
        Sine,
        normal([(3, 5)], [(2, 3, 4)]),
        torch.sin,
    ),
    Defect(
        15,
        "input-mutated",
        "forward shifts its input in place without mark_dirty",
        SoftmaxInPlace,
        Softmax,
        normal([(3, 5)], [(2, 3, 4)]),
        lambda x: torch.softmax(x, -1),
    ),
    Defect(
        16,
        "buffer-mutated",
        "forward updates a buffer argument in silence",
        RunningCentreUpdated,
        RunningCentre,
        running_samples,
        lambda x, running: x - (running * (1 - MOMENTUM) + x.mean(0) * MOMENTUM),
    ),
    Defect(
        17,
        "output-not-marked",
        "a mask given as numbers is not marked as non-differentiable",
        ReLUWithUnmarkedMask,
        ReLUWithMask,
        normal([(3, 5)], [(2, 3, 4)]),
        lambda x: (torch.relu(x), (x > 0).to(x.dtype)),
    ),
    Defect(
        18,
        "shared-gradient",
        "one tensor is returned as the gradient of two inputs",
        AverageShared,
        Average,
        normal([(3, 5), (3, 5)], [(2, 3, 4), (2, 3, 4)]),
        lambda x, z: (x + z) * 0.5,
    ),
    Defect(
        19,
        "one-tensor-twice",
        "the gradient is doubled when one tensor fills both slots",
        ProductOrSquare,
        Product,
        normal([(3, 5), (3, 5)], [(2, 3, 4), (2, 3, 4)]),
        torch.mul,
    ),
)
