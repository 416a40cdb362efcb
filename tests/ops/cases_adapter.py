"""Cases of linear maps with frozen weights: low-rank updates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from case import EMPTY, NO_HESSIAN, Case
from torch import Tensor

import bptools.functional as B


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


def quantised(t, **settings):
    """A weight (4, 5) in NF4."""
    return B.quantize_nf4(t(4, 5, grad=False).float(), **settings)


def nf4_linear(x: Tensor, weight, bias: Tensor | None = None) -> Tensor:
    """The same by torch's functions."""
    return F.linear(x, B.dequantize_nf4(weight).to(x.dtype), bias)


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
    Case("nf4_linear", "bias", lambda t: ((t(2, 3, 5), quantised(t), t(4)), {}), theirs=nf4_linear),
    Case("nf4_linear", "plain", lambda t: ((t(5), quantised(t, double_quant=False)), {}), theirs=nf4_linear),
    Case("nf4_linear", "no-rows", lambda t: ((t(0, 5), quantised(t), t(4)), {}), theirs=nf4_linear, only=EMPTY),
]
