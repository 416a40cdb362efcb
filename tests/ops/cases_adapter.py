"""Cases of linear maps with frozen weights: low-rank updates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from case import EMPTY, NO_HESSIAN, Case
from torch import Tensor


def lora_linear(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, scaling=1.0, dropout_p=0.0
) -> Tensor:
    """What peft computes, by torch's functions."""
    base = F.linear(x, weight, bias)
    update = F.linear(F.linear(F.dropout(x, dropout_p).to(a.dtype), a), b)
    return (base + update * scaling).to(base.dtype)


def mixed(t):
    """A base in the dtype asked for, and an update in float32 beside half precision."""
    wide = [t(2, 5), t(4, 2)]
    if t.dtype in (torch.float16, torch.bfloat16):
        wide = [w.detach().float().requires_grad_() for w in wide]
    return (t(3, 5), t(4, 5, grad=False), *wide), {"scaling": 2.0}


CASES: list[Case] = [
    Case(
        "lora_linear",
        "everything-learns",
        lambda t: ((t(2, 3, 5), t(4, 5), t(2, 5), t(4, 2), t(4)), {"scaling": 0.5}),
        theirs=lora_linear,
    ),
    Case(
        "lora_linear",
        "frozen",
        lambda t: ((t(3, 5), t(4, 5, grad=False), t(2, 5), t(4, 2), t(4, grad=False)), {"scaling": 2.0}),
        theirs=lora_linear,
    ),
    Case(
        "lora_linear",
        "dropout",
        lambda t: ((t(3, 5), t(4, 5, grad=False), t(2, 5), t(4, 2)), {"dropout_p": 0.3}),
        theirs=lora_linear,
        random=True,
        raises=NO_HESSIAN,
    ),
    Case("lora_linear", "wide", mixed, theirs=lora_linear, only=("values", "half", "masks", "gradgradcheck")),
    Case(
        "lora_linear",
        "no-rows",
        lambda t: ((t(0, 5), t(4, 5), t(2, 5), t(4, 2), t(4)), {}),
        theirs=lora_linear,
        only=EMPTY,
    ),
]
