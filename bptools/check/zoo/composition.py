"""Defects 39 to 45: the Function is right by itself, and wrong together with another part of torch."""
# ruff: noqa: D102  (forward, setup_context and backward are torch's names and mean here what they mean there)

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bptools.check.zoo._defect import Defect, Rule, fit, linear_gradients, normal, over_rows, wide
from bptools.check.zoo.layout import Linear, Sigmoid


class Cube(Rule):
    """y = x³, in reverse and in forward mode."""

    @staticmethod
    def forward(x):
        return (wide(x) * wide(x) * wide(x)).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        xf = wide(x)
        return fit(wide(dy) * 3 * xf * xf, x) if ctx.needs_input_grad[0] else None

    @staticmethod
    def jvp(ctx, tx):
        (x,) = ctx.saved_tensors
        xf = wide(x)
        return (wide(tx) * 3 * xf * xf).to(x.dtype)


class CubeTangent(Cube):
    """Has the wrong factor in forward mode."""

    @staticmethod
    def jvp(ctx, tx):
        (x,) = ctx.saved_tensors
        xf = wide(x)
        return (wide(tx) * 2 * xf * xf).to(x.dtype)  # wrong: the factor is 3


class CumulativeSum(torch.autograd.Function):
    """y_i = Σ_{j ≤ i} x_j along a dimension."""

    @staticmethod
    def forward(x, dim):
        return torch.cumsum(wide(x), dim).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dim = inputs[1]

    @staticmethod
    def backward(ctx, dy):
        if not ctx.needs_input_grad[0]:
            return None, None
        dx = wide(dy).flip(ctx.dim).cumsum(ctx.dim).flip(ctx.dim)
        return dx.to(dy.dtype).contiguous(), None

    @staticmethod
    def vmap(info, in_dims, x, dim):
        x = x.movedim(in_dims[0], 0)
        return CumulativeSum.apply(x, dim + 1 if dim >= 0 else dim), 0


class CumulativeSumOverBatch(CumulativeSum):
    """Forgets that the batch has become dimension 0."""

    @staticmethod
    def vmap(info, in_dims, x, dim):
        x = x.movedim(in_dims[0], 0)
        return CumulativeSumOverBatch.apply(x, dim), 0  # wrong: dim counts the batch; -1 would be right


class SigmoidOldStyle(torch.autograd.Function):
    """Written before there was setup_context."""

    @staticmethod
    def forward(ctx, x):  # wrong: torch.func can't transform a forward that is given ctx
        ctx.save_for_backward(x)
        return torch.sigmoid(x)

    @staticmethod
    def backward(ctx, dy):
        return Sigmoid.backward(ctx, dy)


class LinearNoAutocast(Linear):
    """Mixes the float32 that was saved with the bfloat16 that comes back."""

    @staticmethod
    def backward(ctx, dy):
        x, w, b = ctx.saved_tensors
        dx = fit(dy @ w, x) if ctx.needs_input_grad[0] else None  # wrong: under autocast dy is not of w's dtype
        dw = fit(over_rows(dy, x), w) if ctx.needs_input_grad[1] else None
        db = fit(wide(dy), b) if ctx.needs_input_grad[2] else None
        return dx, dw, db


class LogSigmoid(Rule):
    """y = log σ(x), whose derivative is σ(-x)."""

    @staticmethod
    def forward(x):
        xf = wide(x)
        return (xf.clamp(max=0) - torch.log1p(torch.exp(-xf.abs()))).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return fit(wide(dy) * torch.sigmoid(-wide(x)), x) if ctx.needs_input_grad[0] else None


class LogSigmoidCompiled(LogSigmoid):
    """Has a formula of its own for the compiler."""

    @staticmethod
    def backward(ctx, dy):
        if not torch.compiler.is_compiling():
            return LogSigmoid.backward(ctx, dy)
        (x,) = ctx.saved_tensors
        return fit(wide(dy) * torch.sigmoid(wide(x)), x) if ctx.needs_input_grad[0] else None  # wrong: of -x


