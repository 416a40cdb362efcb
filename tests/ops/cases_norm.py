"""Cases of the norms beyond those of the foundation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from case import CAPABILITIES, EMPTY, Case, Maker, call
from torch import Tensor

import bptools.functional as B
from bptools.ops.sync_batch_norm import sync_batch_norm


def tracking(functions: Any) -> Callable[..., Tensor]:
    """Instance norm of (x, weight, bias), with running buffers that live for one call."""
    return lambda x, w, b: functions.instance_norm(x, x.new_zeros(3), x.new_ones(3), w, b)


def evaluation(t: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Instance norm by a running mean and variance."""
    running = t(3, grad=False), t.positive(3, grad=False)
    return (t(2, 3, 2), *running, t(3), t(3)), {"use_input_stats": False}


def alone(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Synchronised batch norm of one process: all of its derivation but for the exchange."""
    mean, var = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    return sync_batch_norm(x, weight, bias, mean, var, 0.1, 1e-5, None)[0]


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True)


def add_layer_norm(x: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return F.layer_norm(x + residual, *args, **kwargs), x + residual


def add_rms_norm(x: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return F.rms_norm(x + residual, *args, **kwargs), x + residual


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Written out, for torch's second derivative is wrong, see test_peers_norm."""
    others = tuple(d for d in range(v.dim()) if d != dim)
    return g * (v / torch.linalg.vector_norm(v, 2, others, keepdim=dim != -1))


def spectral_norm(weight: Tensor, u: Tensor, v: Tensor, dim: int = 0) -> Tensor:
    return weight / torch.dot(u, torch.mv(weight.movedim(dim, 0).flatten(1), v))


CASES: list[Case] = [
    # group_norm
    Case("group_norm", "affine", lambda t: ((t(2, 4, 3), 2, t(4), t(4)), {})),
    Case("group_norm", "images", lambda t: ((t(2, 3, 2, 2), 3, t(3)), {"eps": 1e-3})),
    Case("group_norm", "one-group", lambda t: ((t(3, 4), 1, None, t(4)), {})),
    Case("group_norm", "no-samples", lambda t: ((t(0, 4, 3), 2, t(4), t(4)), {}), only=EMPTY),
    # instance_norm
    Case("instance_norm", "affine", lambda t: ((t(2, 3, 4),), {"weight": t(3), "bias": t(3)})),
    Case("instance_norm", "tracking", lambda t: ((t(2, 3, 2, 2), t(3), t(3)), {}), tracking(B), tracking(F)),
    Case("instance_norm", "evaluation", evaluation, only=("values", "masks", "half")),
    Case(
        "instance_norm", "no-samples", lambda t: ((t(0, 3, 4),), {"weight": t(3), "bias": t(3)}), only=("masks",)
    ),
    # local_response_norm
    Case(
        "local_response_norm",
        "even",  # in four dimensions torch's has no half precision on the CPU
        call(2, 4, 2, 2, size=2, alpha=0.5, beta=0.6, k=2.0),
        only=tuple(c for c in CAPABILITIES if c != "half"),
    ),
    Case(
        "local_response_norm",
        "wide",  # in three dimensions torch's autocast on the CPU takes another way
        call(2, 3, 2, size=7, alpha=0.5),
        only=tuple(c for c in CAPABILITIES if c not in ("autocast", "compile")),
    ),
    Case("local_response_norm", "empty", call(0, 3, 2, size=3), only=("values",)),
    # normalize
    Case("normalize", "euclidean", call(3, 5)),
    Case("normalize", "dims", call(2, 3, 2, p=1.0, dim=(0, -1), eps=3.0)),
    Case("normalize", "largest", call(3, 5, p=math.inf, dim=0)),
    Case("normalize", "cubic", call(3, 4, p=3.0)),
    Case("normalize", "root", call(3, 4, p=0.5), only=("values", "gradcheck", "half")),
    Case("normalize", "empty", call(0, 3), only=EMPTY),
    # norms of a residual sum
    Case("add_layer_norm", "affine", lambda t: ((t(3, 5), t(3, 5), (5,), t(5), t(5)), {}), theirs=add_layer_norm),
    Case(
        "add_layer_norm",
        "plain",
        lambda t: ((t(2, 2, 3), t(2, 2, 3), (2, 3)), {"eps": 1e-3}),
        theirs=add_layer_norm,
    ),
    Case(
        "add_layer_norm",
        "no-rows",
        lambda t: ((t(0, 5), t(0, 5), (5,), t(5), t(5)), {}),
        theirs=add_layer_norm,
        only=("values", "layouts"),
    ),
    Case("add_rms_norm", "affine", lambda t: ((t(3, 5), t(3, 5), (5,), t(5)), {}), theirs=add_rms_norm),
    Case(
        "add_rms_norm",
        "plain",
        lambda t: ((t(2, 2, 3), t(2, 2, 3), (2, 3)), {"eps": 1e-3}),
        theirs=add_rms_norm,
    ),
    Case(
        "add_rms_norm",
        "no-rows",
        lambda t: ((t(0, 5), t(0, 5), (5,), t(5)), {}),
        theirs=add_rms_norm,
        only=("values", "layouts"),
    ),
    # sync_batch_norm, of a process alone
    Case("sync_batch_norm", "alone", lambda t: ((t(4, 3), t(3), t(3)), {}), alone, batch_norm),
    Case("sync_batch_norm", "plain", lambda t: ((t(2, 3, 2, 2), None, None), {}), alone, batch_norm),
    # reparametrised weights
    Case("weight_norm", "rows", lambda t: ((t(3, 2, 2), t(3, 1, 1)), {}), theirs=weight_norm),
    Case("weight_norm", "middle", lambda t: ((t(3, 4, 2), t(1, 4, 1), 1), {}), theirs=weight_norm),
    Case(
        "weight_norm",
        "last",
        lambda t: ((t(3, 4), t(1, 4)), {"dim": 1}),
        theirs=weight_norm,
        only=("values", "layouts", "half"),
    ),
    Case(
        "weight_norm",
        "whole",
        lambda t: ((t(3, 4), t(), -1), {}),
        theirs=weight_norm,
        only=("values", "layouts", "masks"),
    ),
    Case(
        "spectral_norm",
        "middle",
        lambda t: ((t(3, 4, 2), t.positive(4, grad=False), t.positive(6, grad=False), 1), {}),
        theirs=spectral_norm,
    ),
]