class Unit(Rule):
    """y = x / ‖x‖, the norm over all elements."""

    @staticmethod
    def forward(x):
        return (wide(x) / torch.linalg.vector_norm(wide(x))).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None
        g, norm = wide(dy), torch.linalg.vector_norm(wide(x))
        y = wide(x) / norm
        return fit((g - y * (g * y).sum()) / norm, x)


def capturing(x: Tensor) -> bool:
    """Whether what is done to x is being recorded in a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class UnitCaptured(Unit):
    """Reads the norm at warm-up, and bakes that number into the graph, where reading is forbidden."""

    norms: dict = {}  # noqa: RUF012  (shape -> the norm last read)

    @staticmethod
    def forward(x):
        if capturing(x):
            return (wide(x) / UnitCaptured.norms[x.shape]).to(x.dtype)  # wrong: replay has another x
        y = Unit.forward(x)
        if x.is_cuda and not torch.compiler.is_compiling():
            UnitCaptured.norms[x.shape] = torch.linalg.vector_norm(wide(x))
        return y


class LinearDeferredWeight(Linear):
    """Writes weight.grad itself once the backward pass is over, to keep that work off the critical path."""

    @staticmethod
    def backward(ctx, dy):
        x, w, b = ctx.saved_tensors
        dx, dw, db = linear_gradients(dy, x, w, b, ctx.needs_input_grad)
        if dw is None or not w.is_leaf:
            return dx, dw, db

        def accumulate():
            w.grad = dw.detach() if w.grad is None else w.grad + dw.detach()

        torch.autograd.Variable._execution_engine.queue_callback(accumulate)
        return dx, None, db  # wrong: when w's hooks run there is no gradient yet, and DDP reduces nothing


DEFECTS = (
    Defect(
        39,
        "jvp-factor",
        "jvp is wrong by a factor; backward is right",
        CubeTangent,
        Cube,
        normal([(3, 5)], [(2, 3, 4)]),
        lambda x: x * x * x,
    ),
    Defect(
        40,
        "vmap-dimension",
        "the vmap rule does not shift the dimension, and sums over the batch",
        CumulativeSumOverBatch,
        CumulativeSum,
        normal([(3, 5), 0], [(2, 3, 4), 1]),
        torch.cumsum,
    ),
    Defect(
        41,
        "no-setup-context",
        "forward takes ctx: torch.func refuses the Function",
        SigmoidOldStyle,
        Sigmoid,
        normal([(3, 5)], [(2, 3, 4)]),
        torch.sigmoid,
    ),
    Defect(
        42,
        "autocast",
        "under autocast grad_output is of another dtype than what was saved, and backward raises",
        LinearNoAutocast,
        Linear,
        normal([(3, 5), (4, 5), (4,)], [(2, 3, 4), (5, 4), (5,)]),
        F.linear,
    ),
    Defect(
        43,
        "compiled",
        "the branch for torch.compile has another formula",
        LogSigmoidCompiled,
        LogSigmoid,
        normal([(3, 5)], [(2, 3, 4)]),
        F.logsigmoid,
    ),
    Defect(
        44,
        "cuda-graph",
        "a number of the warm-up is baked into a CUDA graph, and replayed with fresh inputs",
        UnitCaptured,
        Unit,
        normal([(3, 5)], [(2, 3, 4)]),
        lambda x: x / torch.linalg.vector_norm(x),
        visible="cuda",
    ),
    Defect(
        45,
        "hooks-bypassed",
        "backward returns None and writes weight.grad itself afterwards: DDP's hooks never see the gradient",
        LinearDeferredWeight,
        Linear,
        normal([(3, 5), (4, 5), (4,)], [(2, 3, 4), (5, 4), (5,)]),
        F.linear,
    ),
)
